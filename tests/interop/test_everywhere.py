"""Accelerated models of every class wherever a model goes: each place x each class of each library.

What these classes compute, and how hooks, copies and traces go, has its tests beside each library's
recipes.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.bench.small import MEMBERS, Logits, build
from vertebra.interop._swap import Swapped
from vertebra.testing.parity import randomize

pytestmark = pytest.mark.parity


@pytest.fixture(params=MEMBERS)
def member(request) -> str:
    request.getfixturevalue(request.param.partition(":")[0])
    return request.param


@pytest.fixture
def plain(member) -> nn.Module:
    return randomize(build(member)).double()


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 32, 32, dtype=torch.double)


def swapped(model: nn.Module) -> int:
    return sum(isinstance(module, Swapped) for module in model.modules())


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Run forward and backward; return output, gradients and buffers."""
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [y.detach(), *grads, *(b.clone() for b in model.buffers())]


def assert_alike(model: nn.Module, plain: nn.Module) -> None:
    """Require equal numbers in both modes."""
    assert swapped(model)
    x = images()
    for training in (True, False):
        found, expected = (step(net.train(training), x) for net in (model, plain))
        torch.testing.assert_close(found, expected)


def test_from_meta(member, plain):
    with torch.device("meta"):
        model = vertebra.accelerate(build(member))
    assert model(images().float().to("meta")).shape == (3, 5)
    model.double().to_empty(device="cpu").load_state_dict(plain.state_dict())
    for name, buffer in model.named_buffers():  # some are not saved
        buffer.copy_(dict(plain.named_buffers())[name])
    assert_alike(model, plain)


COMPILED = ("torchvision: Bottleneck", "timm: seresnet", "transformers: ConvNextV2")


@pytest.mark.parametrize(
    "member",
    [
        pytest.param(name, marks=() if name in COMPILED else pytest.mark.thorough)
        for name in MEMBERS
    ],
    indirect=True,
)
def test_compiled(member, plain):
    torch._dynamo.reset()
    model = vertebra.accelerate(copy.deepcopy(plain))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images()
    found, expected = compiled(x), plain(x)
    torch.testing.assert_close(found, expected)
    for y in (found, expected):
        y.square().mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_after_convert_sync_batchnorm(member, plain):
    """In eval mode, where it runs without a GPU; what timm's norm loses there it loses in both."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    converted = convert(copy.deepcopy(plain)).eval()
    model = vertebra.accelerate(convert(copy.deepcopy(plain))).eval()
    before = convert(vertebra.accelerate(copy.deepcopy(plain))).eval()
    assert not any(
        isinstance(m, Swapped) and isinstance(m, nn.SyncBatchNorm) for m in model.modules()
    )
    x = images()
    for net in (model, before):
        torch.testing.assert_close(net(x), converted(x))


def test_with_frozen_batch_norms(plain):
    from vertebra.nn import freeze_batch_norm_2d

    frozen = freeze_batch_norm_2d(copy.deepcopy(plain))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    assert_alike(vertebra.accelerate(copy.deepcopy(frozen)), frozen)
    assert_alike(freeze_batch_norm_2d(vertebra.accelerate(copy.deepcopy(plain))), frozen)


def test_channels_last(plain):
    x = images().to(memory_format=torch.channels_last)
    model = vertebra.accelerate(copy.deepcopy(plain)).to(memory_format=torch.channels_last)
    for training in (True, False):
        found, expected = (step(net.train(training), x) for net in (model, plain))
        torch.testing.assert_close(found, expected)


def test_three_steps_and_back(plain):
    """An optimizer made before `accelerate` drives it; `restore` continues where it stands."""
    model = copy.deepcopy(plain)
    nets = (model, plain)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for net in nets]
    for change in (vertebra.accelerate, vertebra.restore):
        assert bool(swapped(change(model))) == (change is vertebra.accelerate)
        for _ in range(3):
            x = images()
            for net, optimizer in zip(nets, optimizers, strict=True):
                step(net.train(), x)
                optimizer.step()
        torch.testing.assert_close(
            list(model.state_dict().values()), list(plain.state_dict().values())
        )
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))


# in other processes

_ROOT = Path(__file__).parents[2]

_LOADS = """
import pickle, sys
sys.modules["vertebra"] = None
import tests.conftest  # which declares what the import of torchvision looks up
import torch
numbers = torch.load("numbers.pt", weights_only=True)
for name, (x, expected) in numbers.items():
    with open(f"{name}.pkl", "rb") as file:
        models = [torch.load(f"{name}.pt", weights_only=False), pickle.load(file)]
    for model in models:
        y = model(x)
        torch.testing.assert_close(getattr(y, "logits", y), expected, msg=name)
print(len(numbers), [name for name in sys.modules if name.startswith("vertebra.")])
"""


def run(script: str, folder: Path, *args: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    env["VERTEBRA_BACKEND"] = "eager"
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=env,
    )


@pytest.mark.usefixtures("torchvision", "timm", "transformers")
def test_loads_where_vertebra_cannot_be_imported(tmp_path):
    numbers = {}
    for member in MEMBERS:
        model = vertebra.accelerate(randomize(build(member)).double()).eval()
        assert swapped(model)
        name, x = member.replace(": ", "-"), images(1)
        numbers[name] = (x, model(x).detach())
        model = model.model if isinstance(model, Logits) else model  # a class of ours
        torch.save(model, tmp_path / f"{name}.pt")
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(copy.deepcopy(model)))
    torch.save(numbers, tmp_path / "numbers.pt")
    process = run(_LOADS, tmp_path)
    out, errors = process.communicate(timeout=300)
    assert out == f"{len(numbers)} []\n", errors


@pytest.fixture(scope="module")
def alone():
    """A process group of one."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_in_ddp(plain):
    """Wrapped and then accelerated; accelerated and then wrapped."""
    ddp = nn.parallel.DistributedDataParallel
    model = ddp(vertebra.accelerate(copy.deepcopy(plain)))
    wrapped = vertebra.accelerate(ddp(copy.deepcopy(plain)))
    assert swapped(model) == swapped(wrapped) > 0
    x = images()
    expected = step(plain.train(), x)
    for net in (model, wrapped):
        torch.testing.assert_close(step(net.train(), x), expected)


_RANK = """
import copy, sys
import tests.conftest
import torch
from torch.nn.parallel import DistributedDataParallel
import vertebra
from tests.interop.test_everywhere import build, images, randomize, step

rank = int(sys.argv[1])
store = torch.distributed.FileStore("store", 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
found = {}
for member in sys.argv[2:]:
    torch.manual_seed(0)  # one model, and each rank its own images
    plain = randomize(build(member)).double()
    model = vertebra.accelerate(copy.deepcopy(plain))
    torch.manual_seed(1 + rank)
    x = images()
    expected = step(DistributedDataParallel(plain), x)
    found[member] = step(DistributedDataParallel(model), x)
    torch.testing.assert_close(found[member], expected, msg=member)
torch.save(found, f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.usefixtures("torchvision", "timm", "transformers")
def test_in_ddp_of_two_processes(tmp_path):
    members = ("torchvision: Bottleneck", "timm: convnextv2", "transformers: RegNet y")
    processes = [run(_RANK, tmp_path, str(rank), *members) for rank in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for member in members:
        assert not torch.equal(first[member][0], second[member][0])  # of other images
        torch.testing.assert_close(first[member][1], second[member][1])  # averaged
