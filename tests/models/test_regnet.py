"""RegNet: the same keys, bits, gradients and statistics as torchvision, timm and transformers."""

import copy
import random
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vertebra
from vertebra.models import (
    Model,
    RegNet,
    RegNetConfig,
    create_model,
    export_weights,
    load_weights,
)
from vertebra.models._layouts import LAYOUTS
from vertebra.models._regnet_config import CONFIGS
from vertebra.nn import BatchNormAct2d, DropPath, FrozenBatchNormAct2d
from vertebra.testing.parity import (
    assert_frozen,
    assert_same_output,
    assert_same_state,
    build_on_meta,
    copies,
    relative_error,
    share_weights,
)

TORCHVISION = sorted(name for name in CONFIGS if name.startswith("regnet_"))
TIMM = sorted(CONFIGS.keys() - TORCHVISION)


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 33, 45))


def small(**options: Any) -> RegNet:
    """A RegNet of two stages, with groups in both."""
    sizes = {"hidden_sizes": (16, 32), "depths": (1, 2), "group_width": 8, "stem_width": 8}
    return RegNet(RegNetConfig(**{**sizes, "num_classes": 10, **options}))


def seeded(model: Any, x: Tensor) -> Tensor:
    """Return the output, with the same stochastic depth at every call."""
    torch.manual_seed(1)
    return model(x)


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def exchange_weights(ours: RegNet, peer: nn.Module, layout: str) -> None:
    """Load the peer's weights into ours and ours into the peer: both strictly."""
    load_weights(ours, peer.state_dict())
    peer.load_state_dict(export_weights(ours, layout))


def assert_same_gradients(ours: RegNet, peer: nn.Module, x: Tensor, layout: str) -> None:
    target = torch.arange(x.shape[0])
    for model in (ours, peer):
        model.train().zero_grad()
        y = model(x)
        F.cross_entropy(getattr(y, "logits", y), target).backward()
    names = LAYOUTS["regnet"][layout].names(ours.state_dict())
    expected = dict(peer.named_parameters())
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[names[key]].grad), key


@pytest.fixture(scope="module")
def tv_regnet(torchvision: ModuleType) -> ModuleType:
    """The module of torchvision, whose rule for the widths works on the meta device too."""
    regnet = pytest.importorskip("torchvision.models.regnet")
    rule = regnet.BlockParams.from_init_params

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return rule(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regnet.BlockParams, "from_init_params", on_cpu)
        yield regnet


@pytest.fixture
def _uninitialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip initial values, which nobody looks at: on the meta device they take longest."""
    for name in ("normal_", "uniform_", "fill_", "zero_"):
        monkeypatch.setattr(Tensor, name, lambda self, *args, **kwargs: self)


# torchvision


@pytest.mark.parity
@pytest.mark.usefixtures("_uninitialised")
@pytest.mark.parametrize("name", TORCHVISION)
def test_has_the_keys_and_shapes_of_torchvision(name, tv_regnet):
    ours = build_on_meta(create_model, name).state_dict()
    peer = build_on_meta(getattr(tv_regnet, name)).state_dict()
    assert list(shapes(ours).items()) == list(shapes(peer).items())


@pytest.mark.parity
@pytest.mark.parametrize("name", ["regnet_x_400mf", "regnet_y_400mf"])
def test_matches_torchvision(name, tv_regnet, randomize):
    peer = randomize(build_on_meta(getattr(tv_regnet, name)))
    ours = create_model(name, weights=peer.state_dict())
    share_weights(ours, peer)
    with torch.no_grad():
        assert_same_output(ours, peer, images(2, 3, 64, 64))
        assert_same_output(ours, peer, images(1, 3, 71, 39).expand(2, -1, -1, -1))
    assert_same_gradients(ours, peer, images(2, 3, 64, 64), "torchvision")
    assert_same_state(ours, peer)


TORCHVISION_RULE = {"depth": 6, "w_0": 24, "w_a": 16.0, "w_m": 1.6, "group_width": 16}
TORCHVISION_OPTIONS: list[dict[str, Any]] = [
    {},
    {"stem_width": 20, "num_classes": 7},
    {"activation": nn.SiLU},
    {"activation": nn.LeakyReLU},
    {"norm_layer": partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)},
    {"norm_layer": nn.SyncBatchNorm},
    {"norm_layer": partial(nn.GroupNorm, 4)},
]


@pytest.mark.parity
@pytest.mark.parametrize("options", TORCHVISION_OPTIONS, ids=str)
@pytest.mark.parametrize(("se_ratio", "multiplier"), [(0.25, 1.0), (None, 0.5)])
def test_options_match_torchvision(options, se_ratio, multiplier, tv_regnet, randomize):
    rule = {**TORCHVISION_RULE, "bottleneck_multiplier": multiplier}
    torch.manual_seed(3)
    params = tv_regnet.BlockParams.from_init_params(**rule, se_ratio=se_ratio)
    peer = tv_regnet.RegNet(params, **options)
    torch.manual_seed(3)
    layer_type = "y" if se_ratio else "x"
    ours = create_model("regnet_y_400mf", layer_type=layer_type, **rule, **options)
    assert_same_state(ours, peer)  # the seed gives the same initial weights
    share_weights(ours, randomize(peer))
    assert_same_output(ours, peer, images())
    assert_same_state(ours, peer)


@pytest.fixture
def small_pair(tv_regnet, randomize):
    """Our network and torchvision's, small, with the same random weights."""
    params = tv_regnet.BlockParams.from_init_params(**TORCHVISION_RULE, se_ratio=0.25)
    peer = randomize(tv_regnet.RegNet(params))
    ours = create_model("regnet_y_400mf", **TORCHVISION_RULE, weights=peer.state_dict())
    return ours, peer


@pytest.mark.parity
def test_autocast_matches_torchvision(small_pair):
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_output(*small_pair, images())
    assert_same_state(*small_pair)


@pytest.mark.parity
def test_torchvision_users_can_take_the_model_apart(small_pair):
    ours, peer = (model.eval() for model in small_pair)
    assert [name for name, _ in ours.named_children()] == [
        name for name, _ in peer.named_children()
    ]
    x = images()
    headless = [nn.Sequential(*list(model.children())[:-1]) for model in (ours, peer)]
    assert torch.equal(headless[0](x).flatten(1), headless[1](x).flatten(1))
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    layers = ["stem", "trunk_output.block1", "trunk_output.block3.block3-0"]
    actual, expected = (
        extraction.create_feature_extractor(m, layers, suppress_diff_warning=True).eval()(x)
        for m in (ours, peer)
    )
    assert all(torch.equal(actual[layer], expected[layer]) for layer in layers)


# timm


@pytest.mark.parity
@pytest.mark.usefixtures("_uninitialised")
@pytest.mark.parametrize("name", TIMM)
def test_has_the_keys_and_shapes_of_timm(name, timm):
    ours, peer = (build_on_meta(create, name) for create in (create_model, timm.create_model))
    assert shapes(export_weights(ours, "timm")) == shapes(peer.state_dict())
    assert ours.num_features == peer.num_features
    ours_info, peer_info = (
        [(entry["num_chs"], entry["reduction"]) for entry in model.feature_info]
        for model in (ours, peer)
    )
    assert ours_info == peer_info


@pytest.mark.parity
def test_the_rule_for_widths_is_that_of_the_peers(timm, tv_regnet):
    from timm.models import regnet

    draw = random.Random(5)
    for _ in range(300):
        rule = {
            "depth": draw.randint(6, 40),
            "w_0": 8 * draw.randint(2, 64),
            "w_a": draw.uniform(5, 250),
            "w_m": draw.uniform(1.6, 3),
            "group_width": draw.randint(4, 128),
        }
        names = {"w_0": "w0", "w_a": "wa", "w_m": "wm", "group_width": "group_size"}
        cfg = regnet.RegNetCfg(**{names.get(key, key): value for key, value in rule.items()})
        stages, _ = regnet.RegNet._get_stage_args(None, cfg)
        params = tv_regnet.BlockParams.from_init_params(**rule)
        for ratio, widths, depths in (
            (0.0, [s["out_chs"] for s in stages], [s["depth"] for s in stages]),
            (0.9, params.widths, params.depths),
        ):
            config = RegNetConfig(**rule, group_min_ratio=ratio)
            assert list(config.channels) == widths, rule
            assert [len(blocks) for blocks in config.stages()] == depths, rule


TIMM_RULE = {"depth": 6, "w0": 24, "wa": 16.0, "wm": 1.6, "group_size": 16}
TIMM_OPTIONS: list[dict[str, Any]] = [
    {},
    {"group_min_ratio": 0.9},
    {"se_ratio": 0.25},
    {"act_layer": "silu", "se_ratio": 0.25},
    {"bottle_ratio": 4.0, "se_ratio": 0.25, "linear_out": True, "downsample": ""},
    {"linear_out": True, "num_features": 24, "in_chans": 5},
    {"downsample": "avg"},
    {"downsample": "avg", "output_stride": 8},
    {"output_stride": 8, "se_ratio": 0.25},
    {"output_stride": 16, "drop_rate": 0.4},
    {"preact": True, "se_ratio": 0.25, "act_layer": "silu"},
    {"preact": True, "downsample": "avg", "output_stride": 8},
    {"preact": True, "downsample": "", "num_features": 24},
    {"num_classes": 0, "stem_width": 24},
]


@pytest.mark.parity
@pytest.mark.parametrize("options", TIMM_OPTIONS, ids=str)
def test_options_match_timm(options, timm, randomize):
    from timm.models import regnet

    peer = randomize(regnet.RegNet(regnet.RegNetCfg(**TIMM_RULE), **{"num_classes": 5, **options}))
    layer_type = "y" if "se_ratio" in options else "x"
    ours = create_model(
        "regnetx_002", layer_type=layer_type, **TIMM_RULE, **{"num_classes": 5, **options}
    )
    exchange_weights(ours, peer, "timm")
    x = images(2, options.get("in_chans", 3), 65, 49)
    assert_same_output(ours, peer, x)
    theirs = peer.state_dict()
    for key, value in export_weights(ours, "timm").items():
        assert torch.equal(value, theirs[key]), key
    with torch.no_grad():
        last, maps = ours.eval().forward_intermediates(x)
        peers_last, peers = peer.eval().forward_intermediates(x)
        assert torch.equal(last, peers_last)
        assert all(map(torch.equal, maps, peers))
        assert torch.equal(
            ours.forward_head(last, pre_logits=True), peer.forward_head(last, pre_logits=True)
        )


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [
        "regnety_002",
        "regnetz_005",
        pytest.param("regnetv_040", marks=pytest.mark.thorough),
        pytest.param("regnety_040_sgn", marks=pytest.mark.thorough),
    ],
)
def test_matches_timm(name, timm, randomize):
    peer = randomize(build_on_meta(timm.create_model, name, num_classes=10))
    ours = build_on_meta(create_model, name, num_classes=10).to_empty(device="cpu")
    exchange_weights(ours, peer, "timm")
    x = images(2, 3, 65, 49)
    with torch.no_grad():
        assert_same_output(ours, peer, x)
    assert_same_gradients(ours, peer, x, "timm")


@pytest.mark.parity
@pytest.mark.parametrize(
    "options", [{}, {"linear_out": True}, {"preact": True}, {"downsample": ""}], ids=str
)
def test_stochastic_depth_matches_timm(options, timm, randomize):
    from timm.models import regnet

    options = {"drop_path_rate": 0.5, "num_classes": 5, **options}
    peer = randomize(regnet.RegNet(regnet.RegNetCfg(**TIMM_RULE), **options))
    ours = create_model("regnetx_002", **TIMM_RULE, **options)
    exchange_weights(ours, peer, "timm")
    blocks = [module for module in ours.modules() if hasattr(module, "proj")]
    peers = [module for module in peer.modules() if hasattr(module, "conv3")]
    for block, theirs in zip(blocks, peers, strict=True):
        rate = getattr(theirs.drop_path, "drop_prob", 0.0)
        if theirs.downsample is None:  # nothing is added to what is dropped
            rate = 0.0
        assert getattr(block.drop_path, "drop_prob", 0.0) == pytest.approx(rate, rel=1e-6)
        if rate:
            block.drop_path.drop_prob = rate  # which is rounded to fp32
            theirs.drop_path = DropPath(rate)  # timm draws other random numbers
    assert_same_output(ours, peer, images(16, 3, 33, 45))


@pytest.mark.parity
@pytest.mark.parametrize(
    "options",
    [{}, {"zero_init_last": False}, {"preact": True}, {"downsample": "avg", "num_features": 24}],
    ids=str,
)
def test_a_seed_gives_the_weights_of_timm(options, timm):
    from timm.models import regnet

    torch.manual_seed(3)
    peer = regnet.RegNet(regnet.RegNetCfg(**TIMM_RULE, se_ratio=0.25), **options).state_dict()
    torch.manual_seed(3)
    ours = export_weights(create_model("regnety_002", **TIMM_RULE, **options), "timm")
    assert ours.keys() == peer.keys()
    for key, value in ours.items():
        assert torch.equal(value, peer[key]), key


# transformers


TRANSFORMERS_OPTIONS: list[dict[str, Any]] = [
    {"layer_type": "y"},
    {"layer_type": "x", "downsample_in_first_stage": False},
    {"layer_type": "x", "embedding_size": 24, "hidden_sizes": [24, 30], "depths": [2, 1]},
    {"layer_type": "y", "hidden_sizes": [22, 40, 96], "depths": [1, 2, 1], "groups_width": 20},
]


@pytest.mark.parity
@pytest.mark.parametrize("options", TRANSFORMERS_OPTIONS, ids=str)
@pytest.mark.parametrize("hidden_act", ["relu", "gelu"])
def test_matches_transformers(options, hidden_act, transformers, randomize):
    sizes = {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 2, 1], "groups_width": 16}
    options = {**sizes, **options, "hidden_act": hidden_act}
    config = transformers.RegNetConfig(num_channels=4, num_labels=5, **options)
    peer = randomize(transformers.RegNetForImageClassification(config))
    ours = create_model("regnet_y_400mf", in_chans=4, num_classes=5, se_act_layer="relu", **options)
    exchange_weights(ours, peer, "transformers")
    x = images(2, 4, 97, 83)
    for training in (False, True):
        assert torch.equal(ours.train(training)(x), peer.train(training)(x).logits)
    assert_same_gradients(ours, peer, x, "transformers")
    expected = peer.regnet.eval()(x, output_hidden_states=True)
    found = Model(ours.eval())(x, output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert len(found.hidden_states) == len(expected.hidden_states)
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))


@pytest.mark.parity
def test_the_defaults_are_those_of_transformers(transformers):
    theirs, ours = transformers.RegNetConfig(), RegNetConfig()
    assert list(ours.channels) == list(theirs.hidden_sizes)
    assert [len(blocks) for blocks in ours.stages()] == list(theirs.depths)
    assert ours.group_width == theirs.groups_width
    assert ours.stem_channels == theirs.embedding_size
    assert ours.layer_type == theirs.layer_type
    assert ours.downsample_in_first_stage == theirs.downsample_in_first_stage


# ours


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_type": "z"}, "layer_type='z'"),
        ({"layer_type": "x", "se_ratio": 0.25}, "layer_type='x', se_ratio=0.25"),
        ({"layer_type": "y", "se_ratio": 0.0}, "layer_type='y', se_ratio=0.0"),
        ({"se_ratio": 1e-3}, "se_ratio=0.001"),
        ({"depth": 0}, "depth=0"),
        ({"w_0": 20}, "w_0=20"),
        ({"w_a": -1.0}, "w_a=-1.0"),
        ({"w_m": 1.0}, "w_m=1.0"),
        ({"hidden_sizes": (32, 64)}, r"hidden_sizes=\(32, 64\), depths=None"),
        ({"depths": (1, 2)}, r"hidden_sizes=None, depths=\(1, 2\)"),
        ({"hidden_sizes": (32, 64), "depths": (1,)}, "one entry of each per stage"),
        ({"hidden_sizes": (), "depths": ()}, r"hidden_sizes=\(\)"),
        ({"hidden_sizes": (32, 64), "depths": (1, 0)}, r"depths=\(1, 0\)"),
        ({"hidden_sizes": (33, 65), "depths": (1, 1), "group_width": 16}, "group_width=16"),
        ({"group_width": 0}, "group_width=0"),
        ({"group_min_ratio": 2.0}, "group_min_ratio=2.0"),
        ({"bottleneck_multiplier": 0.0}, "bottleneck_multiplier=0.0"),
        ({"downsample": "max"}, "downsample='max'"),
        ({"output_stride": 4}, "output_stride=4"),
        ({"init": "pycls"}, "init='pycls'"),
        ({"stem_width": 0}, "stem_width=0"),
        ({"in_chans": 0}, "in_chans=0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"num_features": -1}, "num_features=-1"),
        ({"drop_rate": 1.5}, "drop_rate=1.5"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        RegNetConfig(**options)


def test_a_config_is_a_value():
    lists = RegNetConfig(hidden_sizes=[32, 64], depths=[1, 2])
    assert lists == RegNetConfig(hidden_sizes=(32, 64), depths=(1, 2))
    assert hash(lists) == hash(RegNetConfig(hidden_sizes=(32, 64), depths=(1, 2)))


def test_builds_the_pretrained_giant_of_transformers():
    sizes = (2020, 4040, 11110, 28280)
    config = RegNetConfig("y", 27, 1744, 620.83, 2.52, 1010)
    assert config.channels == sizes
    assert [len(blocks) for blocks in config.stages()] == [2, 7, 17, 1]


def test_refuses_what_is_not_a_batch_of_images():
    with pytest.raises(ValueError, match=r"a RegNet takes images of shape \(N, 3, H, W\)"):
        small()(images(2, 4, 32, 32))


@pytest.mark.parametrize("shape", [(0, 3, 40, 40), (1, 3, 1, 1), (1, 3, 33, 250)])
def test_takes_images_of_any_size(shape, randomize):
    assert randomize(small()).eval()(images(*shape)).shape == (shape[0], 10)


@pytest.mark.parametrize("options", [{}, {"preact": True}, {"num_features": 24}], ids=str)
def test_features_end_where_the_last_one_is(options):
    model = small(**options).eval()
    pruned = copy.deepcopy(model)
    x = images()
    expected = model.forward_intermediates(x, (0, 1), intermediates_only=True)
    pruned.keep_features((0, 1))
    assert all(map(torch.equal, pruned(x), expected))
    assert pruned.num_features == 16
    assert not any("block2" in key or "final_conv" in key for key in pruned.state_dict())
    assert [info["module"] for info in pruned.feature_info.info] == [
        "stem",
        "trunk_output.block1",
        "trunk_output.block2",
    ]
    model.prune_intermediate_layers(prune_norm=True)
    assert model.num_features == 32
    assert not any("final_conv" in key for key in model.state_dict())
    assert model(x).shape[1] == 32


@pytest.mark.parametrize("options", [{}, {"drop_path_rate": 0.5}], ids=str)
@pytest.mark.parametrize("act_layer", ["relu", "silu"])
def test_sync_batch_norm_conversion_keeps_the_function(act_layer, options, randomize):
    model = randomize(small(act_layer=act_layer, **options))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(module, BatchNormAct2d) for module in converted.modules())
    assert list(converted.state_dict()) == list(model.state_dict())
    assert_same_output(converted, model, images())
    assert_same_state(converted, model)


def test_frozen_batch_norm_stays_as_it_is(randomize):
    model = randomize(small(norm_layer=FrozenBatchNormAct2d))
    assert_frozen(model, images())


def test_zero_init_accepts_norms_without_weights():
    small(zero_init_residual=True, norm_layer=partial(nn.BatchNorm2d, affine=False))
    small(zero_init_residual=True, norm_layer=nn.Identity)


def test_keeps_channels_last(randomize):
    model = randomize(small()).eval().to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    features = model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        features, model.forward_features(x.contiguous()), rtol=1e-4, atol=1e-4
    )


VARIANTS: list[dict[str, Any]] = [
    {},
    {"layer_type": "x", "drop_path_rate": 0.5, "downsample": "avg"},
    {"preact": True, "act_layer": "silu"},
    {"linear_out": True, "downsample": "", "num_features": 24},
]
# seconds each, where something is compiled or interpreted
FIRST_VARIANT = [VARIANTS[0], *(pytest.param(v, marks=pytest.mark.thorough) for v in VARIANTS[1:])]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_copies_and_pickles(options, randomize):
    model = randomize(small(**options)).eval()
    x = images()
    for other in copies(model):
        assert other.config == model.config
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_symbolic_trace_keeps_the_function(options, training, randomize):
    model = randomize(small(**options)).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    x = images()
    assert torch.equal(seeded(traced, x), seeded(model, x))
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        traced(images(2, 4, 32, 32))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", FIRST_VARIANT, ids=str)
def test_compiles_to_one_graph(options, training, randomize):
    model = small(**options, hidden_sizes=(16,), depths=(2,))
    assert_compiles(randomize(model).train(training), backend="aot_eager")


@pytest.mark.thorough
@pytest.mark.parametrize("training", [False, True])
def test_compiles_with_inductor(training, randomize):
    assert_compiles(randomize(small()).train(training), backend="inductor")


def assert_compiles(model: RegNet, backend: str) -> None:
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = images()
    actual, expected = seeded(compiled, x), seeded(reference, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    if model.training:
        actual.square().sum().backward()
        expected.square().sum().backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert relative_error(p.grad, q.grad) <= 1e-3
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_exports_with_dynamic_sizes(training, randomize):
    model = randomize(small()).train(training)
    batch = torch.export.Dim("batch", min=2, max=64)
    height, width = (torch.export.Dim(name, min=33, max=1024) for name in ("height", "width"))
    shapes = ({0: batch, 2: height, 3: width},)
    program = torch.export.export(copy.deepcopy(model), (images(),), dynamic_shapes=shapes)
    for shape in [(2, 3, 65, 49), (5, 3, 33, 100)]:
        x = images(*shape)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", FIRST_VARIANT, ids=str)
def test_trains_alike_on_kernels_and_eager(options, device, randomize):
    """One network through the Triton kernels: in the interpreter, where there is no GPU."""
    sizes = {"hidden_sizes": (8,), "depths": (2,), "group_width": 4, "num_classes": 3}
    model = randomize(small(**{**options, **sizes})).double().to(device)
    x = images(2, 3, 17, 13).double().to(device)
    results: list[Any] = []
    for name in ("eager", "triton"):
        with vertebra.backend(name):
            trained = copy.deepcopy(model).train()
            seeded(trained, x).square().sum().backward()
            evaluated = trained.eval()(x)
        gradients = [parameter.grad for parameter in trained.parameters()]
        results.append((evaluated, gradients, trained.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)
