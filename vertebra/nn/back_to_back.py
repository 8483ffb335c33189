"""Bottlenecks in a row: the last convolution of one and the first one of the next as one op.

Both are 1x1, and what is between them is the widest map of a stage, which then need not be read
back for the second one. The 3x3 before them may be part of it. For inference, once `vertebra.fuse`
has left nothing between convolutions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from ..kernels._op import has_kernels
from ..kernels.conv2d_b2b import as_one
from ._act import has_hooks
from .fused import Folded, FusedConv2d, epilogue, is_fused
from .fused_blocks import FusedBlocks


class End(NamedTuple):
    """A convolution of a block, and the activation that is all there is behind it, but an add."""

    conv: FusedConv2d
    act: str


def end_of(
    conv: nn.Module,
    norm: nn.Module,
    act: nn.Module | None = None,
    drop: nn.Module | None = None,
    *,
    side: int = 1,
) -> End | None:
    """Return what `conv_norm_act` runs as one op, if that is a 1x1 with each pixel for itself.

    Or, by its `side`, a 3x3 that a zero surrounds: the map keeps its size.
    """
    if not isinstance(norm, Folded) or not is_fused(conv) or type(conv) is not FusedConv2d:
        return None
    window = (conv.kernel_size, conv.padding, conv.padding_mode)
    if window != ((side, side), (side // 2, side // 2), "zeros"):
        return None
    if (conv.stride, conv.dilation, conv.groups) != ((1, 1), (1, 1), 1):
        return None
    name = epilogue(norm, act, drop)
    return None if name is None else End(conv, name)


class InParts:
    """What a bottleneck derives from to run in three parts, narrow, work, widen, and a shortcut.

    The first and the last one say of themselves, as `narrow_end` and `widen_end`, whether one
    convolution is all they are; the others are asked for by themselves only if they are. `work`
    does so as `work_end`.
    """

    def narrow_end(self) -> End | None:
        """Return the convolution that `narrow` is, and nothing else; None if it is not."""
        raise NotImplementedError

    def widen_end(self) -> End | None:
        """Return the convolution that `widen` is, and nothing else; None if it is not."""
        raise NotImplementedError

    def work_end(self) -> End | None:
        """Return the 3x3 that `work` is, and nothing else; None if it is not, or has groups."""
        return None

    def narrow(self, x: Tensor) -> Tensor:
        """Return what the block works on."""
        raise NotImplementedError

    def work(self, y: Tensor) -> Tensor:
        """Return what is widened, from what `narrow` returns."""
        raise NotImplementedError

    def shortcut_of(self, x: Tensor) -> Any:
        """Return what is added to the output, None if nothing is."""
        raise NotImplementedError

    def widen(self, y: Tensor, shortcut: Any) -> Tensor:
        """Return the output, the shortcut added."""
        raise NotImplementedError

    def forward(self, x: Tensor, *pool: Any) -> Tensor:
        """Run all of it, and a pool if one is given."""
        y = self.work(self.narrow(x))
        return self.widen(y, self.shortcut_of(x), *pool)


class BackToBack(FusedBlocks):
    """`FusedBlocks` among which there are bottlenecks in a row.

    Where one kernel runs the end of one and the beginning of the next, and nobody watches, it does.
    Everywhere else this is `FusedBlocks`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy) or not has_kernels(x) or self.grad_checkpointing:
            return super().forward(x)
        narrowed: Tensor | None = None  # what the next block's `narrow` returns
        for block, following in [*pairwise(self), (self[-1], None)]:
            ends = None if following is None else _ends(block, following)
            if narrowed is None and ends is None:
                x = block(x)
                continue
            parts: Any = block
            y, shortcut = parts.narrow(x) if narrowed is None else narrowed, parts.shortcut_of(x)
            mid = None if ends is None else parts.work_end()
            both = None if mid is None else _as_one(*ends, y, shortcut, mid)
            if both is None:
                y = parts.work(y)
                both = None if ends is None else _as_one(*ends, y, shortcut)
            x, narrowed = (parts.widen(y, shortcut), None) if both is None else both
        return x


def _as_one(
    last: End, first: End, y: Tensor, shortcut: Tensor | None, mid: End | None = None
) -> Any:
    """Return the output of a block and what the next one makes of it, None if not as one op."""
    weights = (last.conv.filters, first.conv.filters)
    rest = (last.conv.bias, first.conv.bias, shortcut, last.act, first.act)
    work = (None, None, "none") if mid is None else (mid.conv.filters, mid.conv.bias, mid.act)
    return as_one(y.contiguous(memory_format=torch.channels_last), *weights, *rest, *work)


def _ends(block: nn.Module, following: nn.Module) -> tuple[End, End] | None:
    """Return the two convolutions that are one op between two blocks, if there are such."""
    if not (isinstance(block, InParts) and isinstance(following, InParts)):
        return None
    if has_hooks(block) or has_hooks(following):
        return None
    last, first = block.widen_end(), following.narrow_end()
    return None if last is None or first is None else (last, first)


def has_neighbours(sequence: nn.Module) -> bool:
    """Return whether two blocks in a sequence have convolutions that are one op between them."""
    return any(_ends(*blocks) for blocks in pairwise(sequence.children()))
