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
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vertebra
from vertebra.interop._swap import Swapped
from vertebra.testing.parity import randomize

pytestmark = pytest.mark.parity

_HF: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}


def _torchvision(name: str) -> nn.Module:
    from torchvision.models import convnext, regnet, resnet

    if name in ("BasicBlock", "Bottleneck"):
        return resnet.ResNet(getattr(resnet, name), (1,) * 4, num_classes=5)
    if name == "convnext":
        stages = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
        return convnext.ConvNeXt(stages, num_classes=5)
    options = {"se_ratio": 0.25} if name == "regnet_y" else {}
    blocks = regnet.BlockParams([1, 1], [8, 16], [4, 4], [1.0, 1.0], [2, 2], **options)
    return regnet.RegNet(blocks, num_classes=5)


def _timm(name: str) -> nn.Module:
    from timm.models import convnext, regnet, resnet

    if name in ("BasicBlock", "Bottleneck", "seresnet"):
        block = resnet.Bottleneck if name == "seresnet" else getattr(resnet, name)
        options: dict[str, Any] = {"channels": (8, 8, 8, 8), "num_classes": 5}
        attention = {"attn_layer": "se"} if name == "seresnet" else {}
        return resnet.ResNet(block, (1,) * 4, block_args=attention, **options)
    if name == "regnet":
        shape = {"depth": 4, "w0": 8, "wa": 8, "wm": 1.7, "group_size": 4, "stem_width": 8}
        return regnet.RegNet(regnet.RegNetCfg(**shape, se_ratio=0.25), num_classes=5)
    v2 = {"use_grn": True, "ls_init_value": None} if name == "convnextv2" else {}
    return convnext.ConvNeXt(depths=(1,) * 4, dims=(8,) * 4, num_classes=5, **v2)


class _Logits(nn.Module):
    """A model of transformers that returns a tensor, as the others do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def _transformers(name: str) -> nn.Module:
    import transformers

    family, _, kind = name.partition(" ")
    stem = {} if family.startswith("ConvNext") else {"embedding_size": 8, "layer_type": kind}
    stem |= {"num_stages": 2} if family.startswith("ConvNext") else {}
    stem |= {"groups_width": 4} if family == "RegNet" else {}
    config = getattr(transformers, f"{family}Config")(**stem, **_HF)
    return _Logits(getattr(transformers, f"{family}ForImageClassification")(config))


BUILD: dict[str, tuple[Callable[[str], nn.Module], tuple[str, ...]]] = {
    "torchvision": (
        *(_torchvision,),
        ("BasicBlock", "Bottleneck", "regnet_x", "regnet_y", "convnext"),
    ),
    "timm": (
        *(_timm,),
        ("BasicBlock", "Bottleneck", "seresnet", "regnet", "convnext", "convnextv2"),
    ),
    "transformers": (
        *(_transformers,),
        ("ResNet basic", "ResNet bottleneck", "RegNet x", "RegNet y", "ConvNext", "ConvNextV2"),
    ),
}
MEMBERS = [f"{library}: {name}" for library, (_, names) in BUILD.items() for name in names]


def build(member: str) -> nn.Module:
    library, _, name = member.partition(": ")
    model = BUILD[library][0](name)
    for module in model.modules():
        for drop in ("p", "drop_prob"):  # drops would be others
            if hasattr(module, drop):
                setattr(module, drop, 0.0)
    return model


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
        model = model.model if isinstance(model, _Logits) else model  # a class of this file
        torch.save(model, tmp_path / f"{name}.pt")
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(copy.deepcopy(model)))
    torch.save(numbers, tmp_path / "numbers.pt")
    process = run(_LOADS, tmp_path)
    out, errors = process.communicate(timeout=300)
    assert out == f"{len(numbers)} []\n", errors


@contextmanager
def group(store: torch.distributed.Store, rank: int, size: int) -> Generator[None]:
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    with group(torch.distributed.HashStore(), 0, 1):
        yield


@pytest.mark.usefixtures("alone")
def test_in_ddp(plain):
    """Wrapped and then accelerated; accelerated and then wrapped."""
    model = DistributedDataParallel(vertebra.accelerate(copy.deepcopy(plain)))
    wrapped = vertebra.accelerate(DistributedDataParallel(copy.deepcopy(plain)))
    assert swapped(model) == swapped(wrapped) > 0
    x = images()
    expected = step(plain.train(), x)
    for net in (model, wrapped):
        torch.testing.assert_close(step(net.train(), x), expected)


_SECOND = """
import sys
import tests.conftest
import torch
from tests.interop.test_everywhere import steps_of_rank
torch.save(steps_of_rank(1, "store", sys.argv[1:]), "second.pt")
"""


def steps_of_rank(rank: int, store: str, members: Sequence[str]) -> dict[str, list[Tensor]]:
    """Take a step of each member as one of two processes; return what the accelerated did."""
    found: dict[str, list[Tensor]] = {}
    with group(torch.distributed.FileStore(store, 2), rank, 2):
        for member in members:
            torch.manual_seed(0)  # one model, and each rank its own images
            plain = randomize(build(member)).double()
            model = vertebra.accelerate(copy.deepcopy(plain))
            torch.manual_seed(1 + rank)
            x = images()
            expected = step(DistributedDataParallel(plain), x)
            found[member] = step(DistributedDataParallel(model), x)
            torch.testing.assert_close(found[member], expected, msg=member)
    return found


@pytest.mark.usefixtures("torchvision", "timm", "transformers")
def test_in_ddp_of_two_processes(tmp_path):
    members = ("torchvision: Bottleneck", "timm: convnextv2", "transformers: RegNet y")
    process = run(_SECOND, tmp_path, *members)
    first = steps_of_rank(0, str(tmp_path / "store"), members)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    second = torch.load(tmp_path / "second.pt", weights_only=True)
    for member in members:
        assert not torch.equal(first[member][0], second[member][0])  # of other images
        torch.testing.assert_close(first[member][1], second[member][1])  # averaged
