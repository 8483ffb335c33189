"""ConvNeXt and V2: timm's keys, seeds and numbers, and those of torchvision and transformers."""

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.models import (
    Backbone,
    ConvNeXt,
    ConvNeXtBlock,
    ConvNeXtConfig,
    Model,
    create_model,
    export_weights,
    list_models,
    load_weights,
)
from vertebra.models._convnext_config import CONFIGS
from vertebra.models._layouts import export
from vertebra.nn import DropPathAdd
from vertebra.testing.parity import (
    assert_same_state,
    build_on_meta,
    copies,
    relative_error,
    share_weights,
)

TORCHVISION = ["convnext_tiny", "convnext_small", "convnext_base", "convnext_large"]
SMALL = {"depths": (1, 2, 1, 1), "dims": (16, 24, 32, 40), "num_classes": 10}
V2 = {"use_grn": True, "ls_init_value": None}
THOROUGH = pytest.mark.thorough
TOLERANCE = 5e-6  # relative to the largest value, for outputs and for each gradient


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 65, 77))


def small(**options: Any) -> ConvNeXt:
    """A ConvNeXt of four thin stages."""
    return ConvNeXt(ConvNeXtConfig(**{**SMALL, **options}))


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def assert_matches(
    ours: nn.Module,
    peer: nn.Module,
    x: Tensor,
    layout: str = "timm",
    tolerance: float = TOLERANCE,
) -> None:
    """Require the peer's outputs in eval mode and in training, and its gradients."""
    outputs: list[Tensor] = []
    for training in (False, True):
        outputs.clear()
        for model in (ours.train(training), peer.train(training)):
            torch.manual_seed(1)  # dropout
            y = model(x)
            outputs.append(getattr(y, "logits", y))
        assert relative_error(*outputs) <= tolerance
    dy = torch.randn_like(outputs[0])
    gradients: list[dict[str, Tensor]] = []
    for model, y in zip((ours, peer), outputs, strict=True):
        model.zero_grad()
        y.backward(dy)
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    actual, expected = export(gradients[0], "convnext", layout), gradients[1]
    assert actual.keys() == expected.keys()
    assert len(actual) == len(list(ours.parameters()))
    for key, gradient in expected.items():
        assert relative_error(actual[key], gradient) <= tolerance, key


# timm


@pytest.fixture
def timm_on_meta(timm, monkeypatch):
    """Build timm's models without memory, and without drawing the weights that are not there."""
    monkeypatch.setattr("timm.models.convnext.trunc_normal_", lambda *args, **kwargs: None)
    return partial(build_on_meta, timm.create_model)


@pytest.mark.parity
def test_every_convnext_of_timm_is_here(timm):
    assert list_models("convnext*") == sorted(timm.list_models("convnext*")) == sorted(CONFIGS)


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_has_the_keys_and_shapes_of_timm(name, timm_on_meta):
    ours, peer = build_on_meta(create_model, name), timm_on_meta(name)
    shapes = [[(k, v.shape) for k, v in m.state_dict().items()] for m in (ours, peer)]
    assert shapes[0] == shapes[1]
    assert all(value.is_meta for value in ours.state_dict().values())
    assert ours.num_features == peer.num_features
    assert ours.head_hidden_size == peer.head_hidden_size
    assert ours.feature_info == peer.feature_info
    epsilons = [[getattr(m, "eps", None) for m in _norms(model)] for model in (ours, peer)]
    assert epsilons[0] == epsilons[1]


def _norms(model: nn.Module) -> list[nn.Module]:
    return [
        m
        for name, m in model.named_modules()
        if list(m.parameters(recurse=False)) and "norm" in name
    ]


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [
        "convnext_tiny",
        "convnext_zepto_rms_ols",
        "convnextv2_atto",
        *(
            pytest.param(name, marks=THOROUGH)
            for name in (
                "convnext_atto_ols",
                "convnext_atto_rms",
                "convnext_nano_ols",
                "convnext_tiny_hnf",
                "convnextv2_tiny",
            )
        ),
    ],
)
def test_matches_timm(name, timm_on_meta, randomize):
    peer = randomize(timm_on_meta(name))
    ours = build_on_meta(create_model, name).to_empty(device="cpu")
    share_weights(ours, peer)
    x = images(1, 3, 64, 45)
    with torch.no_grad():
        assert relative_error(ours.eval()(x), peer.eval()(x)) <= TOLERANCE
    # through so many layers fp32 rounds the gradients of both to 1e-5: compare them in fp64
    assert_matches(ours.double(), peer.double(), x.double(), tolerance=1e-11)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["convnext_atto", pytest.param("convnextv2_atto", marks=THOROUGH)])
def test_matches_timm_at_full_size(name, timm, randomize):
    peer = randomize(timm.create_model(name))
    ours = create_model(name, weights=peer.state_dict())
    assert_matches(ours, peer, images(2, 3, 224, 224))


TIMM_OPTIONS = [
    {},
    {"conv_mlp": True},
    {"conv_mlp": True, **V2},
    V2,
    {"ls_init_value": 0.3, **SMALL, "depths": [2, 1, 1, 1]},
    {"ls_init_value": 0.5, "use_grn": True},
    {"stem_type": "overlap"},
    {"stem_type": "overlap_tiered"},
    {"stem_type": "overlap_tiered", "dims": (22, 24, 26, 28)},
    {"stem_type": "overlap_act", "act_layer": "silu"},
    {"patch_size": 2},
    {"patch_size": 8, "output_stride": 8},
    {"patch_size": 8},
    {"kernel_sizes": (7, 5, 5, 3)},
    {"kernel_sizes": 3, "conv_bias": False},
    {"act_layer": nn.LeakyReLU},
    {"act_layer": "relu", "norm_eps": 1e-3},
    {"norm_layer": "rmsnorm"},
    {"norm_layer": "simplenorm", "norm_eps": 1e-3},
    {"norm_layer": "simplenorm2d", "conv_mlp": True},
    {"norm_layer": nn.BatchNorm2d, "conv_mlp": True},
    {"head_norm_first": True},
    {"head_hidden_size": 48, "head_init_scale": 0.5},
    {"head_norm_first": True, "head_init_scale": 0.01},
    {"output_stride": 16},
    {"output_stride": 8},
    {"output_stride": 8, "dims": (16, 16, 16, 16), "conv_mlp": True},
    {"drop_rate": 0.4},
    {"drop_rate": 0.4, "head_hidden_size": 24, "num_classes": 0},
    {"in_chans": 1, "num_classes": 0},
    {"in_chans": 5, "global_pool": "max"},
    {"global_pool": "avgmax", "head_hidden_size": 24},
    {"global_pool": "fastcatavgmax", "head_norm_first": True},
    {"global_pool": "", "num_classes": 0},
    {"global_pool": "", "num_classes": 0, "head_norm_first": True},
]


@pytest.mark.parity
@pytest.mark.parametrize("options", TIMM_OPTIONS, ids=str)
def test_options_match_timm(options, timm, randomize):
    options = {**SMALL, **options}
    torch.manual_seed(3)
    peer = timm.models.convnext.ConvNeXt(**options)
    torch.manual_seed(3)
    ours = ConvNeXt(ConvNeXtConfig(**options))
    assert_same_state(ours, peer)  # the seed gives the same initial weights
    assert ours.feature_info == peer.feature_info
    share_weights(ours, randomize(peer))
    x = images(2, options.get("in_chans", 3), 70, 77)
    assert_matches(ours, peer, x)
    ours, peer = ours.eval(), peer.eval()
    features = peer.forward_features(x)
    assert relative_error(ours.forward_features(x), features) <= TOLERANCE
    pooled = [model.forward_head(features, pre_logits=True) for model in (ours, peer)]
    assert relative_error(*pooled) <= TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("conv_mlp", [False, True])
@pytest.mark.parametrize("mlp_ratio", [2, 1.3])
def test_a_block_of_another_width_matches_timm(conv_mlp, mlp_ratio, timm, randomize):
    options = {"conv_mlp": conv_mlp, "mlp_ratio": mlp_ratio}
    peer = randomize(timm.models.convnext.ConvNeXtBlock(16, dilation=2, kernel_size=5, **options))
    ours = ConvNeXtBlock(ConvNeXtConfig(**options), 16, kernel_size=5, dilation=2)
    share_weights(ours, peer)
    assert_matches(ours, peer, images(2, 16, 9, 8))


@pytest.mark.parity
@pytest.mark.parametrize("depths", [(2, 1, 3, 1), (1, 1, 1, 1)], ids=str)
def test_stochastic_depth_grows_as_in_timm(depths, timm):
    options = {**SMALL, "depths": depths, "drop_path_rate": 0.4}
    models = ConvNeXt(ConvNeXtConfig(**options)), timm.models.convnext.ConvNeXt(**options)
    ours, peers = (
        [getattr(b.drop_path, "drop_prob", 0.0) for stage in m.stages for b in stage.blocks]
        for m in models
    )
    assert ours == pytest.approx(peers, rel=1e-6)
    assert (ours[0], ours[-1]) == (0.0, 0.4)
    assert ConvNeXtConfig(depths=(1,), dims=(8,), drop_path_rate=0.4).stages()[
        0
    ].drop_path_rates == (0.0,)


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, V2, {"conv_mlp": True, **V2}], ids=str)
def test_autocast_is_as_close_to_fp32_as_timm(options, timm, randomize):
    peer = randomize(timm.models.convnext.ConvNeXt(**SMALL, **options)).eval()
    ours = small(**options).eval()
    share_weights(ours, peer)
    x = images()
    truth = peer(x)
    with torch.autocast("cpu", torch.bfloat16):
        errors = [relative_error(model(x).float(), truth) for model in (ours, peer)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"head_norm_first": True}], ids=str)
@pytest.mark.parametrize("indices", [None, 2, (0, 2), (-1,)], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_intermediates_match_timm(options, indices, norm, timm, randomize):
    peer = randomize(timm.models.convnext.ConvNeXt(**SMALL, **options)).eval()
    ours = small(**options).eval()
    share_weights(ours, peer)
    x = images()
    for stop_early in (False, True):
        given = {"indices": indices, "norm": norm, "stop_early": stop_early}
        last, found = ours.forward_intermediates(x, **given)
        peers_last, peers = peer.forward_intermediates(x, **given)
        assert relative_error(last, peers_last) <= TOLERANCE
        assert len(found) == len(peers)
        assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(found, peers, strict=True))


@pytest.mark.parity
@pytest.mark.parametrize("out_indices", [None, (1, 2), (-1,)], ids=str)
def test_features_only_matches_timm(out_indices, timm, randomize):
    ours = create_model("convnext_atto", features_only=True, out_indices=out_indices)
    given = {} if out_indices is None else {"out_indices": out_indices}
    peer = timm.create_model("convnext_atto", features_only=True, **given)
    theirs = {re.sub(r"^(stem|stages)_", r"\1.", k): v for k, v in peer.state_dict().items()}
    assert list(theirs) == list(ours.state_dict())
    ours, peer = randomize(ours).eval(), peer.eval()
    peer.load_state_dict(dict(zip(peer.state_dict(), ours.state_dict().values(), strict=True)))
    x = images()
    features = ours(x)
    assert all(relative_error(*f) <= TOLERANCE for f in zip(features, peer(x), strict=True))
    assert ours.feature_info.channels() == peer.feature_info.channels()
    assert ours.feature_info.reduction() == peer.feature_info.reduction()


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"head_norm_first": True}, {"head_hidden_size": 8}])
def test_pruning_matches_timm(options, timm, randomize):
    peer = randomize(timm.models.convnext.ConvNeXt(**SMALL, **options)).eval()
    ours = small(**options).eval()
    share_weights(ours, peer)
    x = images()
    for given in ({"indices": (0, 3)}, {"indices": [0, 1], "prune_norm": True}):
        assert ours.prune_intermediate_layers(**given) == peer.prune_intermediate_layers(**given)
        assert list(ours.state_dict()) == list(peer.state_dict())
        assert relative_error(ours(x), peer(x)) <= TOLERANCE
        assert ours.num_features == peer.num_features


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"head_hidden_size": 8}], ids=str)
def test_resetting_the_classifier_matches_timm(options, timm, randomize):
    peer = randomize(timm.models.convnext.ConvNeXt(**SMALL, **options)).eval()
    ours = small(**options).eval()
    share_weights(ours, peer)
    x = images()
    for arguments in ((0,), (4, "max"), (3, "avg", True), (5,)):
        ours.reset_classifier(*arguments)
        peer.reset_classifier(*arguments)
        share_weights(ours, peer)
        assert relative_error(ours(x), peer(x)) <= TOLERANCE
        assert ours.head_hidden_size == peer.head_hidden_size
        assert ours.num_classes == ours.config.num_classes == arguments[0]
        assert not any(module.training for module in ours.modules())


# torchvision


@pytest.fixture(scope="session")
def torchvision_convnext():
    pytest.importorskip("torchvision.ops")
    return pytest.importorskip("torchvision.models.convnext")


@pytest.mark.parity
@pytest.mark.parametrize("name", TORCHVISION)
def test_has_the_weights_of_torchvision(name, torchvision_convnext):
    ours = build_on_meta(getattr(vertebra.models, name))
    peer = build_on_meta(getattr(torchvision_convnext, name))
    states = export_weights(ours, "torchvision"), peer.state_dict()
    shapes = [{k: v.shape for k, v in state.items()} for state in states]
    assert shapes[0] == shapes[1]


@pytest.mark.parity
def test_matches_torchvision(torchvision_convnext, randomize):
    setting = torchvision_convnext.CNBlockConfig
    blocks = [setting(16, 24, 1), setting(24, 40, 2), setting(40, None, 1)]
    peer = randomize(torchvision_convnext.ConvNeXt(blocks, 0.0, layer_scale=0.1, num_classes=7))
    sizes = {"depths": (1, 2, 1), "dims": (16, 24, 40), "num_classes": 7}
    options = {"layer_scale": 0.1, "stochastic_depth_prob": 0.0}
    ours = create_model("convnext_tiny", **sizes, **options)
    assert ours.stages[0].blocks[0].gamma[0] == 0.1
    load_weights(ours, peer.state_dict())
    assert_same_weights(export_weights(ours, "torchvision"), peer.state_dict())
    assert_matches(ours, peer, images(), "torchvision")


# transformers


TRANSFORMERS_OPTIONS = [
    {},
    {"layer_norm_eps": 0.1},
    {"patch_size": 2},
    {"patch_size": 8},
    {"hidden_sizes": [16, 24, 32], "depths": [2, 1, 1], "num_stages": 3, "hidden_act": "silu"},
]


@pytest.mark.parity
@pytest.mark.parametrize("options", TRANSFORMERS_OPTIONS, ids=str)
@pytest.mark.parametrize("version", ["", "v2"])
def test_matches_transformers(version, options, transformers, randomize):
    options = {
        "hidden_sizes": [16, 24, 32, 40],
        "depths": [1, 2, 1, 1],
        "layer_norm_eps": 1e-12,
        **options,
    }
    family = "convnext" + version
    config = getattr(transformers, f"ConvNext{version.upper()}Config")
    build = getattr(transformers, f"ConvNext{version.upper()}ForImageClassification")
    peer = randomize(build(config(num_channels=4, num_labels=5, **options)))
    options.pop("num_stages", None)
    ours = create_model(
        f"{family}_tiny",
        **{"in_chans": 4, "num_classes": 5, **options},
        downsample_in_first_stage=False,
        output_stride=8 * options.get("patch_size", 4),
    )
    load_weights(ours, peer.state_dict())
    assert_same_weights(export_weights(ours, "transformers"), peer.state_dict())
    x = images(2, 4, 97, 83)
    assert_matches(ours, peer, x, "transformers")
    base, model = (
        m.eval()(x, output_hidden_states=True) for m in (getattr(peer, family), Model(ours))
    )
    assert relative_error(model.last_hidden_state, base.last_hidden_state) <= TOLERANCE
    assert model.pooler_output.shape == base.pooler_output.shape
    assert relative_error(model.pooler_output, base.pooler_output) <= TOLERANCE
    for a, b in zip(model.hidden_states, base.hidden_states, strict=True):
        assert relative_error(a, b) <= TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("version", ["", "v2"])
def test_backbone_matches_transformers(version, transformers, randomize):
    options = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 2, 1, 1]}
    chosen = ["stem", "stage2", "stage4"]
    config = getattr(transformers, f"ConvNext{version.upper()}Config")
    build = getattr(transformers, f"ConvNext{version.upper()}Backbone")
    peer = randomize(build(config(out_features=chosen, **options))).eval()
    network = create_model(f"convnext{version}_tiny", num_classes=0, **options)
    ours = Backbone(network, chosen).eval()
    weights = peer.state_dict()
    for key, value in ours.hidden_states_norms.state_dict().items():
        value.copy_(weights.pop(f"hidden_states_norms.{key}"))
    last_norm = {k: v for k, v in network.state_dict().items() if k.startswith("head.norm")}
    load_weights(network, {**weights, **last_norm})  # which no backbone of theirs has
    x = images()
    for a, b in zip(ours(x).feature_maps, peer(x).feature_maps, strict=True):
        assert relative_error(a, b) <= TOLERANCE


# ours


@pytest.mark.parametrize("options", [{}, V2], ids=str)
def test_both_forms_of_an_mlp_are_one_function_of_the_same_weights(options, randomize):
    linear, conv = randomize(small(**options)).eval(), small(conv_mlp=True, **options).eval()
    conv.load_state_dict(
        {k: v.view_as(conv.state_dict()[k]) for k, v in linear.state_dict().items()}
    )
    x = images()
    assert relative_error(conv(x), linear(x)) <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": ()}, "depths"),
        ({"depths": (3, 0, 9, 3)}, r"depths=\(3, 0, 9, 3\)"),
        ({"dims": (96, 192)}, "one entry per stage"),
        ({"dims": (0, 192, 384, 768)}, r"dims=\(0, 192"),
        ({"mlp_ratio": 0.01}, "mlp_ratio=0.01"),
        ({"kernel_sizes": (7, 5)}, r"kernel_sizes=\(7, 5\)"),
        ({"kernel_sizes": 4}, "odd; got kernel_sizes=4"),
        ({"stem_type": "deep"}, "stem_type='deep'"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"in_chans": 0}, "in_chans=0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"drop_rate": 1.5}, "drop_rate=1.5"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"head_norm_eps": -1.0}, "head_norm_eps=-1.0"),
        ({"output_stride": 4}, "output_stride=4"),
        ({"output_stride": 24}, "output_stride=24"),
        ({"norm_layer": nn.BatchNorm2d}, "set conv_mlp=True"),
        (
            {"norm_layer": nn.BatchNorm2d, "conv_mlp": True, "norm_eps": 1e-5},
            "has its own eps",
        ),
        ({"head_hidden_size": 0}, "head_hidden_size=0"),
        ({"head_hidden_size": 8, "head_norm_first": True}, "give one of them"),
        ({"global_pool": ""}, "a classifier reads pooled features"),
        ({"global_pool": "", "num_classes": 0, "head_hidden_size": 8}, "pooled features"),
        ({"global_pool": "catavgmax"}, "set head_norm_first=True"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        ConvNeXtConfig(**options)


def test_a_config_is_a_value():
    lists = ConvNeXtConfig(depths=[3, 3, 9, 3], dims=[96, 192, 384, 768])
    assert lists == ConvNeXtConfig()
    assert hash(lists) == hash(ConvNeXtConfig())
    assert ConvNeXtConfig(kernel_sizes=[7] * 4) != ConvNeXtConfig()


def test_an_unknown_norm_activation_or_pool_is_refused():
    with pytest.raises(
        ValueError, match=r"layernorm2d, rmsnorm2d, simplenorm2d, or .* 'batchnorm'"
    ):
        small(norm_layer="batchnorm")
    with pytest.raises(ValueError, match="'gelo'"):
        small(act_layer="gelo")
    with pytest.raises(ValueError, match=r"one of avg, max, .* 'mean'"):
        small(global_pool="mean")


def test_a_classifier_that_cannot_be_leaves_the_model_as_it_was():
    model = small()
    for arguments in ((3, ""), (0, "catavgmax"), (-1,), (3, "mean")):
        with pytest.raises(ValueError, match=r"ConvNeXtConfig|got 'mean'"):
            model.reset_classifier(*arguments)
    assert model(images()).shape == (2, 10)
    assert model.config == small().config


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 4, 64, 64), (2, 3, 4, 64, 64)])
def test_refuses_what_is_not_a_batch_of_images(shape):
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), got \(\d"):
        small()(images(*shape))


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, 32), ({"stem_type": "overlap"}, 29), ({"output_stride": 8}, 8), ({"patch_size": 2}, 32)],
    ids=str,
)
def test_takes_images_down_to_one_pixel_per_stage(options, size, randomize):
    model = randomize(small(**options)).eval()
    assert model(images(1, 3, size, 40)).shape == (1, 10)
    assert model(images(0, 3, 40, 40)).shape == (0, 10)
    with pytest.raises(ValueError, match=r"takes images of \d+ x \d+ pixels and more.* stride"):
        model(images(1, 3, 40, size - 1))


@pytest.mark.parametrize("options", [{}, {"head_norm_first": True}, {"head_hidden_size": 8}])
def test_a_feature_extractor_keeps_no_weight_it_does_not_use(options):
    model = small(**options)
    model.keep_features()
    sum(f.sum() for f in model(images())).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_early_features_take_smaller_images():
    model = create_model("convnext_atto", features_only=True, out_indices=(0, 1)).eval()
    assert [f.shape[2:] for f in model(images(1, 3, 8, 9))] == [(2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, 2), ({"output_stride": 16}, 4), ({"output_stride": 8}, 8), ({"patch_size": 2}, 2)],
    ids=str,
)
def test_output_stride_is_that_of_the_features(options, size):
    model = small(**options).eval()
    assert model.forward_features(images(1, 3, 65, 65)).shape == (1, 40, size, size)
    assert model.feature_info[-1]["reduction"] == 64 // size


@pytest.mark.parametrize("options", [{}, {"conv_mlp": True, **V2}], ids=str)
def test_stochastic_depth_drops_branches_in_training_only(options, randomize):
    model = randomize(small(depths=(1, 1, 1, 2), drop_path_rate=1.0, **options))
    block = model.stages[3].blocks[1]
    x = images(4, 40, 5, 6)
    assert isinstance(block.drop_path, DropPathAdd)
    assert torch.equal(block.train()(x), x)
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_keeps_channels_last(conv_mlp, randomize):
    model = randomize(small(conv_mlp=conv_mlp)).eval().to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    features = model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(features, model.forward_features(x.contiguous())) <= TOLERANCE


def test_copies_and_pickles(randomize):
    model = randomize(small(stem_type="overlap_act", head_hidden_size=8, **V2)).eval()
    x = images()
    for other in copies(model):
        assert other.config == model.config
        assert torch.equal(other(x), model(x))


FORMS = [{}, V2, {"conv_mlp": True, **V2}, {"head_norm_first": True, "norm_layer": "rmsnorm"}]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_symbolic_trace_keeps_the_function(options, randomize):
    model = randomize(small(**options)).eval()
    traced = torch.fx.symbolic_trace(model)
    x = images()
    assert torch.equal(traced(x), model(x))
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        traced(images(2, 4, 64, 64))
    with pytest.raises(ValueError, match="pixels and more"):
        traced(images(2, 3, 64, 31))


COMPILED = [
    ({}, True, "aot_eager"),
    ({"conv_mlp": True, **V2}, False, "aot_eager"),
    pytest.param({}, False, "aot_eager", marks=THOROUGH),
    pytest.param({"conv_mlp": True, **V2}, True, "aot_eager", marks=THOROUGH),
    *(
        pytest.param(options, training, "inductor", marks=THOROUGH)
        for options in ({}, {"conv_mlp": True, **V2})
        for training in (False, True)
    ),
]


@pytest.mark.parametrize(("options", "training", "compiler"), COMPILED, ids=str)
def test_compiles_to_one_graph(options, training, compiler, randomize):
    torch._dynamo.reset()
    model = randomize(small(depths=(1, 1), dims=(16, 24), **options)).train(training)
    reference = copy.deepcopy(model)
    x = images()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    actual, expected = compiled(x), reference(x)
    assert relative_error(actual, expected) <= TOLERANCE
    if training:
        actual.square().sum().backward()
        expected.square().sum().backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert relative_error(p.grad, q.grad) <= 1e-5


@THOROUGH
def test_stochastic_depth_compiles_to_one_graph(randomize):
    torch._dynamo.reset()
    model = randomize(small(depths=(1, 2), dims=(16, 24), drop_path_rate=0.5)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(16, 3, 32, 32)
    outputs = [compiled(x) for _ in range(2)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("options", [{}, {"conv_mlp": True, **V2}], ids=str)
def test_exports_with_dynamic_sizes(options, randomize):
    model = randomize(small(depths=(1, 1), dims=(16, 24), **options)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    height, width = (torch.export.Dim(name, min=33, max=1024) for name in ("height", "width"))
    shapes = ({0: batch, 2: height, 3: width},)
    program = torch.export.export(model, (images(),), dynamic_shapes=shapes)
    for shape in [(2, 3, 65, 49), (5, 3, 33, 100)]:
        x = images(*shape)
        assert relative_error(program.module()(x), model(x)) <= TOLERANCE


@pytest.mark.parametrize("options", [{}, {"conv_mlp": True, **V2}], ids=str)
def test_trains_alike_on_kernels_and_eager(options, device, randomize):
    """One network through the Triton kernels: in the interpreter, where there is no GPU."""
    model = small(depths=(1, 1), dims=(8, 12), num_classes=3, **options)
    model = randomize(model).double().to(device)
    x = images(2, 3, 17, 21).double().to(device)
    results: list[Any] = []
    for name in ("eager", "triton"):
        with vertebra.backend(name):
            trained = copy.deepcopy(model).train()
            trained(x).square().sum().backward()
            evaluated = trained.eval()(x)
        results.append((evaluated, [parameter.grad for parameter in trained.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)
