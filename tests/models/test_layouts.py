"""Weights travel between libraries, by way of their own models, and come back as they were."""

import pytest
import torch

from vertebra.bench import parity, peers
from vertebra.models import create_model, export_weights, load_weights
from vertebra.models._layouts import LAYOUTS, recognise

NAMES = {"resnet": "resnet18", "regnet": "regnet_y_400mf", "convnext": "convnext_tiny"}
TIMM = {"regnet_y_400mf": "regnety_004"}  # where timm's name is another


@pytest.fixture(params=NAMES.values())
def name(request) -> str:
    return request.param


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parity
def test_round_trip(name: str, randomize) -> None:
    """transformers, here, torchvision, here, timm, here: strictly, and to the bit."""
    start = randomize(peers.transformers_model(name))
    ours = create_model(name, weights=start.state_dict()).state_dict()
    for library, known_as in (("torchvision", name), ("timm", TIMM.get(name, name))):
        model = create_model(name, weights=ours)
        peer = parity.BUILDERS[library](known_as).to_empty(device="cpu")
        peer.load_state_dict(export_weights(model, library))
        assert same(create_model(name, weights=peer.state_dict()).state_dict(), ours)
    model = create_model(name, weights=ours)
    assert same(export_weights(model, "transformers"), start.state_dict())


@pytest.mark.parametrize("family", LAYOUTS)
def test_every_layout_is_recognised(family: str, randomize) -> None:
    model = randomize(create_model(NAMES[family]))
    own = model.state_dict()
    for layout in LAYOUTS[family]:
        exported = export_weights(model, layout)
        assert len(exported) == len(own)
        assert recognise(own.keys(), exported, family).keys() == own.keys()
        twin = create_model(NAMES[family], weights={"model": exported})
        assert same(twin.state_dict(), own), layout


@pytest.mark.parity
def test_transformers_without_a_classifier(name: str, randomize) -> None:
    """Their other models call the backbone nothing, and have no classifier."""
    whole = randomize(peers.transformers_model(name))
    base = getattr(whole, whole.base_model_prefix)
    models = [create_model(name, num_classes=0, weights=m.state_dict()) for m in (whole, base)]
    assert same(models[0].state_dict(), models[1].state_dict())
    model = create_model(name)
    load_weights(model, base.state_dict(), keep_classifier=True)
    loaded, headless = model.state_dict(), models[0].state_dict()
    assert same({key: loaded[key] for key in headless}, headless)


@pytest.mark.parity
def test_linear_and_convolutional_mlps_load_each_other(randomize) -> None:
    ours = randomize(create_model("convnext_atto"))
    other = create_model("convnext_atto", conv_mlp=False, weights=ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(other.eval()(x), ours.eval()(x), rtol=1e-4, atol=1e-4)
    back = create_model("convnext_atto", weights=other.state_dict())
    assert same(back.state_dict(), ours.state_dict())


def test_an_unknown_layout() -> None:
    with pytest.raises(
        ValueError, match="layouts of resnet are torchvision, timm, transformers; got 'keras'"
    ):
        export_weights(create_model("resnet18"), "keras")


@pytest.mark.parametrize("name", ["seresnet18", "resnet50d", "regnetv_040", "convnext_tiny_hnf"])
def test_what_a_layout_cannot_express_is_refused(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name)
    with pytest.raises(ValueError, match=r"transformers has no name for .*with this option"):
        export_weights(model, "transformers")


@pytest.mark.parametrize(
    ("name", "options", "layout"),
    [
        ("resnetblur18", {}, "transformers"),
        ("resnetaa50", {}, "torchvision"),
        ("resnet50", {"downsample_in_bottleneck": True}, "timm"),
        ("resnet18", {"downsample_in_first_stage": True}, "torchvision"),
    ],
)
def test_what_no_weight_shows_is_refused_too(name: str, options: dict, layout: str) -> None:
    with torch.device("meta"):
        model = create_model(name, **options)
    with pytest.raises(ValueError, match=rf"{layout} has no resnet with \w+=.*no weight shows"):
        export_weights(model, layout)
    assert export_weights(model, "transformers" if options else "timm")


def test_weights_of_another_family_are_refused() -> None:
    regnet = create_model("regnet_x_400mf")
    for weights in (regnet.state_dict(), export_weights(regnet, "transformers")):
        with pytest.raises(ValueError, match="They fit regnet_x_400mf or regnetx_004_tv"):
            load_weights(create_model("resnet18"), weights)
