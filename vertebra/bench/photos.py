"""Real images: scikit-learn's two photographs through ImageNet's preprocessing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models import ImageTransform


def transform(size: int) -> ImageTransform:
    """Return torchvision's first ImageNet preset, for images of another size."""
    return ImageTransform(crop_size=size, resize_size=size * 256 // 224)


def preprocess(image: Any, size: int = 224) -> Tensor:
    """Return the normalised centre crop of a PIL image."""
    return transform(size)(image)


def batch(count: int, size: int = 224) -> Tensor:
    """Return (count, 3, size, size) images: the photographs' centre crops, then other crops.

    Every other pair of those is mirrored; they are the same ones every time.
    """
    photos = [transform(size).resize(photo) for photo in load()]
    centres = [preprocess(photo, size) for photo in load()]
    generator = torch.Generator().manual_seed(0)
    images = centres[:count]
    while len(images) < count:
        photo = photos[len(images) % len(photos)]
        top, left = (
            int(torch.randint(side - size + 1, (), generator=generator)) for side in photo.shape[1:]
        )
        crop = transform(size).normalise(photo[:, top : top + size, left : left + size])
        images.append(crop.flip(-1) if len(images) // len(photos) % 2 else crop)
    return torch.stack(images)


def load() -> list[Any]:
    """Return the photographs, as Pillow's images."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pictures: Any = load_sample_images()
    return [Image.fromarray(picture) for picture in pictures.images]
