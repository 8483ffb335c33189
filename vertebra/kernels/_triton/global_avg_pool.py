"""The mean over the image, and LayerNorm of the means: the kernels.

Forward, two launches: `pool` sums x per image; then either `_mean_kernel`, whose program owns
BLOCK_C channels of an image, or `_norm_kernel`, whose program owns an image, because LayerNorm
needs all of its channels. It walks them three times, for the mean, the variance about that mean,
and y; only the first walk waits for memory.

Backward, one launch: `combine` spreads dp, which without LayerNorm is dy, over the pixels. With
LayerNorm `_norm_backward_kernel` makes dp first, and each image's part of dweight and dbias, which
`add_splits` adds up.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._per_image import combine
from ._pool import image_blocks, image_sum, pool, value
from ._splits import add_splits
from ._tile import load_channels


@triton.jit(do_not_specialize=["splits"])
def _mean_kernel(y_ptr, sums_ptr, P, C, splits, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    blocks_c = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks_c).to(tl.int64)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mean = image_sum(sums_ptr, n, splits, c, C, BLOCK_S) / P
    tl.store(y_ptr + n * C + c, mean.to(y_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["splits"])
def _norm_kernel(
    y_ptr,
    rows,
    sums_ptr,
    vectors,
    P,
    C,
    splits,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    phat_ptr, rstd_ptr = rows
    weight_ptr, bias_ptr = vectors
    ACC: tl.constexpr = phat_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((1, BLOCK_C), ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        total += image_sum(sums_ptr, n, splits, c, C, BLOCK_S) / P
    mean = tl.sum(total) / C

    total = tl.zeros((1, BLOCK_C), ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        deviation = image_sum(sums_ptr, n, splits, c, C, BLOCK_S) / P - mean
        total += tl.where(c < C, deviation * deviation, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(total) / C + eps)
    tl.store(rstd_ptr + n, rstd)

    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        phat = (image_sum(sums_ptr, n, splits, c, C, BLOCK_S) / P - mean) * rstd
        y = phat * load_channels(weight_ptr, c, C, ACC, 1.0)
        y += load_channels(bias_ptr, c, C, ACC, 0.0)
        tl.store(phat_ptr + n * C + c, phat, mask=c < C)
        tl.store(y_ptr + n * C + c, y.to(y_ptr.dtype.element_ty), mask=c < C)


def forward(
    outputs: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> None:
    """Write (y, phat, rstd)."""
    y, phat, rstd = outputs
    N, _, H, W = x.shape
    sums = pool(x, None, value, 1)
    blocks = image_blocks(sums, N)
    if eps is None:
        grid = (N * triton.cdiv(blocks["C"], blocks["BLOCK_C"]),)
        launch(_mean_kernel, grid, x.device, y_ptr=y, sums_ptr=sums, P=H * W, **blocks)
        return
    launch(
        _norm_kernel,
        (N,),
        x.device,
        y_ptr=y,
        rows=(phat, rstd),
        sums_ptr=sums,
        vectors=(weight, bias),
        P=H * W,
        eps=eps,
        **blocks,
    )


@triton.jit
def _norm_backward_kernel(
    dp_ptr, parts_ptr, dy_ptr, phat_ptr, rstd_ptr, weight_ptr, C, BLOCK_C: tl.constexpr
):
    ACC: tl.constexpr = phat_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    row = n * C
    rstd = tl.load(rstd_ptr + n)
    sum_dphat = tl.zeros((1, BLOCK_C), ACC)
    sum_dphat_phat = tl.zeros((1, BLOCK_C), ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        phat = load_channels(phat_ptr + row, c, C, ACC, 0.0)
        dphat = load_channels(dy_ptr + row, c, C, ACC, 0.0)
        dphat *= load_channels(weight_ptr, c, C, ACC, 1.0)
        sum_dphat += dphat
        sum_dphat_phat += dphat * phat
    mean = tl.sum(sum_dphat) / C
    projection = tl.sum(sum_dphat_phat) / C

    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        phat = load_channels(phat_ptr + row, c, C, ACC, 0.0)
        dy = load_channels(dy_ptr + row, c, C, ACC, 0.0)
        dphat = dy * load_channels(weight_ptr, c, C, ACC, 1.0)
        tl.store(dp_ptr + row + c, rstd * (dphat - mean - phat * projection), mask=c < C)
        if parts_ptr is not None:
            dbias = row + tl.num_programs(0).to(tl.int64) * C
            tl.store(parts_ptr + row + c, dy * phat, mask=c < C)
            tl.store(parts_ptr + dbias + c, dy, mask=c < C)


def backward(
    gradients: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    phat: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
) -> None:
    """Write dx, and (dweight, dbias) where they are not empty."""
    dx, dweight, dbias = gradients
    if phat is None:
        combine(dx, (), (), spread=dy)
        return
    N, C = phat.shape
    dp = phat.new_empty(N, C)
    parts = phat.new_empty(2, N, C) if dweight.numel() else None
    BLOCK_C = min(triton.next_power_of_2(C), 2048)
    launch(
        _norm_backward_kernel,
        (N,),
        dy.device,
        dp_ptr=dp,
        parts_ptr=parts,
        dy_ptr=dy,
        phat_ptr=phat,
        rstd_ptr=rstd,
        weight_ptr=weight,
        C=C,
        BLOCK_C=BLOCK_C,
        num_warps=max(1, BLOCK_C // 256),
    )
    if parts is not None:
        add_splits(parts, (dweight, dbias))
    combine(dx, (), (), spread=dp)
