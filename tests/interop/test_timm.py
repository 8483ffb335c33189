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
    return torch.randn(n, 3, 32, 32, dtype=torch.double)


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


WATCHED = ["resnet_drop", "seresnet", "regnety", "convnextv2_conv"]
OTHERS = [
    pytest.param(name, marks=pytest.mark.thorough) for name in FAMILIES if name not in WATCHED
]


@pytest.mark.parametrize("family", [*WATCHED, *OTHERS], indirect=True)
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
        seen, expected = watched(accelerated, name), watched(model, name)
        torch.testing.assert_close(seen, expected, msg=lambda text, name=name: f"{name}: {text}")


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


def layers(name: str) -> tuple[nn.Module, Tensor]:
    """A module by itself, in training, and its input."""
    from timm import layers as timm_layers

    options = {
        "BatchNormAct2d": {"act_layer": nn.SiLU, "drop_layer": partial(nn.Dropout, 0.5)},
        "FrozenBatchNormAct2d": {"act_layer": "gelu"},
        "SEModule": {"rd_ratio": 0.25, "gate_layer": "hard_sigmoid"},
        "GlobalResponseNorm": {"channels_last": False},
        "LayerScale2d": {"init_values": 0.7},
        "DropPath": {"drop_prob": 1.0},
        "DropBlock2d": {"drop_prob": 0.4, "block_size": 3, "couple_channels": False},
        "GELU": {},
        "Sigmoid": {"inplace": True},
    }
    args = () if name in ("DropPath", "DropBlock2d", "GELU", "Sigmoid") else (16,)
    where = timm_layers.grn if name == "GlobalResponseNorm" else timm_layers
    module = getattr(where, name)(*args, **options.get(name, {}))
    dtype = torch.float if name == "LayerNorm2dFp32" else torch.double
    return randomised(module).to(dtype).train(), torch.randn(3, 16, 6, 6, dtype=dtype)


LAYERS = {
    "BatchNormAct2d": "batch_norm_act",
    "FrozenBatchNormAct2d": "scale_bias_act",
    "SEModule": "squeeze_excite",
    "LayerNorm2d": "layer_norm_2d",
    "LayerNorm2dFp32": "layer_norm_2d",
    "GlobalResponseNorm": "global_response_norm",
    "LayerScale2d": "drop_path_add",
    "DropPath": "drop_path_add",
    "DropBlock2d": None,
    "GELU": None,
    "Sigmoid": None,
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_by_itself(name, timm):
    module, x = layers(name)
    accelerated = accelerate(copy.deepcopy(module))
    assert isinstance(accelerated, Swapped)
    assert isinstance(accelerated, type(module))
    assert set(ops(accelerated, x.clone())) == ({LAYERS[name]} if LAYERS[name] else set())

    def run(module: nn.Module) -> list[Tensor | None]:
        torch.manual_seed(1)
        z = x.clone().requires_grad_()
        y = module(z.clone())  # some write to their input
        y.square().sum().backward()
        state = [value for value in module.state_dict().values()]
        return [y, z.grad, *(p.grad for p in module.parameters()), *state]

    torch.testing.assert_close(run(accelerated), run(module))
    torch.testing.assert_close(run(accelerated.eval()), run(module.eval()))
    assert torch.fx.symbolic_trace(accelerated)(x.clone()).equal(accelerated(x.clone()))


def blocks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Blocks whose branch is dropped while they train, and their input."""
    from timm.layers import DropPath, SEModule
    from timm.models import convnext, regnet, resnet

    drop = {"drop_path": DropPath(0.5)}
    se = {"attn_layer": partial(SEModule, rd_channels=4)}
    made = {
        "basic": resnet.BasicBlock(8, 8, **drop),
        "bottleneck": resnet.Bottleneck(8, 2, **drop),
        "bottleneck_se": resnet.Bottleneck(8, 2, **drop, **se),
        "regnet": regnet.Bottleneck(8, 8, group_size=4, drop_path_rate=0.5),
        "convnext": convnext.ConvNeXtBlock(8, ls_init_value=0.5, drop_path=0.5),
        "convnextv2": convnext.ConvNeXtBlock(8, ls_init_value=None, use_grn=True, drop_path=0.5),
    }
    return {
        name: (randomised(block), torch.randn(16, 8, 5, 5).double()) for name, block in made.items()
    }


BLOCKS = ["basic", "bottleneck", "bottleneck_se", "regnet", "convnext", "convnextv2"]


class Twice(nn.Module):
    """What a sample becomes that is kept with probability one half."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_stochastic_depth_keeps_or_drops_each_sample(name, scales, timm):
    block, x = blocks()[name]
    block.drop_path.scale_by_keep = scales
    accelerated = accelerate(copy.deepcopy(block)).eval()
    torch.testing.assert_close(accelerated(x), block.eval()(x))
    accelerated.train()

    def with_path(path: nn.Module) -> Tensor:
        twin = copy.deepcopy(block).train()
        twin.drop_path = path
        return twin(x)

    kept = with_path(Twice() if scales else nn.Identity())
    dropped = with_path(type(block.drop_path)(1.0))
    y = accelerated(x)
    is_kept = (y - kept).abs().amax((1, 2, 3)) < 1e-9
    is_dropped = (y - dropped).abs().amax((1, 2, 3)) < 1e-9
    assert (is_kept ^ is_dropped).all()
    assert 0 < is_kept.sum() < len(x)
    assert ops(accelerated, x)["drop_path_add"] == 1


def test_the_ends_of_blocks_are_one_op_while_training(timm):
    found = {name: ops(accelerate(block).train(), x) for name, (block, x) in blocks().items()}
    assert found == {
        "basic": {"batch_norm_act": 2, "drop_path_add": 1},
        "bottleneck": {"batch_norm_act": 3, "drop_path_add": 1},
        "bottleneck_se": {"batch_norm_act": 3, "squeeze_excite": 1, "drop_path_add": 1},
        "regnet": {"batch_norm_act": 3, "squeeze_excite": 1, "drop_path_add": 1},
        "convnext": {"drop_path_add": 1},
        "convnextv2": {"global_response_norm": 1, "drop_path_add": 1},
    }


def test_checkpoints_as_before(timm):
    model = randomised(resnet(timm))
    model.set_grad_checkpointing()
    accelerated = accelerate(copy.deepcopy(model))
    # recomputing, timm counts the last batch of every block again, and its op is not run to the end
    expected = [value for value in trained(model) if value.is_floating_point()]
    found = [value for value in trained(accelerated) if value.is_floating_point()]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_features_only(name, timm):
    model = randomised(timm.create_model(name, features_only=True)).eval()
    accelerated = accelerate(copy.deepcopy(model))
    x = images(1)
    torch.testing.assert_close(accelerated(x), model(x))
    assert ops(accelerated, x)


def test_features_by_name_of_node(timm):
    from torchvision.models.feature_extraction import create_feature_extractor

    model = randomised(resnet(timm)).eval()
    nodes = ["act1", "layer2", "layer4.0.bn1"]
    expected = create_feature_extractor(model, nodes)(images(1).fill_(0.5))
    found = create_feature_extractor(accelerate(model), nodes)(images(1).fill_(0.5))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["seresnet", "regnety", "convnextv2_conv"])
def test_autocast_is_no_less_precise(name, timm):
    model = randomised(FAMILIES[name][0](timm)).eval()
    x = images()
    exact = model(x).detach()
    model, x = model.float(), x.float().to(memory_format=torch.channels_last)

    def error(model: nn.Module) -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return float((model(x) - exact).norm() / exact.norm())

    assert error(accelerate(copy.deepcopy(model))) < 1.5 * error(model)


@pytest.mark.parametrize("name", ["seresnet", "regnety", "convnext"])
def test_layout_stays(name, timm):
    model = randomised(FAMILIES[name][0](timm)).eval().to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    expected = model.forward_features(x)
    found = accelerate(model).forward_features(x)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "names",
    [["bottleneck_se"], pytest.param(BLOCKS, marks=pytest.mark.thorough)],
    ids=["one", "all"],
)
def test_compiles_whole(names, timm):
    model = nn.Sequential(*(accelerate(blocks()[name][0]) for name in names)).eval()
    x = torch.randn(2, 8, 5, 5).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_refuses_what_it_does_not_cover(timm):
    from timm.layers import LayerNorm2d
    from timm.layers.fast_norm import set_fast_norm

    from vertebra.interop import report
    from vertebra.nn import BatchNormAct2d

    set_fast_norm()
    try:
        fast = LayerNorm2d(8)
    finally:
        set_fast_norm(False)
    assert "fast norm" in report(accelerate(fast))[0].reason
    model = resnet(timm, norm_layer=BatchNormAct2d)
    reasons = {site.name: site.reason for site in report(accelerate(model))}
    for name in ("", "layer1.0"):
        assert "its bn1 already ends in an activation" in reasons[name]
    x = images().float()
    expected = model.eval()(x)
    assert accelerate(model)(x).equal(expected)


def test_a_method_that_has_changed_is_left_alone(timm, monkeypatch):
    from timm.layers import grn

    from vertebra.interop import _swap

    def forward(self, x):
        return x + 1

    module = grn.GlobalResponseNorm(8)
    monkeypatch.setattr(grn.GlobalResponseNorm, "forward", forward)
    _swap._swapped.cache_clear()
    with pytest.warns(UserWarning, match=r"GlobalResponseNorm\.forward is not the one"):
        accelerate(module)
    assert type(module) is grn.GlobalResponseNorm
    monkeypatch.undo()
    _swap._swapped.cache_clear()
    assert isinstance(accelerate(module), Swapped)
