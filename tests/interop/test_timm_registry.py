"""Our models through timm's registry: what timm's programs ask of a model that they create."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vertebra
from vertebra.interop.timm import register
from vertebra.models import Weights, export_weights, get_weight
from vertebra.testing.parity import randomize

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True, scope="module")
def names(timm) -> list[str]:
    return register()


NAMES = ["resnet18", "resnet18d", "regnety_002", "convnext_atto"]


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def images(channels: int = 3, size: int = 64) -> Tensor:
    return torch.randn(2, channels, size, size)


def test_every_model_is_listed_and_none_of_timms_is_shadowed(timm, names):
    assert register() == names
    assert sorted(timm.list_models("vertebra_*")) == sorted(names)
    assert names == [f"vertebra_{name}" for name in vertebra.list_models()]
    assert all(timm.is_model(name) and timm.is_model(f"{name}.tag") for name in names)
    assert timm.list_models(module="timm") == timm.list_models("vertebra_*")
    for name in set(timm.list_models()) - set(names):
        assert timm.model_entrypoint(name).__module__.startswith("timm.models.")
    exported = sys.modules["vertebra.interop.timm"]
    assert set(exported.__all__) == {"register", *names}
    assert all(callable(getattr(exported, name)) for name in names)


def test_timms_tools_read_what_they_read_of_timms_model(name, timm):
    ours, peer = timm.create_model(f"vertebra_{name}"), timm.create_model(name)
    assert isinstance(ours, vertebra.models._network.Network)
    assert ours.default_cfg is ours.pretrained_cfg
    for use_test_size in (False, True):
        found, expected = (
            timm.data.resolve_model_data_config(model, use_test_size=use_test_size)
            for model in (ours, peer)
        )
        assert found == expected
    named = ("architecture", "first_conv", "classifier")
    assert {k: v for k, v in ours.pretrained_cfg.items() if k not in named} == {
        k: v for k, v in peer.pretrained_cfg.items() if k not in named
    }
    assert ours.pretrained_cfg["architecture"] == f"vertebra_{name}"
    assert timm.get_pretrained_cfg_value(f"vertebra_{name}", "hf_hub_id").startswith("timm/")
    assert_layers_are_named(ours)
    tags = {tag.removeprefix("vertebra_") for tag in timm.list_pretrained(f"vertebra_{name}.*")}
    assert tags == set(timm.list_pretrained(f"{name}.*"))
    config = timm.models.get_model_input_config
    three, one = (timm.create_model(n, in_chans=1) for n in (f"vertebra_{name}", name))
    assert config(three)["input_size"] == config(one)["input_size"] == (1, 224, 224)


def assert_layers_are_named(model: nn.Module) -> None:
    config = model.pretrained_cfg
    assert model.get_submodule(config["first_conv"]) is model.stem_conv
    assert model.get_submodule(config["classifier"]) is model.get_classifier()


@pytest.mark.thorough
@pytest.mark.usefixtures("no_initialisation")
def test_the_layers_of_all_are_named(timm, names):
    for name in names:
        assert_layers_are_named(timm.create_model(name, device="meta"))


def test_weights_of_torchvision_are_a_tag_too(timm):
    name = "vertebra_regnet_y_16gf"
    weights: Weights = get_weight("RegNet_Y_16GF_Weights.IMAGENET1K_SWAG_E2E_V1")
    config = timm.models.get_pretrained_cfg(f"{name}.tv_imagenet1k_swag_e2e_v1")
    assert config.url == weights.url
    assert config.input_size == (3, 384, 384)
    assert config.interpolation == "bicubic"
    assert config.crop_pct == 1.0
    assert timm.models.get_pretrained_cfg(name).tag == "tv_imagenet1k_v2"  # the default
    assert len(timm.list_pretrained(f"{name}.*")) == 4
    smaller = timm.create_model("vertebra_regnet_y_400mf.tv_imagenet1k_v1", device="meta")
    assert_layers_are_named(smaller)
    assert smaller.pretrained_cfg["crop_pct"] == 224 / 256


def test_options(name, timm):
    name = f"vertebra_{name}"
    model = timm.create_model(
        *(name,), num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.2, global_pool="max"
    )
    assert model(images(1)).shape == (2, 7)
    assert model.drop_rate == 0.1
    assert model.config.drop_path_rate == 0.2
    assert timm.create_model(name, global_pool="fast", drop_path_rate=None).num_classes == 1000
    headless = timm.create_model(name, num_classes=0, global_pool="", device="meta")
    assert headless(images().to("meta")).dim() == 4
    assert headless.stem_conv.weight.is_meta
    assert timm.create_model(name, dtype=torch.double).stem_conv.weight.dtype == torch.double
    with pytest.raises(TypeError, match="unknown option 'rate'"):
        timm.create_model(name, rate=3)


@pytest.mark.parametrize("out_indices", [None, (1, 3), (-2, -1), 2])
def test_features(name, out_indices, timm):
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    ours, peer = (
        timm.create_model(n, features_only=True, **chosen) for n in (f"vertebra_{name}", name)
    )
    for attribute in ("channels", "reduction"):
        expected = getattr(peer.feature_info, attribute)()
        assert getattr(ours.feature_info, attribute)() == expected
    maps, expected = ours(images()), peer(images())
    assert [y.shape for y in maps] == [y.shape for y in expected]
    assert ours.pretrained_cfg == {
        **peer.pretrained_cfg,
        "architecture": f"vertebra_{name}",
        "first_conv": ours.pretrained_cfg["first_conv"],
    }
    assert ours.get_submodule(ours.pretrained_cfg["first_conv"]) is ours.stem_conv


WRAPPERS = {"resnet18": ("list", "dict", "hook", "fx", "getter")}


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "convnext_atto"])
def test_timms_wrappers_of_features(name, timm):
    """A list takes a network apart by its children; RegNet's stages, as torchvision's, are none."""
    whole = randomize(timm.create_model(f"vertebra_{name}")).eval()
    x = images()
    expected = whole.forward_intermediates(x, [1, 2], intermediates_only=True)
    options = {"features_only": True, "out_indices": (1, 2)}
    for kind in WRAPPERS.get(name, ("hook", "fx", "getter")):
        wrapped = timm.create_model(f"vertebra_{name}", feature_cls=kind, **options).eval()
        assert type(wrapped).__name__.startswith("Feature")
        source, state = whole.state_dict(), wrapped.state_dict()
        prefixes = ("model.", "graph_module.", "body.", "")
        for key, value in state.items():
            value.copy_(source[next(key[len(p) :] for p in prefixes if key.startswith(p))])
        found = wrapped(x)
        found = list(found.values()) if isinstance(found, dict) else found
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=kind)
    if name == "regnety_002":
        with pytest.raises(AssertionError, match="are not present in model"):
            timm.create_model(f"vertebra_{name}", feature_cls="list", **options)


def saved(tmp_path, weights: dict[str, Tensor]) -> str:
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return str(path)


def same(ours: nn.Module, peer: nn.Module, channels: int = 3) -> None:
    x = images(channels).double()
    torch.testing.assert_close(ours.double().eval()(x), peer.double().eval()(x))


def test_pretrained_takes_the_weights_of_timms_model(name, timm, tmp_path):
    """In timm's layout; whole, for another number of classes, for one channel, for features."""
    file = {"file": saved(tmp_path, randomize(timm.create_model(name)).state_dict())}
    options = {"pretrained": True, "pretrained_cfg_overlay": file}
    ours, peer = (timm.create_model(n, **options) for n in (f"vertebra_{name}", name))
    same(ours, peer)
    ours, peer = (
        timm.create_model(n, **options, num_classes=7, in_chans=1)
        for n in (f"vertebra_{name}", name)
    )
    ours.get_classifier().load_state_dict(peer.get_classifier().state_dict())  # random in both
    same(ours, peer, channels=1)
    ours, peer = (
        timm.create_model(n, **options, features_only=True).double().eval()
        for n in (f"vertebra_{name}", name)
    )
    x = images().double()
    torch.testing.assert_close(ours(x), peer(x))


def test_pretrained_asks_the_hub_for_the_weights_of_timms_model(timm, monkeypatch):
    asked = []
    weights = randomize(timm.create_model("resnet18")).state_dict()

    def load(source: str, *args: object, **kwargs: object) -> dict[str, Tensor]:
        asked.append(source)
        return dict(weights)

    builder: ModuleType = sys.modules["timm.models._builder"]
    monkeypatch.setattr(builder, "has_hf_hub", lambda necessary=False: True)
    monkeypatch.setattr(builder, "load_state_dict_from_hf", load)
    ours = timm.create_model("vertebra_resnet18", pretrained=True)
    timm.create_model("vertebra_resnet18.tv_in1k", pretrained=True)
    assert asked == ["timm/resnet18.a1_in1k", "timm/resnet18.tv_in1k"]
    assert torch.equal(ours.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_pretrained_takes_other_layouts(layout, timm, tmp_path):
    model = randomize(timm.create_model("vertebra_convnext_atto"))
    file = {"file": saved(tmp_path, export_weights(model, layout))}
    loaded = timm.create_model(
        "vertebra_convnext_atto", pretrained=True, pretrained_cfg_overlay=file
    )
    same(loaded, model)


@pytest.mark.usefixtures("no_initialisation")
def test_what_cannot_be_loaded_is_an_error(timm, tmp_path):
    other = vertebra.create_model("resnet34").state_dict()
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": saved(tmp_path, other)}}
    for classes in (1000, 7):  # with another number timm loads what fits and drops the rest
        with pytest.raises(ValueError, match=r"(?s)do not fit the model.*They fit resnet34"):
            timm.create_model("vertebra_resnet18", num_classes=classes, **options)
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(mine\)"):
        timm.create_model("vertebra_resnet18.mine")
    bare = next(name for name in register() if not timm.models.is_model_pretrained(name))
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {bare}"):
        timm.create_model(bare, pretrained=True)


def test_a_checkpoint_of_ours(name, timm, tmp_path):
    model = randomize(vertebra.create_model(name, num_classes=7))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "checkpoint.pth")
    for path in (tmp_path / "checkpoint.pth", saved(tmp_path, model.state_dict())):
        loaded = timm.create_model(f"vertebra_{name}", num_classes=7, checkpoint_path=path)
        same(loaded, model)


def test_a_model_registered_later(timm, monkeypatch):
    registry = sys.modules["vertebra.models._registry"]
    monkeypatch.setattr(registry, "_builders", dict(registry._builders))

    def mine(**options: object) -> vertebra.models.ResNet:
        options.pop("weights", None)
        return vertebra.create_model("resnet18", layers=(1, 1, 1, 1), **options)

    vertebra.register_model(mine)
    assert "vertebra_mine" in register()
    model = timm.create_model("vertebra_mine", num_classes=3)
    assert model(images()).shape == (2, 3)
    assert_layers_are_named(model)
    # no model of this name remains for other tests
    sys.modules["timm.models._registry"]._clear_model_entries("vertebra_mine")
    del sys.modules["timm.models._registry"]._model_entrypoints["vertebra_mine"]
    exported = sys.modules["vertebra.interop.timm"]
    del exported.vertebra_mine
    exported.__all__.remove("vertebra_mine")


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        register()
