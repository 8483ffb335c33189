"""The names of classes: from a file, or those of ImageNet-1K."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models._card import in_order, labels_of

IMAGENET_CLASSES = 1000


def read_labels(path: Path) -> tuple[str, ...]:
    """Return the names in a file: one a line, or JSON, a list, names by number, or a config.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"labels {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} must be text in UTF-8: a name of a class a line, or JSON"
        ) from None
    if path.suffix.lower() != ".json":
        return tuple(line.strip() for line in text.rstrip().splitlines())
    try:
        content: Any = json.loads(text)
        if isinstance(content, Mapping) and (labels := labels_of(content)):
            return labels
        return in_order(content)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold names of classes, in a list or by number: {error}"
        ) from None


def imagenet_labels() -> tuple[str, ...] | None:
    """Return torchvision's names of the classes of ImageNet-1K, None where it is not installed."""
    from ..bench import peers

    try:
        models = peers.torchvision_module("models")
    except ImportError:
        return None
    return tuple(models.ResNet50_Weights.DEFAULT.meta["categories"])
