"""What fused networks save, by library and family: a table, held on kernels of ours and on CPUs."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.bench import peers
from vertebra.bench.small import Logits
from vertebra.interop import fuse, unfused
from vertebra.kernels._op import Call, observe
from vertebra.models import ConvNeXt, ConvNeXtConfig, RegNetConfig, ResNetConfig
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


def bottleneck(blocks: int) -> Saved:
    return Saved(pools=1, pairs=2, stems=1, adds=blocks)


def basic(blocks: int) -> Saved:
    return Saved(pools=1, stems=1, adds=blocks)


def x(blocks: int) -> Saved:
    return Saved(pools=1, pairs=2, adds=blocks)


def excited(blocks: int) -> Saved:
    """Return what a RegNetY saves: pairs of convolutions have an excitation in between."""
    return Saved(excitations=blocks, pools=1, adds=blocks)


def attended(blocks: int) -> Saved:
    """Return what an SE-ResNet saves, whose blocks end in the excitation and not a convolution."""
    return Saved(excitations=blocks, stems=1)


def next_(adds: int) -> Saved:
    """Return what a ConvNeXt saves: all blocks do, but what a stage of transformers is given."""
    return Saved(adds=adds)


# ---------------------------------------------------------------------------------- the networks


def _own_resnet(block: str, **options: Any) -> nn.Module:
    shape: dict[str, Any] = {"layers": (3, 1), "hidden_sizes": (32, 64), "num_classes": 5}
    return ResNet(ResNetConfig(block, **shape, **options))  # pyright: ignore[reportArgumentType]


def _own_regnet(kind: str, **options: Any) -> nn.Module:
    shape = {"hidden_sizes": (16, 24), "depths": (3, 1), "group_width": 8, "num_classes": 5}
    return RegNet(RegNetConfig(kind, **shape, **options))  # pyright: ignore[reportArgumentType]


def _own_convnext(**options: Any) -> nn.Module:
    return ConvNeXt(ConvNeXtConfig(depths=(3, 1), dims=(16, 24), num_classes=5, **options))


def _torchvision_convnext() -> nn.Module:
    convnext = peers.torchvision_module("models.convnext")
    stages = [convnext.CNBlockConfig(16, 24, 3), convnext.CNBlockConfig(24, None, 1)]
    return convnext.ConvNeXt(stages, num_classes=5)


def _timm_convnext(**options: Any) -> nn.Module:
    shape = {"depths": (3, 1, 1, 1), "dims": (16, 24, 24, 24), "num_classes": 5}
    return peers.timm().models.convnext.ConvNeXt(**shape, **options)


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


def _transformers(family: str, kind: str = "") -> nn.Module:
    transformers = peers.transformers()
    shape: dict[str, Any] = {"hidden_sizes": [16, 24], "depths": [3, 1], "num_labels": 5}
    shape |= {"groups_width": 8} if family == "RegNet" else {}
    shape |= {"layer_type": kind, "embedding_size": 8} if kind else {"num_stages": 2}
    config = getattr(transformers, f"{family}Config")(**shape)
    return Logits(getattr(transformers, f"{family}ForImageClassification")(config))


SE: dict[str, Any] = {"attn_layer": "se"}
V2: dict[str, Any] = {"use_grn": True, "ls_init_value": None}
NECK: dict[str, Any] = {"linear_out": True, "num_features": 24}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Saved]] = {
    "own: ResNet bottleneck": (lambda: _own_resnet("bottleneck"), bottleneck(4)),
    "own: ResNet basic": (lambda: _own_resnet("basic"), basic(4)),
    "own: SE-ResNet bottleneck": (lambda: _own_resnet("bottleneck", **SE), attended(4)),
    "own: SE-ResNet basic": (lambda: _own_resnet("basic", **SE), attended(4)),
    "own: RegNetX": (lambda: _own_regnet("x"), x(4)),
    "own: RegNetY": (lambda: _own_regnet("y"), excited(4)),
    "own: RegNetZ": (lambda: _own_regnet("y", **NECK), excited(4)),
    "torchvision: ResNet bottleneck": (lambda: _torchvision_resnet("Bottleneck"), bottleneck(6)),
    "torchvision: ResNet basic": (lambda: _torchvision_resnet("BasicBlock"), basic(6)),
    "torchvision: RegNetX": (lambda: _torchvision_regnet(), x(4)),
    "torchvision: RegNetY": (lambda: _torchvision_regnet(se_ratio=0.25), excited(4)),
    "timm: ResNet bottleneck": (lambda: _timm_resnet("Bottleneck"), bottleneck(6)),
    "timm: ResNet basic": (lambda: _timm_resnet("BasicBlock"), basic(6)),
    "timm: SE-ResNet bottleneck": (lambda: _timm_resnet("Bottleneck", **SE), attended(6)),
    "timm: SE-ResNet basic": (lambda: _timm_resnet("BasicBlock", **SE), attended(6)),
    "timm: RegNetX": (lambda: _timm_regnet(), x(6)),
    "timm: RegNetY": (lambda: _timm_regnet(se_ratio=0.25), excited(6)),
    "timm: RegNetZ": (lambda: _timm_regnet(se_ratio=0.25, **NECK), excited(6)),
    "transformers: ResNet bottleneck": (
        lambda: _transformers("ResNet", "bottleneck"),
        bottleneck(4),
    ),
    "transformers: ResNet basic": (lambda: _transformers("ResNet", "basic"), basic(4)),
    "transformers: RegNetX": (lambda: _transformers("RegNet", "x"), x(4)),
    "transformers: RegNetY": (lambda: _transformers("RegNet", "y"), excited(4)),
}

CONVNEXTS: dict[str, tuple[Callable[[], nn.Module], Saved]] = {
    "own: ConvNeXt": (lambda: _own_convnext(), next_(4)),
    "own: ConvNeXt V2": (lambda: _own_convnext(**V2), next_(4)),
    "torchvision: ConvNeXt": (lambda: _torchvision_convnext(), next_(4)),
    "timm: ConvNeXt": (lambda: _timm_convnext(), next_(6)),
    "timm: ConvNeXt V2": (lambda: _timm_convnext(**V2), next_(6)),
    "transformers: ConvNeXt": (lambda: _transformers("ConvNext"), next_(3)),
    "transformers: ConvNeXt V2": (lambda: _transformers("ConvNextV2"), next_(3)),
}


def _each_of(networks: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(name, marks=() if name.startswith("own") else pytest.mark.parity)
        for name in networks
    ]


@pytest.fixture
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Saved]:
    library = request.param.partition(":")[0]
    if library != "own":
        request.getfixturevalue(library)
    build, saved = (NETWORKS | CONVNEXTS)[request.param]
    return randomize(build()).eval(), saved


# ------------------------------------------------------------------------------------- the table


@contextmanager
def counting(path: Any) -> Generator[Counter[str]]:
    """Run on a backend; yield what is saved, but adds."""
    saved = Counter[str]()

    def note(call: Call) -> None:
        name, args = call.op.name, call.args
        with_shares = name == "squeeze_excite" and args[-1] is not None
        saved["excitations"] += name == "squeeze_gate" or with_shares
        saved["pools"] += name == "conv2d_act_pool" and not args[-2]
        saved["pairs"] += name == "conv2d_b2b"
        saved["stems"] += name == "batch_norm_act_pool"

    with vertebra.backend(path), observe(note):
        yield saved


@torch.no_grad()
def run(model: nn.Module, x: Tensor, path: Any) -> tuple[Tensor, Saved]:
    """Return the logits, and what was saved, but adds."""
    with counting(path) as saved:
        y = model(x)
    return y, Saved(**saved)


def assert_right(model: nn.Module, found: Tensor, x: Tensor) -> None:
    truth = run(copy.deepcopy(model).double(), x.double(), "eager")[0]
    eager = run(model, x, "eager")[0]
    error, theirs = ((y.double() - truth).norm() / truth.norm() for y in (found, eager))
    assert error <= 4 * (theirs + torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("network", _each_of(NETWORKS), indirect=True)
def test_on_kernels_of_ours(network: tuple[nn.Module, Saved], device: torch.device) -> None:
    (model, saved), x = network, torch.randn(3, 3, 33, 40, device=device)
    model = model.to(device)
    fused = fuse(model)
    assert not unfused(fused)
    found, counted = run(fused, x, "triton")
    assert counted == saved._replace(adds=0)
    assert_right(model, found, x)
    assert run(fused, x, "eager")[1]._replace(stems=0) == Saved()  # an op, which runs eagerly


@pytest.mark.usefixtures("on_onednn")
@pytest.mark.parametrize("network", _each_of(NETWORKS | CONVNEXTS), indirect=True)
def test_on_cpus(network: tuple[nn.Module, Saved], recordings: list[Any]) -> None:
    (model, saved), x = network, torch.randn(3, 3, 33, 40)
    fused = fuse(model)
    found, counted = run(fused, x, "auto")
    assert counted == Saved()
    assert_right(model, found, x)
    with torch.no_grad(), vertebra.backend("auto"):
        for _ in range(3):
            assert torch.equal(fused(x), found)
    called = Counter(str(call.op) for text in recordings for call in text.calls)
    assert called["mkldnn._convolution_pointwise_.binary"] == saved.adds


# ---------------------------------------------------------------------- who watches, and who asks

WATCHED = {  # what is between the last stage's map and the classifier, or holds that map
    "torchvision: RegNetY": ("trunk_output", "trunk_output.block2", "trunk_output.block2.block2-0"),
    "torchvision: RegNetX": ("avgpool", "trunk_output.block2.block2-0.f.c"),
    "timm: ResNet basic": ("layer4", "layer4.0", "global_pool", "global_pool.pool"),
    "timm: RegNetY": ("s4", "s4.b1", "s4.b1.conv3", "s4.b1.act3", "final_conv"),
    "timm: RegNetX": ("head", "head.global_pool", "head.global_pool.pool"),
    "timm: RegNetZ": ("final_conv", "final_conv.conv", "final_conv.bn", "head.global_pool"),
    "transformers: ResNet basic": ("model.resnet", "model.resnet.encoder", "model.resnet.pooler"),
    "transformers: RegNetY": (
        "model.regnet.encoder.stages.1",
        "model.regnet.encoder.stages.1.layers",
    ),
}


@pytest.mark.parity
@pytest.mark.parametrize("name", WATCHED)
def test_a_map_that_is_watched_is_there(name: str, device: torch.device, request: Any) -> None:
    request.getfixturevalue(name.partition(":")[0])
    model, x = (
        randomize(NETWORKS[name][0]()).eval().to(device),
        torch.randn(1, 3, 33, 40).to(device),
    )
    fused = fuse(model)
    for path in WATCHED[name]:
        seen: list[list[torch.Size]] = []

        def note(module: nn.Module, args: Any, y: Any, seen: Any = seen) -> None:
            tensors = (*args, y if isinstance(y, Tensor) else y[0])
            seen.append([t.shape for t in tensors if isinstance(t, Tensor)])

        hook = fused.get_submodule(path).register_forward_hook(note)
        found, saved = run(fused, x, "triton")
        run(fused, x, "eager")
        hook.remove()
        assert saved.pools == 0, path
        assert len(seen) == 2, path
        assert seen[0] == seen[1], path
        assert_right(model, found, x)
    assert run(fused, x, "triton")[1].pools == 1


@torch.no_grad()
@pytest.mark.parity
@pytest.mark.parametrize("name", ["transformers: ResNet basic", "transformers: RegNetY"])
def test_what_transformers_is_asked_for(name: str, device: torch.device, request: Any) -> None:
    """States, a loss and tuples are as ever; the logits alone come without the last map."""
    request.getfixturevalue("transformers")
    own = randomize(NETWORKS[name][0]()).eval().to(device).model
    fused, x = fuse(own), torch.randn(3, 3, 33, 40, device=device)
    labels = torch.tensor([0, 2, 1], device=device)
    asks: list[dict[str, Any]] = [
        {},
        {"output_hidden_states": True},
        {"labels": labels},
        {"return_dict": False},
        {"return_dict": False, "output_hidden_states": True, "labels": labels},
    ]
    for ask in asks:
        expected = own(x, **ask)
        with counting("triton") as saved:
            found = fused(pixel_values=x, **ask)
        assert type(found) is type(expected)
        assert saved["pools"] == (not ask)
        if isinstance(found, dict):
            assert list(found) == list(expected)
            found, expected = found.to_tuple(), expected.to_tuple()  # pyright: ignore
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parity
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "fast", ""])
def test_pools_of_timm(pool: str, timm: Any, device: torch.device) -> None:
    """A mean is taken by the convolution; any other pool, and none, reads the map."""
    resnet, x = timm.models.resnet, torch.randn(2, 3, 33, 40, device=device)
    shape: dict[str, Any] = {"channels": (8, 8, 8, 8), "global_pool": pool}
    classes = 5 if pool else 0
    model = resnet.ResNet(resnet.BasicBlock, (1,) * 4, num_classes=classes, **shape)
    model = randomize(model).eval().to(device)
    found, saved = run(fuse(model), x, "triton")
    assert saved.pools == (pool == "avg")
    assert_right(model, found, x)


@torch.no_grad()
@pytest.mark.parity
@pytest.mark.parametrize("name", ["timm: RegNetX", "transformers: ResNet bottleneck"])
def test_they_are_modules_like_any_other(name: str, device: torch.device, request: Any) -> None:
    request.getfixturevalue(name.partition(":")[0])
    fused = fuse(randomize(NETWORKS[name][0]()).eval().to(device))
    x = torch.randn(1, 3, 33, 40, device=device)
    y, saved = run(fused, x, "triton")
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        again = run(twin, x, "triton")
        assert torch.equal(again[0], y)
        assert again[1] == saved
    if name.startswith("timm"):
        with vertebra.backend("triton"):
            assert fused.forward_features(x).shape[2:] == (2, 2)
            assert fused.forward_intermediates(x)[0].shape[2:] == (2, 2)
            torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), y)
    with vertebra.backend("triton"):
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), y)
