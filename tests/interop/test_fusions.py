"""What fused networks save, by library and family: a table, held on kernels of ours and on CPUs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.bench import peers
from vertebra.bench.small import Logits
from vertebra.interop import fuse, unfused
from vertebra.kernels import _spare
from vertebra.kernels._op import Call, observe
from vertebra.models import RegNetConfig, ResNetConfig
from vertebra.models.regnet import RegNet
from vertebra.models.resnet import ResNet
from vertebra.testing.parity import randomize


class Saved(NamedTuple):
    """How often, in a network with three blocks in one stage, not the last, and one in others."""

    excitations: int = 0
    """Squeezes and excitations whose means a convolution leaves."""
    pools: int = 0
    """Convolutions that leave the means of a map, and no map."""
    pairs: int = 0
    """Convolutions at the end of a block that run with the one at the start of the next."""
    stems: int = 0
    """Stems that add the bias, act and pool in one pass."""
    adds: int = 0
    """On CPUs: residual adds in the place of the residual."""


BOTTLENECK = Saved(pools=1, pairs=2, stems=1, adds=2)
BASIC = Saved(pools=1, stems=1, adds=2)
X = Saved(pools=1, pairs=2, adds=2)


def excited(blocks: int) -> Saved:
    """Return what a RegNetY saves: pairs of convolutions have an excitation in between."""
    return Saved(excitations=blocks, pools=1, adds=2)


def attended(blocks: int) -> Saved:
    """Return what an SE-ResNet saves, whose blocks end in the excitation and not a convolution."""
    return Saved(excitations=blocks, stems=1)


# ---------------------------------------------------------------------------------- the networks


def _own_resnet(block: str, **options: Any) -> nn.Module:
    shape: dict[str, Any] = {"layers": (3, 1), "hidden_sizes": (32, 64), "num_classes": 5}
    return ResNet(ResNetConfig(block, **shape, **options))  # pyright: ignore[reportArgumentType]


def _own_regnet(kind: str, **options: Any) -> nn.Module:
    shape = {"hidden_sizes": (16, 24), "depths": (3, 1), "group_width": 8, "num_classes": 5}
    return RegNet(RegNetConfig(kind, **shape, **options))  # pyright: ignore[reportArgumentType]


def _torchvision_resnet(block: str) -> nn.Module:
    resnet = peers.torchvision_module("models.resnet")
    return resnet.ResNet(getattr(resnet, block), (3, 1, 1, 1), num_classes=5)


def _torchvision_regnet(**options: Any) -> nn.Module:
    regnet = peers.torchvision_module("models.regnet")
    blocks = regnet.BlockParams([3, 1], [16, 24], [8, 8], [1.0, 1.0], [2, 2], **options)
    return regnet.RegNet(blocks, num_classes=5)


def _timm_resnet(block: str, **options: Any) -> nn.Module:
    resnet = peers.timm().models.resnet
    shape: dict[str, Any] = {"channels": (8, 8, 8, 8), "num_classes": 5}
    return resnet.ResNet(getattr(resnet, block), (3, 1, 1, 1), block_args=options, **shape)


def _timm_regnet(**options: Any) -> nn.Module:
    regnet = peers.timm().models.regnet
    shape = {"depth": 6, "w0": 8, "wa": 8, "wm": 2.0, "group_size": 4, "stem_width": 8}
    return regnet.RegNet(regnet.RegNetCfg(**{**shape, "se_ratio": 0.0, **options}), num_classes=5)


def _transformers(family: str, kind: str) -> nn.Module:
    transformers = peers.transformers()
    shape = {"hidden_sizes": [16, 24], "depths": [3, 1], "num_labels": 5, "embedding_size": 8}
    shape |= {"groups_width": 8} if family == "RegNet" else {}
    config = getattr(transformers, f"{family}Config")(layer_type=kind, **shape)
    return Logits(getattr(transformers, f"{family}ForImageClassification")(config))


SE: dict[str, Any] = {"attn_layer": "se"}
NECK: dict[str, Any] = {"linear_out": True, "num_features": 24}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Saved]] = {
    "own: ResNet bottleneck": (lambda: _own_resnet("bottleneck"), BOTTLENECK),
    "own: ResNet basic": (lambda: _own_resnet("basic"), BASIC),
    "own: SE-ResNet bottleneck": (lambda: _own_resnet("bottleneck", **SE), attended(4)),
    "own: SE-ResNet basic": (lambda: _own_resnet("basic", **SE), attended(4)),
    "own: RegNetX": (lambda: _own_regnet("x"), X),
    "own: RegNetY": (lambda: _own_regnet("y"), excited(4)),
    "own: RegNetZ": (lambda: _own_regnet("y", **NECK), excited(4)),
    "torchvision: ResNet bottleneck": (lambda: _torchvision_resnet("Bottleneck"), BOTTLENECK),
    "torchvision: ResNet basic": (lambda: _torchvision_resnet("BasicBlock"), BASIC),
    "torchvision: RegNetX": (lambda: _torchvision_regnet(), X),
    "torchvision: RegNetY": (lambda: _torchvision_regnet(se_ratio=0.25), excited(4)),
    "timm: ResNet bottleneck": (lambda: _timm_resnet("Bottleneck"), BOTTLENECK),
    "timm: ResNet basic": (lambda: _timm_resnet("BasicBlock"), BASIC),
    "timm: SE-ResNet bottleneck": (lambda: _timm_resnet("Bottleneck", **SE), attended(6)),
    "timm: SE-ResNet basic": (lambda: _timm_resnet("BasicBlock", **SE), attended(6)),
    "timm: RegNetX": (lambda: _timm_regnet(), X),
    "timm: RegNetY": (lambda: _timm_regnet(se_ratio=0.25), excited(6)),
    "timm: RegNetZ": (lambda: _timm_regnet(se_ratio=0.25, **NECK), excited(6)),
    "transformers: ResNet bottleneck": (lambda: _transformers("ResNet", "bottleneck"), BOTTLENECK),
    "transformers: ResNet basic": (lambda: _transformers("ResNet", "basic"), BASIC),
    "transformers: RegNetX": (lambda: _transformers("RegNet", "x"), X),
    "transformers: RegNetY": (lambda: _transformers("RegNet", "y"), excited(4)),
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name.startswith("own") else pytest.mark.parity)
        for name in NETWORKS
    ]
)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Saved]:
    library = request.param.partition(":")[0]
    if library != "own":
        request.getfixturevalue(library)
    build, saved = NETWORKS[request.param]
    return randomize(build()).eval(), saved


# ------------------------------------------------------------------------------------- the table


@torch.no_grad()
def run(model: nn.Module, x: Tensor, path: Any) -> tuple[Tensor, Saved]:
    """Return the logits, and what was saved but adds."""
    excitations = pools = pairs = stems = 0

    def note(call: Call) -> None:
        nonlocal excitations, pools, pairs, stems
        name, args = call.op.name, call.args
        excitations += name == "squeeze_gate" or (name == "squeeze_excite" and args[-1] is not None)
        pools += name == "conv2d_act_pool" and not args[-2]
        pairs += name == "conv2d_b2b"
        stems += name == "batch_norm_act_pool"

    with vertebra.backend(path), observe(note):
        return model(x), Saved(excitations, pools, pairs, stems)


def assert_right(model: nn.Module, found: Tensor, x: Tensor) -> None:
    truth = run(copy.deepcopy(model).double(), x.double(), "eager")[0]
    eager = run(model, x, "eager")[0]
    error, theirs = ((y.double() - truth).norm() / truth.norm() for y in (found, eager))
    assert error <= 4 * (theirs + torch.finfo(x.dtype).eps)


def test_on_kernels_of_ours(network: tuple[nn.Module, Saved], device: torch.device) -> None:
    (model, saved), x = network, torch.randn(3, 3, 33, 40, device=device)
    model = model.to(device)
    fused = fuse(model)
    assert not unfused(fused)
    found, counted = run(fused, x, "triton")
    assert counted == saved._replace(adds=0)
    assert_right(model, found, x)
    assert run(fused, x, "eager")[1] == Saved()


@pytest.fixture
def overwritten(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The places of the maps that were overwritten, on the CPU as it is outside of the tests."""
    found: list[int] = []
    take = _spare.take

    def noting(residual: Tensor) -> bool:
        taken = take(residual)
        found.extend([residual.data_ptr()] if taken else [])
        return taken

    monkeypatch.setattr(_spare, "take", noting)
    for name, module in list(sys.modules.items()):
        if name.startswith("vertebra.kernels.") and hasattr(module, "INTERPRETED"):
            monkeypatch.setattr(module, "INTERPRETED", False)
    with vertebra.backend("auto"):
        yield found


def test_on_cpus(
    network: tuple[nn.Module, Saved], overwritten: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, saved), x = network, torch.randn(3, 3, 33, 40)
    fused = fuse(model)
    found, counted = run(fused, x, "auto")
    assert counted == Saved()
    assert len(overwritten) == saved.adds
    assert_right(model, found, x)
    monkeypatch.setattr(_spare, "take", lambda residual: False)
    assert torch.equal(run(fused, x, "auto")[0], found)
