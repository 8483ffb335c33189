"""Predictions: those of the peers' own models on their own images, by every road to weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vertebra
from vertebra.bench import peers, photos
from vertebra.models import _fitting
from vertebra.testing.parity import randomize

TINY = {"layers": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8}


def tiny(classes: int = 6, **options: Any) -> nn.Module:
    """A network of a few weights that tells one image from another."""
    model = randomize(vertebra.create_model("resnet18", num_classes=classes, **TINY, **options))
    return model.eval()


def put(folder: Path, model: nn.Module, **config: Any) -> Path:
    """Save weights and a config for them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    told = {"architecture": "resnet18", "model_args": TINY, **config}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch) -> None:
    """The peers' models are there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def folder(tmp_path) -> Path:
    return put(tmp_path / "tiny", tiny())


def opened(paths: list[Path]) -> list[Any]:
    return [Image.open(path) for path in paths]


def assert_predicts(report: dict[str, Any], logits: Tensor) -> None:
    """Require the five likeliest classes of each image, with their probabilities."""
    expected = logits.softmax(1).topk(5)
    images = report["images"]
    assert [[g["index"] for g in image["top"]] for image in images] == expected.indices.tolist()
    found = torch.tensor([[g["probability"] for g in image["top"]] for image in images])
    torch.testing.assert_close(found, expected.values)
    assert expected.values[0, 0] != expected.values[1, 0]  # it does tell them apart


# ----------------------------------------------------------------------------- the peers' own


@pytest.mark.parity
@pytest.mark.parametrize(
    "member", ["ResNet18_Weights.IMAGENET1K_V1", "RegNet_X_400MF_Weights.IMAGENET1K_V2"]
)
def test_torchvision(member: str, photographs, read, tmp_path, monkeypatch) -> None:
    """A member, whose file lies where torch would have put it; its preset; its categories."""
    models = peers.torchvision_module("models")
    theirs = models.get_weight(member)
    images = torch.stack([theirs.transforms()(photo) for photo in opened(photographs)])
    name = vertebra.get_weight(member).meta["model"]
    model = peers.torchvision_model(name)
    peers.randomise(model, images, 0)
    path = tmp_path / "hub" / "checkpoints" / theirs.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(model.state_dict(), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with torch.no_grad():
        expected = model.eval()(images)
    for args in (["--weights", member], ["--model", name, "--weights", member.partition(".")[2]]):
        report = read("predict", *photographs, *args)
        assert_predicts(report, expected)
        assert report["model"] == name
        assert report["transform"]["from"] == report["weights"] == member
        top = report["images"][0]["top"][0]
        assert top["label"] == theirs.meta["categories"][top["index"]]


@pytest.mark.parity
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_torchvisions(suffix: str, photographs, read, tmp_path) -> None:
    from safetensors.torch import save_file

    images = photos.batch(2)
    model = peers.torchvision_model("resnet18", num_classes=20)
    peers.randomise(model, images, 0)
    path = tmp_path / f"weights.{suffix}"
    (torch.save if suffix == "pth" else save_file)(model.state_dict(), path)
    report = read("predict", *photographs, "--model", "resnet18", "--weights", path)
    with torch.no_grad():
        assert_predicts(report, model.eval()(images))
    assert report["labels"] is None
    assert report["transform"]["from"] == "ImageNet's usual crop"


@pytest.mark.parity
@pytest.mark.parametrize("overlay", [{}, {"crop_mode": "squash", "crop_pct": 1.0}], ids=str)
def test_timm(overlay: dict[str, Any], photographs, read, tmp_path) -> None:
    """A folder that timm saves for the hub: name, classes, crop and interpolation are its own."""
    timm = peers.timm()
    model = timm.create_model("convnext_atto", num_classes=7, pretrained_cfg_overlay=overlay)
    randomize(model).eval()
    labels = [f"n{i}" for i in range(7)]
    timm.models._hub.save_for_hf(model, tmp_path, model_config={"label_names": labels})
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    report = read("predict", *photographs, "--weights", tmp_path)
    with torch.no_grad():
        assert_predicts(report, model(torch.stack([transform(p) for p in opened(photographs)])))
    assert (report["model"], report["labels"]) == ("convnext_atto", "config.json")
    assert all(g["label"] == labels[g["index"]] for g in report["images"][0]["top"])


@pytest.mark.parity
@pytest.mark.parametrize("family", ["resnet", "regnet", "convnext"])
def test_transformers(family: str, photographs, read, tmp_path) -> None:
    """A folder of `save_pretrained`, with an image processor beside the model."""
    transformers = peers.transformers()
    labels = {i: f"class of {i}" for i in range(9)}
    options = {
        "resnet": {
            "depths": [2, 2, 2, 2],
            "layer_type": "basic",
            "hidden_sizes": [64, 128, 256, 512],
        },
        "regnet": {"depths": [1, 3, 6, 6], "hidden_sizes": [48, 104, 208, 440], "groups_width": 8},
        "convnext": {"depths": [2, 2, 6, 2], "hidden_sizes": [40, 80, 160, 320]},
    }
    kind = {"resnet": "ResNet", "regnet": "RegNet", "convnext": "ConvNext"}[family]
    config = getattr(transformers, f"{kind}Config")(**options[family], id2label=labels)
    model = getattr(transformers, f"{kind}ForImageClassification")(config)
    randomize(model).eval().save_pretrained(tmp_path)
    processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": 224})
    processor.save_pretrained(tmp_path)
    name = {"resnet": "resnet18", "regnet": "regnet_y_400mf", "convnext": "convnext_atto"}[family]
    report = read("predict", *photographs, "--model", name, "--weights", tmp_path)
    with torch.no_grad():
        assert_predicts(report, model(**processor(opened(photographs), return_tensors="pt")).logits)
    assert report["labels"] == "config.json"
    assert report["transform"]["from"] == "preprocessor_config.json"
    top = report["images"][0]["top"][0]
    assert top["label"] == labels[top["index"]]


@pytest.mark.parity
def test_our_own_model_of_transformers(photographs, read, tmp_path) -> None:
    peers.transformers()
    from vertebra.interop.transformers import VertebraConfig, VertebraForImageClassification

    labels = {i: f"class of {i}" for i in range(6)}
    config = VertebraConfig(architecture="resnet18", model_args=TINY, id2label=labels)
    model = VertebraForImageClassification(config).eval()
    randomize(model).save_pretrained(tmp_path)
    report = read("predict", *photographs, "--weights", tmp_path)
    with torch.no_grad():
        assert_predicts(report, model(photos.batch(2)).logits)
    assert (report["model"], report["labels"]) == ("resnet18", "config.json")


def test_the_hub(folder, photographs, read, monkeypatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(repository: str, file: str, revision: str | None) -> str:
        assert (repository, revision) == ("owner/name", "v1")
        if not (folder / file).is_file():
            raise EntryNotFoundError(file)
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    found = read("predict", *photographs, "--weights", "owner/name@v1")
    assert found["images"] == read("predict", *photographs, "--weights", folder)["images"]


# ------------------------------------------------------------------------------- what is asked


def test_what_json_has(folder, photographs, read) -> None:
    report = read("predict", photographs[0], "--weights", folder, "--top", "2")
    (image,) = report.pop("images")
    assert report == {
        "model": "resnet18",
        "weights": str(folder),
        "device": "cpu",
        "dtype": "fp32",
        "transform": {
            "crop_size": 224,
            "resize_size": 256,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear",
            "keep_ratio": True,
            "round_down": False,
            "from": "ImageNet's usual crop",
        },
        "labels": None,
    }
    top = image.pop("top")
    assert image == {"path": str(photographs[0]), "width": 640, "height": 427}
    assert [set(guess) for guess in top] == [{"index", "label", "probability"}] * 2
    assert top[0]["probability"] > top[1]["probability"]
    assert {guess["label"] for guess in top} == {None}


def test_more_than_there_are(folder, photographs, read) -> None:
    (image,) = read("predict", photographs[0], "--weights", folder, "--top", "100")["images"]
    assert sorted(guess["index"] for guess in image["top"]) == list(range(6))
    assert sum(guess["probability"] for guess in image["top"]) == pytest.approx(1)


def test_many_images_are_many_batches(folder, photographs, read, monkeypatch) -> None:
    monkeypatch.setattr("vertebra._cli.predict._BATCH", 2)
    china, flower = (read("predict", p, "--weights", folder)["images"][0] for p in photographs)
    found = read("predict", *photographs, photographs[0], "--weights", folder)["images"]
    for image, alone in zip(found, [china, flower, china], strict=True):
        assert image["path"] == alone["path"]
        assert [g["index"] for g in image["top"]] == [g["index"] for g in alone["top"]]


@pytest.mark.parametrize(
    ("args", "sizes"),
    [
        (["--size", "112"], (112, 128)),
        (["--size", "64", "--resize", "64"], (64, 64)),
        (["--resize", "300"], (224, 300)),
    ],
)
def test_images_of_another_size(args, sizes, photographs, read, tmp_path) -> None:
    model = tiny()
    folder = put(tmp_path / "w", model)
    report = read("predict", *photographs, "--weights", folder, *args)
    transform = vertebra.models.ImageTransform(*sizes)
    with torch.no_grad():
        assert_predicts(report, model(torch.stack([transform(p) for p in opened(photographs)])))
    assert report["transform"]["from"] == "--size, --resize"


def test_low_precision(folder, photographs, read) -> None:
    exact, rounded = (
        read("predict", *photographs, "--weights", folder, "--dtype", dtype)
        for dtype in ("fp32", "bf16")
    )
    assert rounded["dtype"] == "bf16"
    for a, b in zip(exact["images"], rounded["images"], strict=True):
        assert a["top"][0]["index"] == b["top"][0]["index"]
        assert a["top"][0]["probability"] != b["top"][0]["probability"]


def test_random_weights_are_said_to_be(photographs, run) -> None:
    result = run("predict", photographs[0], "--model", "resnet10t", "--json")
    assert json.loads(result.stdout)["weights"] is None
    assert "resnet10t has random weights here, and its answers mean nothing" in result.stderr
    assert "DEFAULT" not in result.stderr  # nobody has published some by name
    assert "--weights DEFAULT" in run("predict", photographs[0], "--model", "resnet18").stderr


def test_people_read_it(folder, photographs, run, read, tmp_path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"[red]kind {i}\n" for i in range(6)))  # no markup of ours
    args = ("predict", *photographs, "--weights", folder, "--labels", labels)
    text = run(*args).stdout
    assert "resnet18, 0.0 M parameters, fp32 on cpu" in text
    assert "short side to 256 (bilinear), centre 224 x 224" in text
    for image in read(*args)["images"]:
        lines = text[text.index(image["path"]) :].splitlines()
        assert lines[0].split() == [image["path"], "640", "x", "427"]
        for line, guess in zip(lines[1:6], image["top"], strict=True):
            assert line.split()[0] == f"{guess['probability']:.2%}"
            assert f"[red]kind {guess['index']}" in line
            assert line.split()[-2:] == ["class", str(guess["index"])]


# ---------------------------------------------------------------------------------- the labels


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("labels.txt", "a\n b \nc\nd\ne\nf\n\n"),
        ("labels.json", '["a", "b", "c", "d", "e", "f"]'),
        ("labels.json", '{"0": "a", "1": "b", "2": "c", "3": "d", "5": "f", "4": "e"}'),
        ("labels.json", json.dumps({str(i): [f"n{i}", name] for i, name in enumerate("abcdef")})),
        ("labels.json", json.dumps({"id2label": dict(enumerate("abcdef")), "depths": [1]})),
    ],
)
def test_a_file_of_labels(file: str, content: str, folder, photographs, read, tmp_path) -> None:
    path = tmp_path / file
    path.write_text(content)
    report = read("predict", photographs[0], "--weights", folder, "--labels", path)
    assert report["labels"] == str(path)
    for guess in report["images"][0]["top"]:
        assert guess["label"] == "abcdef"[guess["index"]]


def test_a_file_of_labels_goes_before_the_weights_own(photographs, read, tmp_path) -> None:
    folder = put(tmp_path / "w", tiny(), label_names=list("uvwxyz"))
    report = read("predict", photographs[0], "--weights", folder)
    assert report["labels"] == "config.json"
    (tmp_path / "labels.txt").write_text("\n".join("abcdef"))
    for args, names in (((), "uvwxyz"), (("--labels", tmp_path / "labels.txt"), "abcdef")):
        (image,) = read("predict", photographs[0], "--weights", folder, *args)["images"]
        assert [g["label"] for g in image["top"]] == [names[g["index"]] for g in image["top"]]


@pytest.mark.parity
def test_a_thousand_classes_are_imagenets(photographs, read, tmp_path) -> None:
    categories = peers.torchvision_module("models").ResNet18_Weights.DEFAULT.meta["categories"]
    folder = put(tmp_path / "w", tiny(1000))
    report = read("predict", photographs[0], "--weights", folder)
    assert report["labels"] == "ImageNet-1K, by torchvision"
    for guess in report["images"][0]["top"]:
        assert guess["label"] == categories[guess["index"]]


def test_without_torchvision_classes_are_numbers(photographs, read, run, tmp_path, monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(peers, "torchvision_module", absent)
    folder = put(tmp_path / "w", tiny(1000))
    report = read("predict", photographs[0], "--weights", folder)
    assert report["labels"] is None
    index = report["images"][0]["top"][0]["index"]
    text = run("predict", photographs[0], "--weights", folder).stdout
    assert f"class {index}" in text.splitlines()[7]
    assert "labels   none: --labels FILE names the classes" in text


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "resnet5"], "no model is called 'resnet5'; did you mean resnet50"),
        (["--weights", "nowhere.pth"], "weights: there is no file nowhere.pth"),
        (["--weights", "ResNet50_Weights.V9"], "there are no weights 'ResNet50_Weights.V9'"),
        (["--weights", "{}", "--labels", "nowhere.txt"], "labels nowhere.txt: No such file"),
        (["--top", "0"], "--top"),
        (["--resize", "200"], "a crop of 224 pixels has no place in an image whose short side"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "gpu"], "device must be like cpu, cuda or cuda:1; got 'gpu'"),
    ],
)
def test_wrong_arguments(args: list[str], said: str, folder, photographs, refused) -> None:
    args = [str(folder) if arg == "{}" else arg for arg in args]
    assert said in refused("predict", photographs[0], *args)


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="it is there")
def test_a_gpu_that_is_not_there(photographs, refused) -> None:
    line = refused("predict", photographs[0], "--device", "cuda")
    assert "device 'cuda' cannot be used here" in line
    assert "`vertebra env`" in line


def test_no_photograph(folder, photographs, refused, tmp_path) -> None:
    assert "'nowhere.jpg' does not exist" in refused("predict", "nowhere.jpg")
    assert "is a directory" in refused("predict", tmp_path)
    (tmp_path / "text.jpg").write_text("hello")
    line = refused("predict", tmp_path / "text.jpg", "--weights", folder, "--json")
    assert "text.jpg is not an image that Pillow can read" in line


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("labels.txt", b"a\nb\n", "names 2 classes; the model has 6"),
        ("labels.json", b"[1, 2", "must hold names of classes"),
        ("labels.json", b"3", "must hold names of classes"),
        ("labels.json", b'{"1": "a", "2": "b"}', "numbered from 0 without a gap"),
        ("labels.txt", b"\xff\xfe", "must be text in UTF-8"),
    ],
)
def test_wrong_labels(file, content, said, folder, photographs, refused, tmp_path) -> None:
    (tmp_path / file).write_bytes(content)
    args = ("--weights", folder, "--labels", tmp_path / file)
    assert said in refused("predict", photographs[0], *args)


def test_weights_that_cannot_predict(photographs, refused, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_fitting, "list_models", lambda: ["resnet10t"])

    def line(model: nn.Module, **config: Any) -> str:
        return refused("predict", photographs[0], "--weights", put(tmp_path / "w", model, **config))

    assert "has no classifier" in line(tiny(0))
    assert "is for images of 4 channels" in line(tiny(in_chans=4))
    assert "names 2 classes, they have 6" in line(tiny(), label_names=["a", "b"])
    assert "no model is called 'vit_tiny'" in line(tiny(), architecture="vit_tiny")
    assert "unknown option 'depth'" in line(tiny(), model_args={"depth": 3})
    assert "these weights fit no model" in line(tiny(), architecture=None)


def test_weights_of_another_model(photographs, refused, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_fitting, "list_models", lambda: ["resnet10t", "resnet14t"])
    weights = tmp_path / "w.pth"
    torch.save(randomize(vertebra.create_model("resnet10t")).state_dict(), weights)
    line = refused("predict", photographs[0], "--weights", weights, "--model", "resnet14t")
    assert line.endswith("w.pth does not fit resnet14t; it fits resnet10t")


def test_weights_of_several_models(photographs, refused, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(_fitting, "list_models", lambda: ["resnet18", "resnet34", "resnetblur18"])
    torch.save(randomize(vertebra.create_model("resnet18")).state_dict(), tmp_path / "w.pth")
    line = refused("predict", photographs[0], "--weights", tmp_path / "w.pth")
    assert "fit resnet18, resnetblur18" in line
    assert line.endswith("name it with --model")


def test_an_answer_that_is_no_number(photographs, refused, tmp_path) -> None:
    model = tiny()
    nn.init.constant_(model.get_classifier().weight, 1e30)
    folder = put(tmp_path / "w", model)
    line = refused("predict", photographs[0], "--weights", folder, "--dtype", "fp16", "--json")
    assert line.endswith(
        "china.png: the network's answer in torch.float16 is not finite; try --dtype fp32"
    )
