"""Blocks that add in the place of their input do so only where nobody else has it."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.bench import peers
from vertebra.bench.small import Logits
from vertebra.kernels import _spare
from vertebra.models import RegNet, ResNet
from vertebra.models._regnet_config import RegNetConfig
from vertebra.models._resnet_config import ResNetConfig
from vertebra.nn.fused_blocks import FusedBlocks
from vertebra.testing.parity import randomize

Seen = list[Tensor]
"""Maps that somebody kept."""


@pytest.fixture(autouse=True)
def _on_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as it is outside of the tests: kernels are not interpreted."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vertebra.kernels.") and hasattr(module, "INTERPRETED"):
            monkeypatch.setattr(module, "INTERPRETED", False)
    with vertebra.backend("auto"):
        yield


@pytest.fixture
def overwritten(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places of the maps that were overwritten."""
    found: list[int] = []
    take = _spare.take

    def noting(residual: Tensor) -> bool:
        taken = take(residual)
        found.extend([residual.data_ptr()] if taken else [])
        return taken

    monkeypatch.setattr(_spare, "take", noting)
    return found


def resnet() -> nn.Module:
    config = ResNetConfig(block="bottleneck", layers=(2, 3), hidden_sizes=(8, 16), num_classes=10)
    return ResNet(config)


def basic() -> nn.Module:
    return ResNet(ResNetConfig(block="basic", layers=(3,), hidden_sizes=(16,), num_classes=10))


def regnet() -> nn.Module:
    config = RegNetConfig("y", hidden_sizes=(16, 32), depths=(1, 3), group_width=8, num_classes=10)
    return RegNet(config)


OWN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (resnet, 3),
    "basic": (basic, 2),
    "regnet": (regnet, 2),
}


def timm_regnet() -> nn.Module:
    regnet = peers.timm().models.regnet
    shape = {"depth": 6, "w0": 8, "wa": 8, "wm": 2.0, "group_size": 4, "stem_width": 8}
    return regnet.RegNet(regnet.RegNetCfg(**shape, se_ratio=0.0), num_classes=5)


def transformers_resnet() -> nn.Module:
    transformers = peers.transformers()
    shape = {"hidden_sizes": [16, 24], "depths": [1, 3], "num_labels": 5, "embedding_size": 8}
    config = transformers.ResNetConfig(layer_type="bottleneck", **shape)
    return Logits(transformers.ResNetForImageClassification(config))


PEERS: dict[str, Callable[[], nn.Module]] = {  # whose shortcuts are modules
    "timm": timm_regnet,
    "transformers": transformers_resnet,
}


def fused(name: str) -> nn.Module:
    torch.manual_seed(0)
    build = PEERS[name] if name in PEERS else OWN[name][0]
    return vertebra.fuse(randomize(build()).eval())


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the model computes where nothing is offered."""
    return never_offering(copy.deepcopy(model))(x)


def never_offering(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, FusedBlocks):
            module.__class__ = nn.Sequential
    return model


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 40, 33)


@torch.no_grad()
@pytest.mark.parametrize("name", OWN)
def test_all_but_the_first_block_overwrite(name, overwritten):
    model = fused(name)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        overwritten.clear()
        assert_overwrites(twin, overwritten, OWN[name][1])


def assert_overwrites(model: nn.Module, overwritten: list[int], times: int) -> None:
    x = image()
    wanted = exact(model, x)
    assert torch.equal(model(x), wanted)
    assert len(overwritten) == times


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
@pytest.mark.parametrize("how", [*WATCHERS, "recorder"])
@pytest.mark.parametrize(
    "name",
    ["resnet", "regnet", *(pytest.param(name, marks=pytest.mark.parity) for name in PEERS)],
)
def test_what_somebody_keeps_stays(name, how, request):
    """Whatever watches any module of a network, it has kept what it would have without offers."""
    if name in PEERS:
        request.getfixturevalue(name)
    x, model = image(), fused(name)
    last = [path for path, m in model.named_modules() if isinstance(m, FusedBlocks)][-1]
    for path in [path for path, _ in model.named_modules() if path.startswith(last)]:
        kept: list[Seen] = []
        for watched in (copy.deepcopy(model), never_offering(copy.deepcopy(model))):
            seen: Seen = []
            if how == "recorder":
                parent, _, child = path.rpartition(".")
                module = watched.get_submodule(path)
                setattr(watched.get_submodule(parent), child, Recorder(module, seen))
            else:
                WATCHERS[how](watched.get_submodule(path), seen)
            watched(x)
            kept.append(seen)
        for found, wanted in zip(*kept, strict=True):
            assert torch.equal(found, wanted), path


@torch.no_grad()
def test_blocks_called_by_hand_keep_their_inputs(overwritten):
    model = fused("resnet")
    stage = next(m for m in model.modules() if isinstance(m, FusedBlocks) and len(m) == 3)
    x = torch.randn(2, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    kept: list[Tensor] = [x]
    for block in stage:
        kept.append(block(kept[-1]))
    copies = [t.clone() for t in kept]
    assert torch.equal(stage(x), kept[-1])
    assert len(overwritten) == 2
    assert all(map(torch.equal, kept, copies))


def test_with_gradients_of_the_image_nothing_is_overwritten(overwritten):
    model, x = fused("resnet"), image().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert not overwritten


@torch.no_grad()
def test_what_the_convolution_reads_itself_is_not_overwritten(overwritten):
    conv = vertebra.fuse(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)).eval())[0]
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    wanted = conv(x.clone(memory_format=torch.preserve_format), residual=x, act="relu")
    before = x.clone()
    with _spare.offered(x):
        found = conv(x, residual=x, act="relu")
    assert torch.equal(found, wanted)
    assert torch.equal(x, before)


@torch.no_grad()
def test_only_what_is_offered_is_taken():
    x, other = torch.ones(1), torch.ones(1)
    assert not _spare.take(x)
    with _spare.offered(x):
        assert not _spare.take(other)
        with _spare.offered(other):
            assert not _spare.take(x)
            assert _spare.take(other)
            assert not _spare.take(other)
        assert _spare.take(x)
    with pytest.raises(KeyError), _spare.offered(x):
        raise KeyError
    assert not _spare.take(x)
