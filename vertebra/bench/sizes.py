"""How large the models are: parameters, and multiply-adds for one image of the size they are for.

To count all takes half a minute, so the counts are kept in `sizes.json`; a test compares.
`python -m vertebra.bench.sizes` writes them again.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..models import create_model, list_models
from ..models._pretrained import weights_of
from .roofline import macs

_TABLE = Path(__file__).with_name("sizes.json")


class Size(NamedTuple):
    """Parameters, with 1000 classes; multiply-adds of one image; pixels of its side."""

    parameters: int
    macs: int
    image_size: int


def size_of(name: str) -> Size:
    """Return how large a model is, counted now if its count is not kept."""
    kept = _read().get(name)
    return count(name) if kept is None else Size(*kept)


def count(name: str) -> Size:
    """Count; the image is that of the model's default weights, 224 pixels where it has none."""
    published = weights_of(name)
    side = published["DEFAULT"].value.crop_size if published else 224
    with torch.device("meta"):
        model = create_model(name)
    return Size(sum(p.numel() for p in model.parameters()), macs(model, side), side)


@cache
def _read() -> dict[str, list[int]]:
    return json.loads(_TABLE.read_text())


def write() -> None:
    """Count all models and keep the counts."""
    rows = [f' "{name}": {json.dumps(count(name))}' for name in list_models()]
    _TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    write()
