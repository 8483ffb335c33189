"""Fused models on CPUs are recorded, and run by the record only while it says what they would."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import vertebra
from vertebra.bench import peers
from vertebra.bench.small import MEMBERS, build
from vertebra.kernels import _choices, _recording
from vertebra.kernels._op import observe
from vertebra.models import ConvNeXt, RegNet, ResNet
from vertebra.models._convnext_config import ConvNeXtConfig
from vertebra.models._regnet_config import RegNetConfig
from vertebra.models._resnet_config import ResNetConfig
from vertebra.nn import _recorded
from vertebra.nn.fused_blocks import FusedBlocks, Recorded
from vertebra.testing.parity import randomize

pytestmark = pytest.mark.usefixtures("on_onednn")

Seen = list[Tensor]
"""Maps that somebody kept."""


def resnet() -> nn.Module:
    config = ResNetConfig(block="bottleneck", layers=(2, 3), hidden_sizes=(8, 16), num_classes=10)
    return ResNet(config)


def basic() -> nn.Module:
    return ResNet(ResNetConfig(block="basic", layers=(3,), hidden_sizes=(64,), num_classes=10))


def regnet() -> nn.Module:
    config = RegNetConfig("y", hidden_sizes=(16, 32), depths=(1, 3), group_width=8, num_classes=10)
    return RegNet(config)


def convnext() -> nn.Module:
    return ConvNeXt(ConvNeXtConfig(depths=(1, 2), dims=(8, 16), num_classes=10))


OWN = {"resnet": resnet, "basic": basic, "regnet": regnet, "convnext": convnext}
STAGES = {"resnet": 2, "basic": 1, "regnet": 2, "convnext": 2}
"""The recordings of one call where the network as a whole is none."""


def fused(name: str, whole: bool = True) -> Any:
    """Return a network that is recorded as a whole, or else stage by stage."""
    torch.manual_seed(0)
    model: Any = vertebra.fuse(randomize(OWN[name]()).eval())
    assert model.is_recorded
    model.is_recorded = whole
    return model


def unrecorded(model: nn.Module) -> nn.Module:
    """Return the model, which runs its modules from now on."""
    for module in model.modules():
        if isinstance(module, Recorded):
            module.is_recorded = False
    return model


def exact(model: nn.Module, x: Tensor) -> Tensor:
    return unrecorded(copy.deepcopy(model))(x)


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 40, 33)


def assert_recorded(model: nn.Module, recordings: list[Any], count: int, rtol: float = 0.0) -> None:
    """The third call and those after it are of recordings, as many as are given."""
    dtype = next(model.parameters()).dtype
    for _ in range(2):
        model(image().to(dtype))
    assert not recordings
    for _ in range(2):
        x = image().to(dtype)
        recordings.clear()
        torch.testing.assert_close(model(x), exact(model, x), rtol=rtol, atol=rtol)
        assert len(recordings) == count


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_networks_are_recorded(name, whole, recordings):
    model = fused(name, whole)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        recordings.clear()
        assert_recorded(twin, recordings, 1 if whole else STAGES[name])


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_features_are_recorded(name, recordings):
    model = fused(name)
    model.keep_features((0, 1))
    for _ in range(4):
        x = image()
        recordings.clear()
        found = model(x)
        assert type(found) is list
        for y, wanted in zip(found, exact(model, x), strict=True):
            assert torch.equal(y, wanted)
    assert len(recordings) == 1


@torch.no_grad()
def test_networks_with_parts_of_somebody_else_are_recorded_in_part(recordings):
    class Head(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    model = fused("resnet")
    model.fc = Head(model.fc.in_features, 3)
    assert_recorded(model, recordings, STAGES["resnet"])
    model.fc = nn.Linear(model.fc.in_features, 3)
    handle = model.maxpool.register_forward_hook(lambda *_: None)
    for change in (lambda: None, handle.remove):
        change()
        for _ in range(3):
            recordings.clear()
            x = image()
            assert torch.equal(model(x), exact(model, x))
    assert len(recordings) == 1


class Noting(ResNet):
    """Does more than compute."""

    def forward_stem(self, x: Tensor) -> Tensor:
        y = super().forward_stem(x)
        seen.append(y)
        return y


seen: Seen = []


@torch.no_grad()
def test_networks_of_derived_classes_are_recorded_in_part(recordings):
    model = vertebra.fuse(Noting(resnet().config).eval())
    for i in range(4):
        recordings.clear()
        seen.clear()
        model(image())
        assert len(seen) == 1
        assert len(recordings) == (0 if i < 2 else STAGES["resnet"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OWN)
def test_half_precision_is_recorded(name, dtype, recordings):
    """Where the CPU has it."""
    has = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    assert_recorded(fused(name).to(dtype), recordings, int(has[dtype]()))


@torch.no_grad()
@pytest.mark.parametrize("candidate", ["onednn_linear", "mkl"])
@pytest.mark.parametrize("name", OWN)
def test_what_is_measured_to_be_faster_is_recorded(name, candidate, recordings, monkeypatch):
    monkeypatch.setattr(_choices, "best", lambda *_: candidate)
    # in which order MKL adds depends on where memory lies
    rtol = 1e-5 if candidate == "mkl" else 0.0
    assert_recorded(fused(name), recordings, 1, rtol)
    called = {call.op.__name__.partition(".")[0] for text in recordings for call in text.calls}
    basic = {"_convolution_pointwise", "_convolution_pointwise_"}
    product = "_mkl_linear" if candidate == "mkl" else "_linear_pointwise"
    assert (product in called) == (name != "basic")
    assert called & basic


class Map(nn.Module):
    """A backbone of transformers that returns its last map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).feature_maps[-1]


def dinov3() -> nn.Module:
    transformers = peers.transformers()
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2])
    return Map(transformers.DINOv3ConvNextBackbone(config))


def convnext_of_convolutions() -> nn.Module:
    shape = {"depths": (1, 2, 1, 1), "dims": (8, 16, 16, 16), "num_classes": 5}
    return peers.timm().models.convnext.ConvNeXt(conv_mlp=True, **shape)


def eca_resnet() -> nn.Module:
    resnet = peers.timm().models.resnet
    options = {"channels": (8, 8, 8, 8), "block_args": {"attn_layer": "eca"}, "num_classes": 5}
    return resnet.ResNet(resnet.Bottleneck, (1, 2, 1, 1), **options)


PEERS: dict[str, Callable[[], nn.Module]] = {
    **{member: partial(build, member) for member in MEMBERS},
    "timm: ConvNeXt of convolutions": convnext_of_convolutions,
    "timm: ECA-ResNet": eca_resnet,
    "transformers: DINOv3": dinov3,
}


@torch.no_grad()
@pytest.mark.parity
@pytest.mark.parametrize("name", PEERS)
def test_networks_of_peers_are_recorded(name, recordings):
    model = vertebra.fuse(randomize(PEERS[name]()).eval())
    stages = [path for path, module in model.named_modules() if isinstance(module, Recorded)]
    outer = [path for path in stages if not path.startswith(tuple(f"{p}." for p in stages))]
    assert outer
    # those of transformers return more than tensors
    assert isinstance(model, Recorded) or name.startswith("transformers")
    for twin in (model, copy.deepcopy(model)):
        recordings.clear()
        assert_recorded(twin, recordings, 1 if isinstance(model, Recorded) else len(outer))


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("name", "sums", "gates"), [("resnet", 5, 0), ("basic", 3, 0), ("regnet", 4, 4)]
)
def test_sums_and_gates_are_written_in_place(name, sums, gates, whole, recordings):
    """All that are in one recording: a stage has what it is given from somebody else."""
    model = fused(name, whole)
    for _ in range(3):
        model(image())
    called = [str(call.op) for text in recordings for call in text.calls]
    in_place = called.count("mkldnn._convolution_pointwise_.binary")
    assert in_place + called.count("mkldnn._convolution_pointwise.binary") == sums
    # the stages of the others begin with a projection
    assert in_place == (2 if name == "basic" and not whole else sums)
    assert called.count("aten.mul_.Tensor") == gates
    assert called.count("aten.mul.Tensor") == 0


@torch.no_grad()
def test_parts_of_an_mlp_are_added_in_place(recordings, monkeypatch):
    """And neither the shortcut nor a part is copied."""
    monkeypatch.setattr(sys.modules["vertebra.nn.mlp"], "_MAX_HIDDEN_BYTES_PER_THREAD", 1)
    model = fused("convnext")
    for _ in range(3):
        x = image(3)
        assert torch.equal(model(x), exact(model, x))
    (text,) = recordings
    called = [str(call.op) for call in text.calls]
    assert called.count("mkldnn._convolution_pointwise_.binary") == 3 * 3  # blocks, images
    assert "mkldnn._convolution_pointwise.binary" not in called
    assert called.count("aten.clone.default") == 1  # the image, in channels_last
    assert "aten.copy_.default" not in called


class Recorder(nn.Module):
    """Stands in the place of a module, and keeps what goes in and out."""

    def __init__(self, module: nn.Module, seen: Seen) -> None:
        super().__init__()
        self.module, self.seen = module, seen

    def forward(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        self.seen.append(x)
        y = self.module(x, *rest, **options)
        self.seen.append(y)
        return y


def _hook(module: nn.Module, seen: Seen) -> None:
    module.register_forward_hook(lambda _, __, y: seen.append(y))


def _pre_hook(module: nn.Module, seen: Seen) -> None:
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))


def _views(module: nn.Module, seen: Seen) -> None:
    def keep(_: nn.Module, __: Any, y: Tensor) -> None:
        seen.append(y.detach()[:1])

    module.register_forward_hook(keep)


def _patch(module: nn.Module, seen: Seen) -> None:
    forward = module.forward

    def keeping(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(x)
        return forward(x, *rest, **options)

    module.forward = keeping  # pyright: ignore[reportAttributeAccessIssue]


WATCHERS = {"hook": _hook, "pre-hook": _pre_hook, "views": _views, "patch": _patch}


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("how", [*WATCHERS, "recorder"])
@pytest.mark.parametrize("name", ["resnet", "regnet"])
def test_who_watches_sees_all(name, how, whole):
    """Whatever watches any module of a network, also of a recorded one, sees and keeps the same."""
    x, model = torch.randn(1, 3, 24, 17), fused(name, whole)
    last = [path for path, m in model.named_modules() if isinstance(m, FusedBlocks)][-1]
    paths = [path for path, _ in model.named_modules() if path.startswith(last)]
    for path in paths if how == "hook" else paths[:: len(paths) // 4]:
        kept: list[Seen] = []
        for watched in (copy.deepcopy(model), unrecorded(copy.deepcopy(model))):
            seen: Seen = []
            for _ in range(3):
                watched(x)
            if how == "recorder":
                parent, _, child = path.rpartition(".")
                module = watched.get_submodule(path)
                setattr(watched.get_submodule(parent), child, Recorder(module, seen))
            else:
                WATCHERS[how](watched.get_submodule(path), seen)
            for _ in range(3):
                watched(x)
            kept.append(seen)
        for found, wanted in zip(*kept, strict=True):
            assert torch.equal(found, wanted), path


def _stage(model: nn.Module) -> FusedBlocks:
    return [m for m in model.modules() if isinstance(m, FusedBlocks)][-1]


def _conv(model: nn.Module) -> Any:
    convs = (m for m in _stage(model).modules() if isinstance(m, nn.Conv2d))
    return next(conv for conv in convs if conv.kernel_size == (3, 3))


def _replace_weight(model: nn.Module) -> None:
    conv = _conv(model)
    conv.weight = nn.Parameter(torch.randn_like(conv.weight), requires_grad=False)


def _write_weight(model: nn.Module) -> None:
    _conv(model).weight.mul_(2)


def _point_weight_elsewhere(model: nn.Module) -> None:
    conv = _conv(model)
    conv.weight.data = torch.randn_like(conv.weight)


def _turn_weight(model: nn.Module) -> None:
    conv = _conv(model)
    conv.weight.data = conv.weight.data.transpose(2, 3)


def _load(model: nn.Module) -> None:
    model.load_state_dict({key: v + 0.5 for key, v in model.state_dict().items()})


def _replace_activation(model: nn.Module) -> None:
    for block in model.modules():
        for name, child in block.named_children():
            if isinstance(child, nn.ReLU):
                setattr(block, name, nn.SiLU())


def _set_attribute(model: nn.Module) -> None:
    _conv(model).padding_mode = "circular"


def _replace_block(model: nn.Module) -> None:
    stage = _stage(model)
    stage[len(stage) - 1] = nn.Sequential(nn.ReLU())


def _append_block(model: nn.Module) -> None:
    _stage(model).append(nn.Tanh())


def _double(model: nn.Module) -> None:
    model.double()


CHANGES = {
    f.__name__.strip("_"): f
    for f in (
        *(
            _replace_weight,
            _write_weight,
            _point_weight_elsewhere,
            _turn_weight,
            _load,
            _replace_activation,
        ),
        *(_set_attribute, _replace_block, _append_block, _double),
    )
}


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["resnet", "regnet"])
def test_whatever_changes_is_heeded(name, change, whole, recordings):
    model, x = fused(name, whole), image()
    for _ in range(3):
        before = model(x)
    torch.manual_seed(1)
    change(model)
    x = x.to(next(model.parameters()).dtype)
    wanted = exact(model, x)
    assert not torch.equal(wanted, before.to(x.dtype))
    for _ in range(4):
        assert torch.equal(model(x), wanted)
    recordings.clear()
    model(x)
    assert bool(recordings) == (change is not _double)  # oneDNN has no float64


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_whoever_looks_on_sees_the_modules(recordings):
    """Modes, hooks on all modules, `explain`: none of them meets a recording."""
    model, x = fused("resnet"), image()
    for _ in range(3):
        wanted = model(x)
    recordings.clear()
    called: list[str] = []
    handle = register_module_forward_hook(lambda m, *_: called.append(type(m).__name__))
    assert torch.equal(model(x), wanted)
    handle.remove()
    assert called.count("Bottleneck") == 5
    with vertebra.backend("eager"):
        eager = model(x)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(model(x), eager)  # of which a mode of PyTorch sees every op
    assert counter.get_total_flops() > 0
    with observe(lambda call: called.append(call.op.name)):
        assert torch.equal(model(x), wanted)
    assert called.count("conv2d_act") > 15
    paths = {site.path for site in vertebra.explain(model, x)}
    assert "onednn" in paths
    with torch.backends.mkldnn.flags(enabled=False):
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    with torch.enable_grad():
        y = model(x.clone().requires_grad_())
        assert y.requires_grad
    assert not recordings
    assert torch.equal(model(x), wanted)
    assert recordings


@pytest.mark.parametrize("before", [0, 4], ids=["from the start", "once it is recorded"])
@pytest.mark.parametrize("part", [lambda model: model, _stage], ids=["all", "a stage"])
@pytest.mark.parametrize("name", ["resnet", "regnet"])
def test_parameters_that_want_gradients_get_them(name, part, before):
    model, x = fused(name), image()
    for _ in range(before):
        model(x)
    wanted = part(model).requires_grad_(True)
    for _ in range(4):
        model.zero_grad()
        model(x).sum().backward()
    assert all(p.grad is not None for p in wanted.parameters())
    twin = unrecorded(copy.deepcopy(model))
    twin.zero_grad()
    twin(x).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_excitation_alone_may_want_gradients(dtype):
    """Of no map before it autograd knows."""
    model, x = fused("regnet").to(dtype), image().to(dtype)
    for _ in range(3):
        model(x)
    fcs = [m for name, m in model.named_modules() if name.endswith(("se.fc1", "se.fc2"))][-2:]
    for fc in fcs:
        fc.requires_grad_()
    for _ in range(3):
        model.zero_grad()
        model(x).sum().backward()
        assert all(p.grad is not None and p.grad.any() for fc in fcs for p in fc.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd(mode, recordings):
    model, x = fused("resnet"), image()
    for _ in range(3):
        model(x)
    recordings.clear()
    with mode():
        for _ in range(3):
            y = model(image())
    assert y.is_inference() == (mode is torch.inference_mode)
    assert recordings


@torch.no_grad()
def test_a_stage_keeps_what_it_is_given(recordings):
    model = fused("resnet")
    stage = _stage(model)
    for _ in range(4):
        x = torch.randn(2, 8, 8, 8).contiguous(memory_format=torch.channels_last)
        before = x.clone()
        assert torch.equal(stage(x), exact(stage, before))
        assert torch.equal(x, before)
    assert recordings


@torch.no_grad()
def test_few_shapes_are_recorded(recordings):
    model = fused("basic")
    for n in range(1, _recorded._MOST_SHAPES + 1):
        for _ in range(3):
            model(image(n))
    assert len(recordings) == _recorded._MOST_SHAPES
    recordings.clear()
    model(image(9)), model(image(1))  # the ninth makes room for itself
    assert not recordings
    for n in range(1, 3 * _recorded._MOST_SHAPES):
        for _ in range(2):
            x = image(n)
            assert torch.equal(model(x), exact(model, x))
    kept = [_recorded._of[m] for m in model.modules() if m in _recorded._of]
    assert len(kept) == 2  # the network and its stage
    for recordings_ in kept:
        assert len([*recordings_._signatures]) <= _recorded._MOST_SHAPES


@torch.no_grad()
@pytest.mark.parametrize("repeatable", [True, False])
def test_a_stage_and_its_weights_die_with_the_model(repeatable, recordings, monkeypatch):
    if not repeatable:
        monkeypatch.setattr(_recording.Recorder, "text", None)
    model = fused("resnet")
    for _ in range(3):
        model(image())
    assert bool(recordings) == repeatable
    held = [weakref.ref(m) for m in model.modules()] + [weakref.ref(p) for p in model.parameters()]
    recordings.clear()
    del model
    gc.collect()
    assert not [ref for ref in held if ref() is not None]


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_what_is_converted_holds_no_memory_that_it_leaves(name, recordings):
    model = fused(name)
    for _ in range(3):
        model(image())
    assert any(module in _recorded._of for module in model.modules())
    model.double()
    assert not any(module in _recorded._of for module in model.modules())


@torch.no_grad()
def test_threads_share_a_model():
    model = fused("resnet")
    images = [image(n) for n in (1, 2, 1, 2)]
    wanted = [exact(model, x) for x in images]
    failed: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            failed.extend(i for _ in range(20) if not torch.equal(model(images[i]), wanted[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
