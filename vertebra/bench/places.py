"""Which part of a network is running."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from .anatomy import Anatomy


def _ignore(*_: Any) -> None:
    pass


class Places:
    """Follows a network through its parts; what is between two blocks belongs to neither.

    Args:
        network: that runs.
        anatomy: its parts.
        entered: called with a module's name, its arguments and the part that it is called from.
        left: called with what a module returns, and its part.
    """

    def __init__(
        self,
        network: nn.Module,
        anatomy: Anatomy,
        entered: Callable[[str, Any, str], None] = _ignore,
        left: Callable[[Any, str], None] = _ignore,
    ) -> None:
        self._names = {module: name for name, module in network.named_modules()}
        self._owners = anatomy.owners
        self._stem, *_, self._head = (part.name for part in anatomy.parts)
        self._path = [self._stem]
        self._entered, self._left = entered, left

    @property
    def part(self) -> str:
        """The part that runs."""
        return self._path[-1]

    @contextmanager
    def followed(self) -> Generator[None]:
        """Follow a pass, by hooks that are no module's own: one that has its own is not fused."""
        self._path = [self._stem]
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        outer, name = self.part, self._names[module]
        self._path.append(self._owners.get(name, outer))
        self._entered(name, args, outer)

    def _leave(self, module: nn.Module, args: Any, y: Any) -> None:
        part = self._path.pop()
        self._left(y, part)
        if part != self._stem == self.part:  # that was the first block: no more stem
            self._path[:] = [self._head] * len(self._path)
