"""The registry: names, options and what is said about wrong ones."""

from typing import Any

import pytest
import torch
from torch import nn

import vertebra.models
from vertebra.models import ResNet, create_model, list_models, register_model
from vertebra.models import _registry as registry

# published counts: peers.md, and torchvision's `meta["num_params"]`
PARAMETERS = {
    "resnet10t": 5_435_488,
    "resnet14t": 10_081_632,
    "resnet18": 11_689_512,
    "resnet18d": 11_708_744,
    "resnet26": 15_995_176,
    "resnet26d": 16_014_408,
    "resnet26t": 16_011_872,
    "resnet34": 21_797_672,
    "resnet34d": 21_816_904,
    "resnet50": 25_557_032,
    "resnet50_gn": 25_557_032,
    "resnet50c": 25_576_264,
    "resnet50d": 25_576_264,
    "resnet50s": 25_680_808,
    "resnet50t": 25_573_728,
    "resnet101": 44_549_160,
    "resnet101c": 44_568_392,
    "resnet101d": 44_568_392,
    "resnet101s": 44_672_936,
    "resnet152": 60_192_808,
    "resnet152c": 60_212_040,
    "resnet152d": 60_212_040,
    "resnet152s": 60_316_584,
    "resnet200": 64_673_832,
    "resnet200d": 64_693_064,
    "resnext50_32x4d": 25_028_904,
    "resnext50d_32x4d": 25_048_136,
    "resnext101_32x4d": 44_177_704,
    "resnext101_32x8d": 88_791_336,
    "resnext101_32x16d": 194_026_792,
    "resnext101_32x32d": 468_530_472,
    "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}


def on_meta(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a test registers."""
    monkeypatch.setattr(registry, "_builders", dict(registry._builders))


def test_lists_every_name_once_and_sorted():
    assert list_models() == sorted(list_models())
    assert set(PARAMETERS) <= set(list_models())


@pytest.mark.parametrize("name", PARAMETERS)
def test_has_the_published_number_of_parameters(name):
    model = on_meta(name)
    assert isinstance(model, ResNet)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_lists_by_pattern():
    assert list_models("wide_*") == ["wide_resnet101_2", "wide_resnet50_2"]
    assert list_models("resnet18?") == ["resnet18d"]
    assert list_models("RESNET18") == []
    assert list_models("vgg*") == []


def test_torchvision_names_are_functions_too():
    functions = [name for name in vertebra.models.__all__ if name in PARAMETERS]
    assert len(functions) == 10
    for name in functions:
        with torch.device("meta"):
            model = getattr(vertebra.models, name)(num_classes=3)
        assert model.config == on_meta(name, num_classes=3).config


def test_named_arguments_reach_the_model():
    model = on_meta("resnet50", num_classes=7, in_chans=4, output_stride=16)
    assert model.fc.out_features == model.num_classes == 7
    assert model.conv1.in_channels == 4
    assert model.layer4[0].conv2.stride == (1, 1)
    assert isinstance(on_meta("resnet50", num_classes=0).fc, nn.Identity)


def test_peers_names_for_an_option_mean_ours():
    ours = {"layers": (1, 1, 1, 1), "groups": 2, "width_per_group": 32, "act_layer": "silu"}
    theirs = {"depths": [1, 1, 1, 1], "cardinality": 2, "base_width": 32, "hidden_act": "silu"}
    assert on_meta("resnet50", **ours).config == on_meta("resnet50", **theirs).config
    assert on_meta("resnet50", layer_type="basic").config == on_meta("resnet34").config
    assert on_meta("resnet18", zero_init_last=True).config.zero_init_residual


def test_an_option_given_twice_is_refused():
    with pytest.raises(TypeError, match="'groups' is given twice"):
        create_model("resnet50", groups=2, cardinality=4)


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(TypeError, match=r"'drop_block'.*act_layer.*replace_stem_pool.*width_per"):
        create_model("resnet50", drop_block=0.1)
    with pytest.raises(TypeError, match="'pretrained'"):
        vertebra.models.resnet18(pretrained=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "'resnet51'; did you mean .*resnet50"),
        ("resnext50_32x4", "did you mean resnext50_32x4d"),
        ("ResNet50", "resnet50"),
        ("transformer", "'transformer'; list_models"),
    ],
)
def test_an_unknown_name_suggests_the_closest(name, message):
    with pytest.raises(KeyError, match=message):
        create_model(name)


@pytest.mark.usefixtures("scratch")
def test_registers_a_builder_under_its_name():
    @register_model
    def tiny(**options: Any) -> nn.Module:
        options = {"layers": (1,), "hidden_sizes": (8,), **options}
        return vertebra.models.resnet18(**options)

    assert tiny.__name__ in list_models("t*")
    model = create_model("tiny", num_classes=2)
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 2)


@pytest.mark.usefixtures("scratch")
def test_a_name_is_taken_once():
    def resnet50(**options: Any) -> nn.Module:
        raise AssertionError

    with pytest.raises(ValueError, match="'resnet50' is registered already"):
        register_model(resnet50)
    assert register_model(resnet50, name="other") is resnet50
    assert "other" in list_models()


def test_scratch_names_are_gone():
    assert list_models("tiny") == list_models("other") == []
