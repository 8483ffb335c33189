"""`accelerate` and `restore`: a model of another library on our ops, and back."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import nn

from ..nn.fused import is_fused_model
from ._swap import Swapped, has_recipe, load, path_of, swap, target, unswap

M = TypeVar("M", bound=nn.Module)

LIBRARIES = ("timm", "torchvision", "transformers")


class Site(NamedTuple):
    """A module that there is a recipe for, and why it runs as it did, None where it does not."""

    name: str
    cls: str
    reason: str | None


def accelerate(model: M) -> M:
    """Put every recognised module of `model` on our ops, in place; return `model`.

    The model stays what it is: the same object with the same modules, parameters, buffers, keys and
    hooks, an instance of the same classes. What is not recognised runs as it did; `report` says
    why. A copy is accelerated too; what is pickled or saved is the library's own and needs none of
    this. Doing it again changes nothing.

    Random numbers are as many and as likely as before, not the same ones: stochastic depth drops
    other samples under the same seed.
    """
    return swap_all(model)


def swap_all(model: M, *, fused: bool = False) -> M:
    """Do what `accelerate` does, or what a model needs that is to be fused; return `model`."""
    for module in _known(model):
        swap(module, fused)
    return model


def restore(model: M) -> M:
    """Undo `accelerate`, in place; return `model`.

    Raises:
        ValueError: it is a fused model, which is none of its library's any more.
    """
    if is_fused_model(model):
        raise ValueError("a fused model cannot be restored; keep the model that it was made from")
    for module in model.modules():
        unswap(module)
    return model


def report(model: nn.Module) -> list[Site]:
    """Return every module of `model` that there is a recipe for, and what came of it."""
    known = set(_known(model))
    sites: list[Site] = []
    for name, module in model.named_modules():
        cls, reason = type(module), None
        if module not in known or not (isinstance(module, Swapped) or has_recipe(cls)):
            continue
        if not isinstance(module, Swapped):
            found = target(module)
            reason = found if isinstance(found, str) else "accelerate was not called"
        sites.append(Site(name, path_of(cls), reason))
    return sites


def _known(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are of a library with recipes, which are loaded."""
    found: list[nn.Module] = []
    for module in model.modules():
        library = type(module).__module__.partition(".")[0]
        if library in LIBRARIES:
            load(library)
            found.append(module)
    return found
