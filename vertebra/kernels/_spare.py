"""Residuals that an epilogue may overwrite, because nobody reads them once they are added.

Whoever passes a map on and knows that nobody else holds it offers it; an epilogue that adds it may
write its result there, and so moves two maps where it would move three. A map is offered to one
call, and known by its identity.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor

_offered: Tensor | None = None


@contextmanager
def offered(x: Tensor) -> Generator[None]:
    """Let the call inside the block that has x for its residual write its result there."""
    global _offered
    outer, _offered = _offered, x
    try:
        yield
    finally:
        _offered = outer


def take(residual: Tensor) -> bool:
    """Return whether `residual` is offered; it is not any more."""
    global _offered
    if residual is not _offered:
        return False
    _offered = None
    return True
