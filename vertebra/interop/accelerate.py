"""`accelerate` and `restore`: a model of another library on our ops, and back."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TypeVar

from torch import nn

from ._swap import swap, unswap

M = TypeVar("M", bound=nn.Module)

_LIBRARIES = ("timm", "torchvision")


@cache
def _load(library: str) -> None:
    """Register the recipes for a library, which whoever has a module of it has imported."""
    importlib.import_module(f"{__package__}._{library}")


def accelerate(model: M) -> M:
    """Put every recognised module of `model` on our ops, in place; return `model`.

    The model stays what it is: the same object with the same modules, parameters, buffers, keys and
    hooks, an instance of the same classes. What is not recognised runs as it did; `report` says
    why. A copy is accelerated too; what is pickled or saved is the library's own and needs none of
    this. Doing it again changes nothing.
    """
    for module in model.modules():
        library = type(module).__module__.partition(".")[0]
        if library in _LIBRARIES:
            _load(library)
            swap(module)
    return model


def restore(model: M) -> M:
    """Undo `accelerate`, in place; return `model`."""
    for module in model.modules():
        unswap(module)
    return model
