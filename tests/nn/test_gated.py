"""Passes that fused networks save: on kernels of ours, and nowhere else, with the same answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.interop import fuse
from vertebra.kernels._op import observe
from vertebra.models import RegNetConfig, ResNetConfig
from vertebra.models.regnet import RegNet
from vertebra.models.resnet import ResNet
from vertebra.testing.parity import randomize

CLASSES = {"num_classes": 10}
REGNET: dict[str, Any] = {"hidden_sizes": (16, 32), "depths": (1, 1), "group_width": 8, **CLASSES}
RESNET: dict[str, Any] = {"layers": (1, 1), "hidden_sizes": (32, 64), **CLASSES}


def regnet(**options: Any) -> nn.Module:
    return randomize(RegNet(RegNetConfig(**{"layer_type": "y", **REGNET, **options}))).eval()


def resnet(**options: Any) -> nn.Module:
    return randomize(ResNet(ResNetConfig(**{"block": "bottleneck", **RESNET, **options}))).eval()


MODELS: dict[str, tuple[Any, dict[str, int]]] = {
    # two blocks, a gate in each; the last convolution pools
    "RegNetY": (regnet, {"conv2d_act_pool": 4, "squeeze_gate": 2}),
    "RegNetY, silu": (
        lambda: regnet(act_layer="silu"),
        {"conv2d_act_pool": 4, "squeeze_gate": 2},
    ),
    "RegNetX": (lambda: regnet(layer_type="x"), {"conv2d_act_pool": 1}),
    "RegNetY with a neck": (
        lambda: regnet(linear_out=True, num_features=24),
        {"conv2d_act_pool": 5, "squeeze_gate": 2},
    ),
    "ResNet-50": (resnet, {"batch_norm_act_pool": 1, "conv2d_act_pool": 1}),
    "ResNet-18": (
        lambda: resnet(block="basic"),
        {"batch_norm_act_pool": 1, "conv2d_act_pool": 1},
    ),
    "SE-ResNet": (
        lambda: resnet(attn_layer="se"),
        # two gates behind the last convolutions of blocks, which read their maps once
        {
            **{"batch_norm_act_pool": 1, "conv2d_act_pool": 2, "squeeze_excite": 2},
            "global_avg_pool": 1,
        },
    ),
    "SE-ResNet, basic, silu": (
        lambda: resnet(block="basic", attn_layer="se", act_layer="silu"),
        {
            **{"batch_norm_act_pool": 1, "conv2d_act_pool": 2, "squeeze_excite": 2},
            "global_avg_pool": 1,
        },
    ),
}


def passes(model: nn.Module, x: Tensor, path: Any = "auto") -> tuple[Tensor, dict[str, int]]:
    """Return the logits, and how often each op ran, but for plain convolutions."""
    seen: dict[str, int] = {}

    def note(call: Any) -> None:
        if call.op.name != "conv2d_act":
            seen[call.op.name] = seen.get(call.op.name, 0) + 1

    with torch.no_grad(), vertebra.backend(path), observe(note):
        return model(x), seen


def assert_right(model: nn.Module, found: Tensor, x: Tensor) -> None:
    truth = passes(copy.deepcopy(model).double(), x.double(), "eager")[0]
    eager = passes(model, x, "eager")[0]
    error, theirs = ((y.double() - truth).norm() / truth.norm() for y in (found, eager))
    assert error <= 4 * (theirs + torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("name", MODELS)
def test_networks(name: str, device) -> None:
    make, ops = MODELS[name]
    model, x = make().to(device), torch.randn(3, 3, 40, 33, device=device)
    fused = fuse(model)
    found, seen = passes(fused, x, "triton")
    assert seen == ops
    assert_right(model, found, x)


def test_a_mean_of_many_parts(device) -> None:
    """The last map has 90 pixels, and so two shares."""
    model = regnet(layer_type="x").to(device)
    x = torch.randn(2, 3, 80, 72, device=device)
    x[..., :32, :] *= 4  # parts are not alike
    found, seen = passes(fuse(model), x, "triton")
    assert seen == {"conv2d_act_pool": 1}
    assert_right(model, found, x)


def test_nothing_changes_elsewhere(device) -> None:
    """Eager: as if there were no such ops."""
    fused, x = fuse(regnet().to(device)), torch.randn(2, 3, 40, 33, device=device)
    _, seen = passes(fused, x, "eager")
    assert seen == {"squeeze_excite": 2, "global_avg_pool": 1}
    assert passes(regnet().to(device), x, "triton")[1].keys() >= {"squeeze_excite"}


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        # watched: the excitation of the first block, what it scales, its gate, the pool, a block
        ("trunk_output.block1.block1-0.f.se", {"squeeze_excite": 1, "conv2d_act_pool": 2}),
        ("trunk_output.block1.block1-0.f.b", {"squeeze_excite": 1, "conv2d_act_pool": 2}),
        ("trunk_output.block1.block1-0.f.b.0", {"squeeze_excite": 1, "conv2d_act_pool": 2}),
        ("trunk_output.block1.block1-0.f.c", {"squeeze_excite": 1, "conv2d_act_pool": 2}),
        ("trunk_output.block1.block1-0.f.se.fc1", {"conv2d_act_pool": 2}),
        ("trunk_output.block1.block1-0.f.se.gate", {"conv2d_act_pool": 2}),
        ("avgpool", {"global_avg_pool": 1, "conv2d_act_pool": 4}),
        ("trunk_output.block2.block2-0", {"global_avg_pool": 1, "conv2d_act_pool": 4}),
        ("trunk_output.block2", {"global_avg_pool": 1, "conv2d_act_pool": 4}),
        ("trunk_output.block2.block2-0.activation", {"global_avg_pool": 1, "conv2d_act_pool": 4}),
    ],
)
def test_hooks_see_what_they_are_promised(name: str, ops: dict[str, int], device) -> None:
    model, x = regnet().to(device), torch.randn(2, 3, 40, 33, device=device)
    fused, seen = fuse(model), []
    fused.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y.shape))
    found, counted = passes(fused, x, "triton")
    assert len(seen) == 1
    assert {op: counted.get(op, 0) for op in ops} == ops
    assert_right(model, found, x)
    shapes = list(seen)
    passes(fused, x, "eager")
    assert seen == shapes * 2


@pytest.mark.parametrize("name", ["conv3", "bn3", "relu", "se", "se.fc1", "se.gate"])
def test_hooks_at_the_end_of_a_block(name: str, device) -> None:
    model, x = resnet(attn_layer="se").to(device), torch.randn(1, 3, 40, 33, device=device)
    fused, seen = fuse(model), []
    module = fused.get_submodule(f"layer1.0.{name}")
    module.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    found, counted = passes(fused, x, "triton")
    assert counted["conv2d_act_pool"] == 1  # of the other block
    assert_right(model, found, x)
    shapes = list(seen)
    assert shapes
    passes(fused, x, "eager")
    assert seen == shapes * 2


@pytest.mark.parametrize("name", ["maxpool", "conv1", "bn1", "relu"])
def test_a_stem_that_is_watched_pools_by_itself(name: str, device) -> None:
    model, x = resnet().to(device), torch.randn(2, 3, 40, 33, device=device)
    fused, seen = fuse(model), []
    fused.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y.shape))
    found, counted = passes(fused, x, "triton")
    assert seen
    assert "batch_norm_act_pool" not in counted
    assert_right(model, found, x)


def test_a_stem_that_normalises_its_image(device) -> None:
    model, x = resnet().to(device), torch.rand(2, 3, 40, 33, device=device)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    found, counted = passes(fuse(model, mean=mean, std=std), x, "triton")
    assert counted["batch_norm_act_pool"] == 1
    centred = x - torch.tensor(mean, device=device)[:, None, None]
    assert_right(model, found, centred / torch.tensor(std, device=device)[:, None, None])


def test_a_gate_before_another_kernel(device, monkeypatch) -> None:
    """The first convolution is ours, the second not: x is scaled, and nothing is pooled."""
    from vertebra.nn import FusedConv2d

    by_image = FusedConv2d.by_image

    def without_gates(self, *args, gate=None, **kwargs):
        return by_image(self, *args, **kwargs) if gate is None else None

    monkeypatch.setattr(FusedConv2d, "by_image", without_gates)
    model, x = regnet().to(device), torch.randn(2, 3, 40, 33, device=device)
    found, seen = passes(fuse(model), x, "triton")
    assert seen == {"conv2d_act_pool": 2, "squeeze_gate": 2, "global_avg_pool": 1}
    assert_right(model, found, x)


def test_modules_stay_normal(device) -> None:
    x = torch.randn(2, 3, 40, 33, device=device)
    fused = fuse(regnet().to(device))
    expected, ops = passes(fused, x, "triton")
    twin = copy.deepcopy(fused)
    twin.load_state_dict(fused.state_dict())
    found, seen = passes(twin, x, "triton")
    assert torch.equal(found, expected)
    assert seen == ops
    traced = torch.fx.symbolic_trace(fused)
    torch.testing.assert_close(passes(traced, x, "triton")[0], expected)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)


def test_features_are_maps(device) -> None:
    x = torch.randn(2, 3, 40, 33, device=device)
    fused = fuse(regnet().to(device))
    with torch.no_grad(), vertebra.backend("triton"):
        assert fused.forward_features(x).dim() == 4
        last, (feature,) = fused.forward_intermediates(x, 1)
    assert last.shape == feature.shape
