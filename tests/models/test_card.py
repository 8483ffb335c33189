"""What lies beside weights, read as timm and transformers read it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vertebra
from vertebra.models import ImageTransform, _fitting, _hub, get_weight
from vertebra.models._card import labels_of, of_timm, of_transformers, read_card
from vertebra.models._fitting import recognise_model, sizes_of
from vertebra.models._pretrained import member_of

Image = pytest.importorskip("PIL.Image")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def image() -> Any:
    pixels = np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def put(folder: Path, metadata: dict[str, str] | None = None, **files: dict[str, Any]) -> Path:
    safetensors.save_file({"x": torch.zeros(1)}, folder / "model.safetensors", metadata)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


TIMM = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "crop_pct": 0.9}
CONVNEXT = {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875}

# ------------------------------------------------------------------------------- who says what


def test_a_member_says_all(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    member = get_weight("RegNet_Y_16GF_Weights.IMAGENET1K_SWAG_E2E_V1")
    path = tmp_path / "hub" / "checkpoints" / member.value.file
    path.parent.mkdir(parents=True)
    path.touch()
    for source in (member, str(member)):
        card = read_card(source)
        assert card.found.path == path
        assert (card.model, card.transform_from) == ("regnet_y_16gf", str(member))
        assert card.transform == ImageTransform(384, 384, interpolation="bicubic")
    assert member_of("regnet_y_16gf", "IMAGENET1K_SWAG_E2E_V1") is member
    assert member_of("regnet_y_16gf", "IMAGENET1K_V9") is None
    assert member_of("regnety_160", "DEFAULT") is None


def test_a_folder_says_what_is_in_it(tmp_path) -> None:
    card = read_card(str(put(tmp_path)))
    assert card[1:] == (None, {}, None, "", None, "")
    config = {"architecture": "resnet18", "pretrained_cfg": TIMM, "label_names": ["a", "b"]}
    card = read_card(str(put(tmp_path, config=config)))
    assert card.model == "resnet18"
    assert card.transform == of_timm(TIMM)
    assert card.labels == ("a", "b")
    assert card.transform_from == card.labels_from == "config.json"
    card = read_card(str(put(tmp_path, preprocessor_config=CONVNEXT)))
    assert card.transform == of_transformers(CONVNEXT)
    assert (card.transform_from, card.labels_from) == ("preprocessor_config.json", "config.json")
    assert read_card(str(tmp_path / "model.safetensors")) == card


def test_timms_older_configs(tmp_path) -> None:
    config = {"architecture": "resnet18", "labels": ["a", "b"], **TIMM}
    card = read_card(str(put(tmp_path, config=config)))
    assert (card.transform, card.labels) == (of_timm(TIMM), ("a", "b"))


def test_a_header_of_safetensors_says_the_same(tmp_path) -> None:
    header = {
        "format": "pt",
        "architecture": "resnet18",
        "pretrained_cfg": json.dumps(TIMM),
        "id2label": json.dumps({"0": "a", "1": "b"}),
    }
    card = read_card(str(put(tmp_path, header) / "model.safetensors"))
    assert (card.model, card.transform, card.labels) == ("resnet18", of_timm(TIMM), ("a", "b"))
    assert card.transform_from == card.labels_from == "model.safetensors"
    header["id2label"] = "a, b"
    with pytest.raises(ValueError, match=r"id2label in the header of .*model.safetensors.* JSON"):
        read_card(str(put(tmp_path, header)))


def test_options_that_no_weight_shows(tmp_path) -> None:
    config = {"architecture": "resnet18", "model_args": {"act_layer": "silu", "num_classes": 3}}
    assert read_card(str(put(tmp_path, config=config))).options == {"act_layer": "silu"}
    config = {"model_type": "convnext", "layer_norm_eps": 1e-12}
    assert read_card(str(put(tmp_path, config=config))).options == {"head_norm_eps": 1e-12}


def test_the_hub_is_asked_for_both(monkeypatch, tmp_path) -> None:
    put(tmp_path, config={"architecture": "resnet18", "pretrained_cfg": TIMM})
    asked = []

    def fetch(repository: str, file: str) -> Path | None:
        asked.append((repository, file))
        return tmp_path / file if (tmp_path / file).is_file() else None

    monkeypatch.setattr(_hub, "fetch", fetch)
    card = read_card("hf-hub:owner/name")
    assert (card.model, card.found.repository) == ("resnet18", "owner/name")
    files = ("model.safetensors", "config.json", "preprocessor_config.json")
    assert asked == [("owner/name", file) for file in files]


def test_a_hub_out_of_reach_is_not_taken_for_an_empty_one(monkeypatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(*args: Any, **kwargs: Any) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(FileNotFoundError, match=r"'owner/name': model.safetensors .* be reached"):
        read_card("owner/name")


@pytest.mark.parametrize("content", ["{", "[1]", '"x"'])
def test_a_config_that_makes_no_sense(content: str, tmp_path) -> None:
    (put(tmp_path) / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json must (be JSON|hold a JSON object)"):
        read_card(str(tmp_path))


# ----------------------------------------------------------------------------------- the names


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({}, None),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"label_names": ["n1", "n0"], "label_descriptions": {"n1": "one"}}, ("one", "n0")),
        ({"label_names": {"0": "n0", "1": "n1"}}, ("n0", "n1")),
    ],
)
def test_labels(config, labels) -> None:
    assert labels_of(config) == labels


def test_gaps_between_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 2 names numbered 0 to 2"):
        labels_of({"id2label": {"0": "a", "2": "c"}})


# ----------------------------------------------------------------------------------- the image


@pytest.mark.parity
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_prepared_as_by_timm(crop_pct, crop_mode, interpolation, image, timm) -> None:
    config = {**TIMM, "crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
    theirs = timm.data.create_transform(**config, is_training=False)
    torch.testing.assert_close(of_timm(config)(image), theirs(image))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ConvNext", {"size": {"shortest_edge": 33}}),
        ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.95, "resample": 2}),
        ("ConvNext", {"size": {"shortest_edge": 384}}),
        ("ConvNext", {"size": 48, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}),
        ("ViT", {"size": {"height": 32, "width": 32}}),
        ("ViT", {"size": 40, "do_normalize": False}),
        ("Bit", {"size": {"shortest_edge": 41}, "crop_size": {"height": 33, "width": 33}}),
        ("Bit", {"size": 45, "crop_size": 32}),
    ],
)
def test_images_are_prepared_as_by_transformers(kind, options, image, transformers, tmp_path):
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**options)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    for said in (config, {**config, **options}):  # a mere number is how it was once said
        torch.testing.assert_close(of_transformers(said)(image), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"do_resize": False}, "must resize"),
        ({"do_rescale": False}, "do_rescale False"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0"),
        ({"resample": 0}, "resample 0"),
        ({"size": {"height": 3, "width": 4}}, "height and width of a square"),
        ({"size": {"longest_edge": 4}}, "height and width of a square"),
        ({"size": None}, "height and width of a square"),
    ],
)
def test_what_transformers_does_and_we_do_not(change, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        of_transformers({**CONVNEXT, **change})


def test_images_of_any_proportions_are_refused() -> None:
    with pytest.raises(ValueError, match="DetrImageProcessor leaves images of any proportions"):
        of_transformers(
            {"image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 800}}
        )


@pytest.mark.parametrize(
    "change", [{"crop_mode": "border"}, {"input_size": [3, 32, 64]}, {"interpolation": "lanczos"}]
)
def test_what_timm_does_and_we_do_not(change) -> None:
    with pytest.raises(ValueError, match=r"square inputs|must be bilinear or bicubic"):
        of_timm({**TIMM, **change})


@pytest.mark.parametrize("sizes", [(0, 10), (11, 10)])
def test_a_crop_without_a_place_is_refused(sizes) -> None:
    with pytest.raises(ValueError, match="resize_size must be at least crop_size"):
        ImageTransform(*sizes)


# -------------------------------------------------------------------------------- the network


def test_weights_name_their_network(monkeypatch) -> None:
    monkeypatch.setattr(_fitting, "list_models", lambda: ["convnext_atto", "convnext_femto"])
    state = vertebra.create_model("convnext_atto", num_classes=3, in_chans=2).state_dict()
    assert recognise_model(state) == "convnext_atto"
    assert sizes_of("convnext_atto", state) == (3, 2)
    assert sizes_of("convnext_femto", state) is None
    assert sizes_of("convnext_femto", state, dims=(40, 80, 160, 320)) == (3, 2)
    with pytest.raises(ValueError, match="these weights fit no model"):
        recognise_model({"x": torch.zeros(1)})


def test_networks_that_differ_in_initial_weights_alone_are_one(monkeypatch) -> None:
    names = ["regnet_y_400mf", "regnety_004", "resnet18", "resnetblur18"]
    monkeypatch.setattr(_fitting, "list_models", lambda: names)
    state = vertebra.create_model("regnety_004").state_dict()
    assert recognise_model(state) == "regnet_y_400mf"
    with pytest.raises(ValueError, match="fit resnet18, resnetblur18"):
        recognise_model(vertebra.create_model("resnet18").state_dict())


def test_weights_behind_the_prefix_of_a_head() -> None:
    head = vertebra.models.ForImageClassification(vertebra.create_model("resnet10t"))
    model = vertebra.create_model("resnet10t", weights=head.state_dict())
    assert torch.equal(model.conv1[0].weight, head.network.conv1[0].weight)
