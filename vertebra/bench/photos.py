"""Real images: scikit-learn's two photographs through ImageNet's preprocessing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def preprocess(image: Any, size: int = 224) -> Tensor:
    """Return the normalised centre crop of a PIL image, as torchvision's ImageNet presets do.

    Bilinear resize, with antialiasing, of the short side to 256/224 of `size`; crop; scale to
    [0, 1]; subtract the mean and divide by the standard deviation.
    """
    resized = _resize(image, size)
    _, height, width = resized.shape
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _normalise(resized[:, top : top + size, left : left + size])


def batch(count: int, size: int = 224) -> Tensor:
    """Return (count, 3, size, size) images: the photographs' centre crops, then other crops.

    Every other pair of those is mirrored; they are the same ones every time.
    """
    photos = [_resize(photo, size) for photo in _photos()]
    centres = [preprocess(photo, size) for photo in _photos()]
    generator = torch.Generator().manual_seed(0)
    images = centres[:count]
    while len(images) < count:
        photo = photos[len(images) % len(photos)]
        top, left = (
            int(torch.randint(side - size + 1, (), generator=generator)) for side in photo.shape[1:]
        )
        crop = _normalise(photo[:, top : top + size, left : left + size])
        images.append(crop.flip(-1) if len(images) // len(photos) % 2 else crop)
    return torch.stack(images)


def _photos() -> list[Any]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    pictures: Any = load_sample_images()
    return [Image.fromarray(picture) for picture in pictures.images]


def _resize(image: Any, size: int) -> Tensor:
    """Resize to a short side of 256/224 of `size`; return (3, H, W) in [0, 1]."""
    from PIL import Image

    width, height = image.size
    short = size * 256 // 224
    if width <= height:
        shape = short, int(short * height / width)
    else:
        shape = int(short * width / height), short
    pixels = np.array(image.convert("RGB").resize(shape, Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _normalise(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (image - mean) / std
