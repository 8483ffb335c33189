"""Preparing an image as the models were trained to see it."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageTransform:
    """Resize, centre crop, scale to [0, 1], normalise: torchvision's ImageNet preset.

    Called with a PIL image, or a (3, H, W) or (N, 3, H, W) tensor of bytes or of floats in [0, 1];
    returns floats, (3, crop_size, crop_size), with the batch if there was one.

    Args:
        crop_size: height and width of what comes out.
        resize_size: what the short side of the image is resized to first, with antialiasing; at
            least `crop_size`.
        mean: subtracted, per channel.
        std: divided by, per channel.
        interpolation: "bilinear" or "bicubic".
        keep_ratio: resize the long side alike. If not, both sides become `resize_size`, as in
            timm's `crop_mode="squash"` and transformers' ConvNeXts for 384 pixels and more.
        round_down: a crop that cannot stand in the very middle stands half a pixel up or left of
            it, as in transformers, instead of at the even one of both places.
    """

    crop_size: int = 224
    resize_size: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    keep_ratio: bool = True
    round_down: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.crop_size <= self.resize_size:
            raise ValueError(
                f"a crop of {self.crop_size} pixels has no place in an image whose short side is "
                f"{self.resize_size}; resize_size must be at least crop_size, and that at least 1"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f"interpolation must be bilinear or bicubic; got {self.interpolation!r}"
            )

    def __call__(self, image: Any) -> Tensor:
        return self.normalise(self.crop(self.resize(image)))

    def resize(self, image: Any) -> Tensor:
        """Return the image with its short side resized, (..., 3, H, W) in [0, 1]."""
        if isinstance(image, Tensor):
            return self._resize_tensor(image)
        from PIL import Image

        method = Image.Resampling[self.interpolation.upper()]
        resized = image.convert("RGB").resize(self._shape(*image.size), method)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255

    def _resize_tensor(self, image: Tensor) -> Tensor:
        x = image.float() if image.is_floating_point() else image.float() / 255
        width, height = self._shape(x.shape[-1], x.shape[-2])
        y = F.interpolate(
            x if x.dim() == 4 else x[None],
            size=(height, width),
            mode=self.interpolation,
            align_corners=False,
            antialias=True,
        )
        y = y.clamp(0, 1)
        return y if x.dim() == 4 else y[0]

    def _shape(self, width: int, height: int) -> tuple[int, int]:
        short = self.resize_size
        if not self.keep_ratio:
            return short, short
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short

    def crop(self, x: Tensor) -> Tensor:
        """Return the centre of (..., H, W)."""
        size = self.crop_size
        place = floor if self.round_down else round
        top, left = (place((side - size) / 2) for side in x.shape[-2:])
        return x[..., top : top + size, left : left + size]

    def normalise(self, x: Tensor) -> Tensor:
        """Return (..., 3, H, W) with the mean subtracted, divided by the standard deviation."""
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std
