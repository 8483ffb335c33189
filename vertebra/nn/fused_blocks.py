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
    """Return whether `sequence` just runs blocks, some of them fused, one after the other.

    One that is no `nn.Sequential` says so by RUNS_IN_ROW.
    """
    kind, blocks = type(sequence), [*sequence.children()]
    return (
        kind.forward in (nn.Sequential.forward, CheckpointSequential.forward)
        or hasattr(kind, "RUNS_IN_ROW")
    ) and (
        len(blocks) > 0
        and all(any(True for _ in block.children()) for block in blocks)
        # a convolution and its norm are part of a block
        and not any(hasattr(type(block), "unit") for block in blocks)
        and is_fused_model(sequence)
    )
