"""Networks, stages and blocks in sequence whose calls are recorded, after `vertebra.fuse`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._recorded import forget, recorded
from .checkpoint import CheckpointSequential
from .fused import is_fused_model


class Recorded(nn.Module):
    """What the `forward` of the class after this one calls, recorded on CPUs.

    It is run again without the modules inside where those would call the same (`_recorded`).

    Attributes:
        is_recorded: `fuse` has made this; before, all runs as if this class were not there.
    """

    is_recorded = False

    def forward(self, x: Any) -> Any:
        forward = super().forward
        return recorded(self, forward, x) if self.is_recorded else forward(x)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        forget(self)  # moved or converted, it would hold the memory that it leaves
        return super()._apply(fn, recurse)


class FusedBlocks(Recorded, CheckpointSequential):
    """Blocks in sequence, or sequences of them, whose calls are recorded on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return CheckpointSequential.forward(self, x)
        return super().forward(x)


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
