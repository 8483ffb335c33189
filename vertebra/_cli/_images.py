"""Photographs as files have them: turned upright, in RGB, eight bits a channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def open_image(path: Path) -> Any:
    """Return the image in a file, as Pillow's in mode RGB.

    It stands as its EXIF orientation says. Transparency is dropped and grays are repeated, as the
    loaders of torchvision and timm do; 16 bits become 8 by their scale, where Pillow would clip
    them. Of an animation, the first frame.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: it is no image that Pillow can read.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(f"{error}; images are read by Pillow: pip install pillow") from None
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(Image, upright)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _to_rgb(Image: Any, image: Any) -> Any:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError("its grays need more than 16 bits; save it with 8 or 16")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its grays are floats, of no known range; save it with 8 or 16 bits")
    elif "transparency" in image.info:
        image = image.convert("RGBA")  # a palette's transparency, which Pillow warns of in RGB
    return image.convert("RGB")
