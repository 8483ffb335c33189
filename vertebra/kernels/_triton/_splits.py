"""The second stage of a reduction: adding up what the splits of a first stage wrote.

A first stage leaves a (sums, splits, C) buffer: one row per program along the reduced axis. Adding
the rows here, in a fixed order, needs no atomics and gives the same bits every time.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

MAX_SPLITS = 1024


@triton.jit(do_not_specialize=["splits"])
def _add_splits_kernel(sums_ptr, targets, C, splits, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    for i in tl.static_range(len(targets)):
        total = tl.zeros((BLOCK_S, BLOCK_C), sums_ptr.dtype.element_ty)
        for s0 in range(0, splits, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)[:, None]
            inside = (s < splits) & (c < C)
            total += tl.load(sums_ptr + (i * splits + s) * C + c, mask=inside, other=0.0)
        total = tl.sum(total, axis=0, keep_dims=True)
        tl.store(targets[i] + c, total.to(targets[i].dtype.element_ty), mask=c < C)


def add_splits(sums: Tensor, targets: tuple[Tensor, ...]) -> None:
    """Write targets[i] = sums[i].sum(0), each (C,)."""
    _, splits, C = sums.shape
    launch(
        _add_splits_kernel,
        (triton.cdiv(C, 8),),
        sums.device,
        sums_ptr=sums,
        targets=targets,
        C=C,
        splits=splits,
        BLOCK_S=128,
        BLOCK_C=8,
        num_warps=4,
    )
