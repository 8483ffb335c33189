"""Other modules in the place of modules of a model, with the hooks that those had."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_modules(root: nn.Module, convert: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Put `convert(module)` in the place of every module of `root` for which it is not None.

    A module that stands in several places is converted once. Returns `root`, or what takes its
    place.
    """
    converted = {module: convert(module) for module in root.modules()}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        new = converted[module]
        if path and new is not None:
            parent, _, name = path.rpartition(".")
            root.get_submodule(parent).add_module(name, new)
    return converted[root] or root


def share_hooks(module: nn.Module, other: nn.Module) -> None:
    """Give `module` the hooks of `other`: the same dicts, so that their handles keep working."""
    for name, value in vars(other).items():
        if "_hook" in name:
            vars(module)[name] = value
