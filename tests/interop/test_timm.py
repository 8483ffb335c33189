"""`accelerate` on timm's models and layers, against themselves."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
import torch.fx
from torch import Tensor, nn

from vertebra import explain
from vertebra import nn as ours
from vertebra.interop._swap import Swapped
from vertebra.interop.accelerate import accelerate, restore

pytestmark = pytest.mark.parity


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "var" in key else value.normal_(0, 0.3)
    return model.double()


def resnet(timm, block="Bottleneck", **options):
    from timm.models import resnet

    options = {"num_classes": 5, "channels": (8, 8, 16, 16), **options}
    layers = (1,) * len(options["channels"])
    return resnet.ResNet(getattr(resnet, block), layers, **options)


def regnet(timm, **options):
    from timm.models.regnet import RegNet, RegNetCfg

    rates = {k: options.pop(k) for k in ("drop_path_rate",) if k in options}
    shape = {"depth": 4, "w0": 8, "wa": 8, "wm": 1.7, "group_size": 4, "stem_width": 8}
    return RegNet(RegNetCfg(**{**shape, **options}), num_classes=5, **rates)


def convnext(timm, **options):
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 8, 16, 16), num_classes=5, **options)


def blur(channels, stride, **kwargs):
    from timm.layers import BlurPool2d

    return BlurPool2d(channels, stride=stride, **kwargs)


def frozen(timm, build, **options):
    from timm.layers import freeze_batch_norm_2d

    return freeze_batch_norm_2d(build(timm, **options))


# what is built, and the ops that it runs in eval mode
FAMILIES = {
    "resnet": (
        partial(resnet, block="BasicBlock"),
        {"batch_norm_act_pool": 1, "scale_bias_act": 8},
    ),
    "resnet_d": (
        partial(resnet, stem_type="deep", avg_down=True, act_layer=nn.SiLU),
        {"batch_norm_act_pool": 1, "scale_bias_act": 14},
    ),
    "resnet_blur": (
        partial(resnet, replace_stem_pool=True, aa_layer=blur),
        {"scale_bias_act": 14},
    ),
    "resnet_drop": (
        partial(resnet, block="BasicBlock", drop_block_rate=0.3, act_layer="gelu"),
        {"batch_norm_act_pool": 1, "scale_bias_act": 8},
    ),
    "seresnet": (
        partial(resnet, block_args={"attn_layer": "se"}),
        {"batch_norm_act_pool": 1, "scale_bias_act": 12, "squeeze_excite": 4},
    ),
    "seresnet_basic": (
        partial(resnet, block="BasicBlock", block_args={"attn_layer": "se"}),
        {"batch_norm_act_pool": 1, "scale_bias_act": 8, "squeeze_excite": 4},
    ),
    "resnet_group_norm": (partial(resnet, norm_layer="groupnorm1"), {}),
    "resnet_frozen": (
        partial(frozen, build=resnet),
        {"batch_norm_act_pool": 1, "scale_bias_act": 16},
    ),
    "regnetx": (regnet, {"scale_bias_act": 17}),
    "regnety": (
        partial(regnet, se_ratio=0.25, downsample="avg"),
        {"scale_bias_act": 17, "squeeze_excite": 4},
    ),
    "regnetz": (
        partial(regnet, linear_out=True, downsample=None, act_layer="silu", num_features=24),
        {"scale_bias_act": 14},
    ),
    "regnetv": (partial(regnet, preact=True), {"scale_bias_act": 12}),
    "regnet_frozen": (partial(frozen, build=regnet), {"scale_bias_act": 17}),
    "convnext": (convnext, {"layer_norm_2d": 5, "drop_path_add": 5}),
    "convnext_conv": (
        partial(convnext, conv_mlp=True, head_norm_first=True),
        {"layer_norm_2d": 10, "drop_path_add": 5},
    ),
    "convnextv2": (
        partial(convnext, use_grn=True, ls_init_value=None),
        {"layer_norm_2d": 5, "global_response_norm": 5},
    ),
    "convnextv2_conv": (
        partial(convnext, use_grn=True, conv_mlp=True),
        {"layer_norm_2d": 10, "drop_path_add": 5, "global_response_norm": 5},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def pair(family, timm) -> tuple[nn.Module, nn.Module]:
    """A model, and its twin that is accelerated."""
    model = randomised(FAMILIES[family][0](timm))
    return model, accelerate(copy.deepcopy(model))


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 64, 64, dtype=torch.double)


def trained(model: nn.Module) -> list[Tensor]:
    """Train for three steps; return what came out, the last gradients and the state."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    outputs = []
    for _ in range(3):
        y = model.train()(images())
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    outputs.append(model.eval()(images()).detach())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return outputs + gradients + list(model.state_dict().values())


def ops(model: nn.Module, x: Tensor) -> dict[str, int]:
    return dict(Counter(site.op for site in explain(model, x, bandwidth=1e9)))


def test_trains_and_infers_as_before(family, pair):
    model, accelerated = pair
    keys, parameters = list(accelerated.state_dict()), list(accelerated.parameters())
    assert accelerate(accelerated) is accelerated
    assert any(isinstance(m, Swapped) for m in accelerated.modules())
    torch.testing.assert_close(trained(accelerated), trained(model))
    assert restore(accelerated) is accelerated
    assert not any(isinstance(m, Swapped) for m in accelerated.modules())
    assert list(map(type, accelerated.modules())) == list(map(type, model.modules()))
    assert list(accelerated.state_dict()) == keys
    assert all(map(operator.is_, accelerated.parameters(), parameters))
    torch.testing.assert_close(trained(accelerated), trained(model))


def test_runs_our_ops(family, pair):
    model, accelerated = pair
    assert ops(model.eval(), images()) == {}
    assert ops(accelerated.eval(), images()) == FAMILIES[family][1]
    swapped = {type(m).__name__ for m in accelerated.modules() if isinstance(m, Swapped)}
    assert all(isinstance(m, Swapped) for m in accelerated.modules() if type(m).__name__ in swapped)
    assert all(map(isinstance, accelerated.modules(), map(type, model.modules())))


def test_hooks_see_what_they_saw(pair):
    """One module at a time is watched, in eval mode: the others stay fused around it."""
    model, accelerated = (m.eval() for m in pair)
    x = images(1)

    def watched(model: nn.Module, name: str) -> tuple[list[Tensor], Tensor]:
        seen = []
        hook = model.get_submodule(name).register_forward_hook(
            lambda module, args, y: seen.append(y.clone())
        )
        with hook, torch.no_grad():
            return seen, model(x)

    for name, _ in model.named_modules():
        torch.testing.assert_close(
            watched(accelerated, name),
            watched(model, name),
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_copies_stay_accelerated_and_pickles_do_not(pair):
    model, accelerated = (m.eval() for m in pair)
    x = images(1)
    expected = accelerated(x)
    twin = copy.deepcopy(accelerated)
    assert list(map(type, twin.modules())) == list(map(type, accelerated.modules()))
    assert torch.equal(twin(x), expected)
    loaded = pickle.loads(pickle.dumps(accelerated))
    assert list(map(type, loaded.modules())) == list(map(type, model.modules()))
    assert torch.equal(loaded(x), model(x))


def test_traces(pair):
    model, accelerated = (m.eval() for m in pair)
    x = images()
    torch.testing.assert_close(torch.fx.symbolic_trace(accelerated)(x), model(x))
