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
from vertebra.models import RegNet, RegNetConfig, create_model, list_models
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
    """torchvision's module, whose rule for the widths works on the meta device too."""
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


TIMM_OPTIONS: list[dict[str, Any]] = [
    {},
    {"group_min_ratio": 0.9},
    {"se_ratio": 0.25},
    {"act_layer": "silu", "se_ratio": 0.25},
    {"bottle_ratio": 4.0, "se_ratio": 0.25, "linear_out": True, "downsample": None},
    {"linear_out": True, "num_features": 24, "in_chans": 5},
    {"downsample": "avg"},
    {"downsample": "avg", "output_stride": 8},
    {"output_stride": 8, "se_ratio": 0.25},
    {"output_stride": 16, "drop_rate": 0.4},
    {"preact": True, "se_ratio": 0.25, "act_layer": "silu"},
    {"preact": True, "downsample": "avg", "output_stride": 8},
    {"preact": True, "downsample": None, "num_features": 24},
    {"num_classes": 0, "stem_width": 24},
]


@pytest.mark.parity
@pytest.mark.parametrize("options", TIMM_OPTIONS, ids=str)
def test_options_match_timm(options, timm, randomize):
    from timm.models import regnet

    rule = {"depth": 6, "w0": 24, "wa": 16.0, "wm": 1.6, "group_size": 16}
    peer = randomize(regnet.RegNet(regnet.RegNetCfg(**rule), **{"num_classes": 5, **options}))
    layer_type = "y" if "se_ratio" in options else "x"
    ours = create_model(
        "regnetx_002", layer_type=layer_type, **rule, **{"num_classes": 5, **options}
    )
    translate = partial(key_of_timm, ours.config)
    load_translated(ours, peer, translate)
    x = images(2, options.get("in_chans", 3), 65, 49)
    assert_same_output(ours, peer, x)
