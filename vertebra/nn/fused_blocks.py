"""Residual blocks in sequence, after `vertebra.fuse`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._recorded import forget, recorded
from .checkpoint import CheckpointSequential
from .fused import is_fused_model


class FusedBlocks(CheckpointSequential):
    """Blocks in sequence, or sequences of them, whose calls are recorded on CPUs.

    They are run again without the blocks where those would call the same (`_recorded`).
    """

    def forward(self, x: Tensor) -> Tensor:
        forward = super().forward
        return forward(x) if self.grad_checkpointing else recorded(self, forward, x)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        forget(self)  # moved or converted, they would hold the memory that they leave
        return super()._apply(fn, recurse)


def passes_on(sequence: nn.Module) -> bool:
    """Return whether `sequence` just runs blocks one after the other, some of them fused."""
    runs = (nn.Sequential.forward, CheckpointSequential.forward)
    return (
        type(sequence).forward in runs
        and len(vars(sequence)["_modules"]) > 0
        and all(any(True for _ in block.children()) for block in sequence.children())
        and is_fused_model(sequence)
    )
