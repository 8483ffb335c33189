"""Nothing but fused multiply-adds: how many a GPU does in a second is a ceiling of a benchmark.

A program owns `BLOCK` values, several to a thread so that no multiply-add waits for the one before
it. Reading and writing them is 8 bytes to `16 * rounds` multiply-adds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

_BLOCK, _WARPS = 1024, 4
_UNROLLED = 16


@triton.jit
def _fma_kernel(x_ptr, y_ptr, a, b, rounds, UNROLLED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    for _ in range(rounds):
        for _ in tl.static_range(UNROLLED):
            x = x * a + b
    tl.store(y_ptr + offsets, x)


def repeat(y: Tensor, x: Tensor, a: float, b: float, rounds: int) -> int:
    """Write x * a + b, repeated, to `y`; return the floating-point operations that takes."""
    launch(
        _fma_kernel,
        (x.numel() // _BLOCK,),
        x.device,
        x_ptr=x,
        y_ptr=y,
        a=a,
        b=b,
        rounds=rounds,
        UNROLLED=_UNROLLED,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return 2 * _UNROLLED * rounds * x.numel()


def inputs(programs: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return random values for so many programs, and room for the results."""
    x = torch.rand(programs * _BLOCK, device=device)
    return x, torch.empty_like(x)
