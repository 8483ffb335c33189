"""Residual blocks in sequence, after `vertebra.fuse`: each may overwrite what it was given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import _spare
from ._act import has_hooks
from .checkpoint import CheckpointSequential
from .conv_norm_act import InputReaders
from .fused import is_fused

_storage_uses: Callable[[int], int] = torch._C._storage_Use_Count  # pyright: ignore


class FusedBlocks(CheckpointSequential):
    """Blocks in sequence, of which all but the first may add in the place of their input.

    That input is what the block before returned. It is offered (`vertebra.kernels._spare`) if
    nobody else has it, by Python's count of references and the storage's, and nothing that could
    keep it, hooks or modules that stand for others, is between it and the add.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(x) is not Tensor or self.grad_checkpointing:
            return super().forward(x)
        is_first = True
        for block in self:
            if is_first or not (_references(x) == _ALONE and _is_private(x, block)):
                x = block(x)
            else:
                with _spare.offered(x):
                    x = block(x)
            is_first = False
        return x


def _references(x: object) -> int:
    return sys.getrefcount(x)


def _count_alone() -> int:
    """Return the references to what only the loop of `FusedBlocks.forward` has."""
    x, count = object(), 0
    for _ in range(2):
        count = _references(x)
        x = object()
    return count


_ALONE = _count_alone()


def _is_private(x: Tensor, block: nn.Module) -> bool:
    """Return whether no view of x is left, and `block` shows it to nobody."""
    storage = x.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    if _storage_uses(storage) != 2:  # x, and what asks
        return False
    shortcut = vars(block)["_modules"].get(getattr(type(block), "SHORTCUT", ""))
    if shortcut is not None and (type(shortcut) is not nn.Identity or has_hooks(shortcut)):
        return False
    readers: InputReaders = getattr(type(block), "INPUT_READERS", ())
    module: Any = block
    for name in readers:
        if has_hooks(module) or not _is_known(module):
            return False
        module = vars(module)["_modules"].get(name)
    return bool(readers) and module is not None and is_fused(module)


def _is_known(module: Any) -> bool:
    """Return whether it is known what `module` does with its input."""
    kind = type(module)
    return (
        kind.forward is nn.Sequential.forward
        or hasattr(kind, "INPUT_READERS")
        or hasattr(kind, "CONV_NORMS")
    )


def passes_on(sequence: nn.Module) -> bool:
    """Return whether `sequence` just runs residual blocks one after the other.

    One that is no `nn.Sequential` says so by RUNS_IN_ROW.
    """
    runs = (nn.Sequential.forward, CheckpointSequential.forward)
    return (
        (type(sequence).forward in runs or hasattr(type(sequence), "RUNS_IN_ROW"))
        and len(vars(sequence)["_modules"]) > 1
        and all(hasattr(type(block), "INPUT_READERS") for block in sequence.children())
    )
