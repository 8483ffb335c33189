"""Published weights: torchvision's members, the hub and folders; what prepares the images."""

import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

import vertebra
from vertebra.models import ImageTransform, Weights, _hub, get_weight, list_models, load_weights
from vertebra.models._pretrained import ENUMS

MEMBERS = [w for enum in ENUMS.values() for w in enum]


@pytest.fixture(scope="module")
def peers(torchvision):
    from torchvision import models

    return models


@pytest.mark.parity
def test_members_are_torchvisions(peers) -> None:
    for member in MEMBERS:
        theirs = peers.get_weight(str(member))
        assert member.url == theirs.url
        assert member.meta["_metrics"] == theirs.meta["_metrics"]
        assert member.meta.get("license") == theirs.meta.get("license")
        preset, mine = theirs.transforms(), member.transforms()
        assert [mine.crop_size] == preset.crop_size
        assert [mine.resize_size] == preset.resize_size
        assert mine.interpolation == preset.interpolation.value
        assert (list(mine.mean), list(mine.std)) == (preset.mean, preset.std)
        enum = type(member)
        assert enum["DEFAULT"].name == peers.get_model_weights(member.meta["model"]).DEFAULT.name


@pytest.mark.parity
def test_every_model_of_torchvision_has_its_members(peers) -> None:
    ours = set(list_models(pretrained=True))
    families = ("resnet", "resnext", "wide_resnet", "regnet", "convnext")
    theirs = {name for name in peers.list_models(module=peers) if name.startswith(families)}
    assert ours == theirs & set(list_models())


def test_names() -> None:
    member = get_weight("ResNet50_Weights.IMAGENET1K_V2")
    assert member is vertebra.models.ResNet50_Weights.DEFAULT is get_weight(str(member))
    assert pickle.loads(pickle.dumps(member)) is member
    with pytest.raises(ValueError, match=r"there are ResNet18_Weights.IMAGENET1K_V1, "):
        get_weight("ResNet18_Weights.IMAGENET1K_V2")
    with pytest.raises(ValueError, match=r"names are like ResNet50_Weights.IMAGENET1K_V2"):
        get_weight("IMAGENET1K_V2")
    with pytest.raises(AttributeError, match="ResNet51_Weights"):
        _ = vertebra.models.ResNet51_Weights


@pytest.fixture
def published(tmp_path, monkeypatch, randomize) -> dict[str, torch.Tensor]:
    """Put a checkpoint where torch keeps what it fetched for ResNet-18."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = randomize(vertebra.create_model("resnet18")).state_dict()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(weights, folder / "resnet18-f37072fd.pth")
    return weights


@pytest.mark.parametrize(
    "source",
    ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.DEFAULT", ENUMS["ResNet18_Weights"]["DEFAULT"]],
    ids=str,
)
def test_a_member_is_loaded(source: str | Weights, published) -> None:
    model = vertebra.create_model("resnet18", weights=source)
    assert all(torch.equal(value, published[key]) for key, value in model.state_dict().items())


def test_published_weights_start_another_task(published) -> None:
    model = vertebra.create_model("resnet18", weights="DEFAULT", num_classes=7, in_chans=1)
    assert torch.equal(model.layer4[1].conv2.weight, published["layer4.1.conv2.weight"])
    assert model.fc.out_features == 7
    with pytest.raises(ValueError, match="Only the classifier differs"):
        load_weights(model, published)


def test_a_member_is_fetched_with_its_hash(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fetched = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args: fetched.append(args))
    path = ENUMS["ResNet34_Weights"]["DEFAULT"].download(progress=False)
    assert fetched == [
        ("https://download.pytorch.org/models/resnet34-b627a593.pth", str(path), "b627a593", False)
    ]
    assert path.parent.is_dir()


@pytest.mark.parametrize(
    "error", [URLError("no network"), RuntimeError("invalid hash value"), OSError("disk full")]
)
def test_a_member_that_cannot_be_fetched_says_where_it_belongs(error, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    said = getattr(error, "reason", str(error))
    with pytest.raises(OSError, match=rf"ResNet34_Weights.* {said}; put the file into .*hub"):
        ENUMS["ResNet34_Weights"]["DEFAULT"].download()


@pytest.fixture
def hub(tmp_path, monkeypatch, randomize):
    """Put a folder of safetensors in the place of the hub; return the calls and the weights."""
    safetensors = pytest.importorskip("safetensors.torch")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    weights = randomize(vertebra.create_model("resnet18")).state_dict()
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    calls = []

    def fetch(repository: str, file: str, revision: str | None) -> str:
        calls.append((repository, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return calls, weights, tmp_path


@pytest.mark.parametrize(
    ("source", "revision"),
    [
        ("timm/resnet18.a1_in1k", None),
        ("hf-hub:timm/resnet18.a1_in1k", None),
        ("timm/resnet18.a1_in1k@v1.0", "v1.0"),
    ],
)
def test_a_repository_is_loaded(source: str, revision: str | None, hub) -> None:
    calls, weights, _ = hub
    model = vertebra.create_model("resnet18", weights=source)
    assert calls == [("timm/resnet18.a1_in1k", "model.safetensors", revision)]
    assert torch.equal(model.conv1.weight, weights["conv1.weight"])


def test_a_folder_is_loaded(hub) -> None:
    _, weights, folder = hub
    for source in (folder, f"local-dir:{folder}"):
        model = vertebra.create_model("resnet18", weights=source)
        assert torch.equal(model.conv1.weight, weights["conv1.weight"])
    with pytest.raises(FileNotFoundError, match=r"has none of model.safetensors"):
        load_weights(vertebra.create_model("resnet18"), folder.parent)


def test_a_repository_without_safetensors(hub, monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(repository: str, file: str, revision: str | None) -> str:
        if file != "pytorch_model.bin":
            raise EntryNotFoundError(file)
        return "somewhere"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert _hub.download("owner/name") == Path("somewhere")
    monkeypatch.setattr(_hub, "FILES", ("model.safetensors",))
    with pytest.raises(FileNotFoundError, match="the hub's 'owner/name' has none of"):
        _hub.download("owner/name")


def test_a_missing_file_is_no_repository() -> None:
    for name in ("weights/resnet18.pth", "resnet18.safetensors", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            vertebra.create_model("resnet18", weights=name)


@pytest.mark.parity
@pytest.mark.parametrize("size", [(60, 90), (90, 61), (64, 64)], ids=str)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_images_are_prepared_as_by_torchvision(size, interpolation: str, torchvision) -> None:
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = ImageTransform(crop_size=33, resize_size=40, interpolation=interpolation)
    theirs = ImageClassification(
        crop_size=33, resize_size=40, interpolation=InterpolationMode(interpolation)
    )
    torch.testing.assert_close(ours(image), theirs(image))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    prepared = ours(tensor)
    # torchvision rounds a resized tensor of bytes to bytes
    torch.testing.assert_close(prepared, theirs(tensor), rtol=0, atol=0.6 / 255 / 0.224)
    assert torch.equal(ours(tensor[None])[0], prepared)
    assert torch.equal(ours(tensor.float() / 255), prepared)
