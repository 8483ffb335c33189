"""RegNet: the same keys, bits, gradients and statistics as torchvision, timm and transformers."""

import copy
import io
import pickle
import re
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vertebra
from vertebra.models import RegNet, RegNetConfig, create_model
from vertebra.models._regnet_config import CONFIGS
from vertebra.nn import BatchNormAct2d, DropPath, FrozenBatchNormAct2d
from vertebra.testing.parity import (
    assert_same_output,
    assert_same_state,
    build_on_meta,
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


def load_translated(ours: RegNet, peer: nn.Module, translate: Any) -> None:
    """Load the peer's weights under our keys, and see that none is left over."""
    theirs = dict(peer.state_dict())
    ours.load_state_dict({key: theirs.pop(translate(key)) for key in ours.state_dict()})
    assert not theirs


def assert_same_gradients(ours: nn.Module, peer: nn.Module, x: Tensor, translate: Any) -> None:
    target = torch.arange(x.shape[0])
    for model in (ours, peer):
        model.train().zero_grad()
        y = model(x)
        F.cross_entropy(getattr(y, "logits", y), target).backward()
    expected = dict(peer.named_parameters())
    for key, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, expected[translate(key)].grad) <= 1e-5, key


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
    """Skip random numbers that nobody looks at: on the meta device they take longest."""
    for name in ("normal_", "uniform_"):
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
    assert_same_gradients(ours, peer, images(2, 3, 64, 64), str)
    assert_same_state(ours, peer)


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
    rule = {"depth": 6, "w_0": 24, "w_a": 16.0, "w_m": 1.6, "group_width": 16}
    rule |= {"bottleneck_multiplier": multiplier}
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


# timm

TO_TIMM = [
    (r"^trunk_output\.block(\d+)\.block\d+-(\d+)", lambda m: f"s{m[1]}.b{int(m[2]) + 1}"),
    (r"f\.([abc])\.0", lambda m: f"conv{'abc'.index(m[1]) + 1}.conv"),
    (r"f\.([abc])\.1", lambda m: f"conv{'abc'.index(m[1]) + 1}.bn"),
    (r"f\.se", "se"),
    (r"(stem|proj|final_conv)\.0", r"\1.conv"),
    (r"(stem|proj|final_conv)\.1", r"\1.bn"),
    (r"proj", "downsample"),
    (r"^fc", "head.fc"),
]
TO_TIMM_AVG = [(r"proj\.1", "downsample.1.conv"), (r"proj\.2", "downsample.1.bn")]
TO_TIMM_PREACT = [
    (r"\.norm", ".norm1"),
    (r"f\.a", "conv1"),
    (r"f\.([bc])\.0", lambda m: f"norm{'abc'.index(m[1]) + 1}"),
    (r"f\.([bc])\.2", lambda m: f"conv{'abc'.index(m[1]) + 1}"),
    (r"proj\.1", "downsample.1"),
]


def key_of_timm(config: RegNetConfig, key: str) -> str:
    """Return the timm name of one of our keys."""
    special = TO_TIMM_AVG if config.downsample == "avg" else []
    for pattern, name in (TO_TIMM_PREACT if config.preact else special) + TO_TIMM:
        key = re.sub(pattern, name, key)
    return key


@pytest.mark.parity
@pytest.mark.usefixtures("_uninitialised")
@pytest.mark.parametrize("name", TIMM)
def test_has_the_keys_and_shapes_of_timm(name, timm):
    ours, peer = (build_on_meta(create, name) for create in (create_model, timm.create_model))
    keys = shapes(ours.state_dict())
    assert {key_of_timm(ours.config, key): shape for key, shape in keys.items()} == shapes(
        peer.state_dict()
    )
    assert ours.num_features == peer.num_features
    ours_info, peer_info = (
        [(entry["num_chs"], entry["reduction"]) for entry in model.feature_info]
        for model in (ours, peer)
    )
    assert ours_info == peer_info


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
    translate = partial(key_of_timm, ours.config)
    load_translated(ours, peer, translate)
    x = images(2, options.get("in_chans", 3), 65, 49)
    assert_same_output(ours, peer, x)
    theirs = peer.state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs[translate(key)]), key
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
    translate = partial(key_of_timm, ours.config)
    load_translated(ours, peer, translate)
    x = images(2, 3, 65, 49)
    with torch.no_grad():
        assert_same_output(ours, peer, x)
    assert_same_gradients(ours, peer, x, translate)


@pytest.mark.parity
@pytest.mark.parametrize(
    "options", [{}, {"linear_out": True}, {"preact": True}, {"downsample": ""}], ids=str
)
def test_stochastic_depth_matches_timm(options, timm, randomize):
    from timm.models import regnet

    options = {"drop_path_rate": 0.5, "num_classes": 5, **options}
    peer = randomize(regnet.RegNet(regnet.RegNetCfg(**TIMM_RULE), **options))
    ours = create_model("regnetx_002", **TIMM_RULE, **options)
    translate = partial(key_of_timm, ours.config)
    load_translated(ours, peer, translate)
    drops = {
        translate(name): module
        for name, module in ours.named_modules()
        if isinstance(module, DropPath) and module.drop_prob > 0
    }
    assert set(drops) == {
        f"{name}.drop_path"
        for name, block in peer.named_modules()
        if isinstance(getattr(block, "drop_path", None), timm.layers.DropPath)
        and block.downsample is not None
    }
    for name, drop in drops.items():
        rate = peer.get_submodule(name).drop_prob
        assert drop.drop_prob == pytest.approx(rate, rel=1e-6)
        drop.drop_prob = rate  # which is rounded to fp32
        peer.set_submodule(name, DropPath(rate))  # timm draws other random numbers
    assert_same_output(ours, peer, images(16, 3, 33, 45))


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"preact": True}, {"zero_init_last": False}], ids=str)
def test_initialises_like_timm(options, timm, monkeypatch):
    from timm.models import regnet

    def constant(self: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
        return self.fill_(std)

    monkeypatch.setattr(Tensor, "normal_", constant)
    peer = regnet.RegNet(regnet.RegNetCfg(**TIMM_RULE, se_ratio=0.25), **options).state_dict()
    ours = create_model("regnety_002", **TIMM_RULE, **options)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, peer[key_of_timm(ours.config, key)]), key


# transformers


def key_of_transformers(key: str) -> str:
    """Return the transformers name of one of our keys."""
    key = re.sub(r"^stem", "regnet.embedder.embedder", key)
    key = re.sub(
        r"^trunk_output\.block(\d+)\.block\d+-(\d+)",
        lambda m: f"regnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}",
        key,
    )
    key = key.replace("f.a", "layer.0").replace("f.b", "layer.1").replace("proj", "shortcut")
    key = key.replace("f.se.fc1", "layer.2.attention.0").replace("f.se.fc2", "layer.2.attention.2")
    key = key.replace("fc.", "classifier.1.")
    kinds = {"0": "convolution", "1": "normalization"}
    return re.sub(
        r"(embedder|layer\.\d|f\.c|shortcut)\.([01])\.", lambda m: f"{m[1]}.{kinds[m[2]]}.", key
    )


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
    last = f"layer.{3 if options['layer_type'] == 'y' else 2}"

    def translate(key: str) -> str:
        return key_of_transformers(key).replace("f.c", last)

    load_translated(ours, peer, translate)
    x = images(2, 4, 97, 83)
    for training in (False, True):
        assert torch.equal(ours.train(training)(x), peer.train(training)(x).logits)
    assert_same_gradients(ours, peer, x, translate)
    base, ours = peer.regnet.eval(), ours.eval()
    states = base(x, output_hidden_states=True).hidden_states
    _, maps = ours.forward_intermediates(x)
    assert all(map(torch.equal, maps, states))
    assert len(maps) == len(states)


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
    model = randomize(small(norm_layer=FrozenBatchNormAct2d)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = images()
    expected = model.eval()(x)
    assert torch.equal(model.train()(x), expected)
    model(x).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is not None for parameter in model.parameters())


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
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
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
    assert_compiles(randomize(small(**options)).train(training), backend="aot_eager")


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
    sizes = {"hidden_sizes": (8, 16), "depths": (1, 1), "group_width": 4, "num_classes": 3}
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
