"""The images: torchvision's preprocessing to the bit, and a batch without two alike."""

import numpy as np
import pytest
import torch

from vertebra.bench import peers, photos
from vertebra.models._transforms import IMAGENET_MEAN, IMAGENET_STD

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")


@pytest.mark.parity
@pytest.mark.parametrize("size", [224, 64, 97])
@pytest.mark.parametrize("shape", [(427, 640), (300, 211), (256, 256), (61, 333)])
@pytest.mark.parametrize("version", ["transforms", "transforms.v2"])
def test_preprocessing_is_torchvisions(version, shape, size) -> None:
    pytest.importorskip("torchvision")
    transforms = peers.torchvision_module(version)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if version == "transforms":
        to_tensor = [transforms.ToTensor()]
    else:
        to_tensor = [transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True)]
    pipeline = transforms.Compose(
        [
            transforms.Resize(size * 256 // 224),
            transforms.CenterCrop(size),
            *to_tensor,
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    ours = photos.preprocess(image, size)
    torch.testing.assert_close(ours, torch.as_tensor(pipeline(image)), rtol=0, atol=1e-6)


def test_a_batch_is_the_same_every_time_and_no_two_images_are() -> None:
    images = photos.batch(9, 48)
    assert images.shape == (9, 3, 48, 48)
    assert torch.equal(images, photos.batch(9, 48))
    assert all(not torch.equal(images[i], images[j]) for i in range(9) for j in range(i))


def test_a_batch_begins_with_the_centre_crops() -> None:
    images = photos.batch(4, 48)
    assert torch.equal(images[:2], photos.batch(2, 48))
    assert torch.equal(images[:1], photos.batch(1, 48))
