"""The mean and variance of a batch, per channel, and the running statistics they advance.

Two launches. `_moments_kernel`: a program owns BLOCK_C channels and one split of the pixels; every
lane of its tile keeps its own (mean, M2) by Welford's update, and the lanes are merged once at its
end. `_merge_kernel`: the splits' (mean, M2) are merged and the running statistics advanced.

Merging k parts, parts of n_i values with mean_i and M2_i, is Chan's rule for all parts at once:

    mean = sum(n_i * mean_i) / n        M2 = sum(M2_i + n_i * (mean_i - mean)^2)
"""

import triton
import triton.language as tl
from torch import Tensor

from ._affine import pick
from ._launch import launch
from ._tile import (
    ACC,
    channel_block,
    extents,
    geometry,
    load_tile,
    over_pixels,
    pixel_block,
    processors,
)

REGISTERS = {"_moments_kernel": 64}  # 8 programs at once: see _affine


@triton.jit
def _moments_kernel(
    x_ptr,
    means_ptr,
    m2s_ptr,
    stride,
    sizes,
    split_m,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    split = tl.program_id(0) // blocks_c
    c = channel_block(tl.program_id(0) % blocks_c, BLOCK_C, CHANNELS_LAST)
    start = split * split_m
    stop = tl.minimum(start + split_m, M)
    TILE: tl.constexpr = (BLOCK_M, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_M)
    mean = tl.zeros(TILE, ACC)
    m2 = tl.zeros(TILE, ACC)

    seen = 0
    for m0 in range(start, stop, BLOCK_M):
        m = pixel_block(m0, BLOCK_M, CHANNELS_LAST)
        tile = (sizes, m, c, (m < stop) & (c < C))
        x = load_tile(x_ptr, stride, tile, ACC, CHANNELS_LAST, UNIT)
        seen += 1
        delta = tl.where(m < stop, x - mean, 0.0)  # a lane past the end learns nothing
        mean += delta * (tl.full((), 1.0, ACC) / seen)
        m2 += delta * (x - mean)

    # lane j has seen the pixels start + j, start + j + BLOCK_M, ... before stop
    count = tl.cdiv(stop - pixel_block(start, BLOCK_M, CHANNELS_LAST), BLOCK_M)
    count = tl.maximum(count, 0).to(ACC)
    merged = over_pixels(count * mean, CHANNELS_LAST) / (stop - start)
    m2 = over_pixels(m2 + count * (mean - merged) * (mean - merged), CHANNELS_LAST)
    tl.store(means_ptr + split * C + c, merged, mask=c < C)
    tl.store(m2s_ptr + split * C + c, m2, mask=c < C)


@triton.jit(do_not_specialize=["M", "split_m", "splits"])
def _merge_kernel(
    means_ptr,
    m2s_ptr,
    moments,
    running,
    new_running,
    M,
    C,
    split_m,
    splits,
    momentum,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    mean_ptr, rstd_ptr = moments
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mean = tl.zeros((BLOCK_S, BLOCK_C), means_ptr.dtype.element_ty)
    m2 = tl.zeros((BLOCK_S, BLOCK_C), means_ptr.dtype.element_ty)
    for s0 in range(0, splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[:, None]
        count = tl.minimum(M - s * split_m, split_m).to(mean.dtype)
        means = tl.load(means_ptr + s * C + c, mask=(s < splits) & (c < C), other=0.0)
        mean += means * (count / M)
    mean = tl.sum(mean, axis=0, keep_dims=True)
    for s0 in range(0, splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[:, None]
        inside = (s < splits) & (c < C)
        count = tl.where(s < splits, tl.minimum(M - s * split_m, split_m), 0).to(mean.dtype)
        means = tl.load(means_ptr + s * C + c, mask=inside, other=0.0)
        m2 += tl.load(m2s_ptr + s * C + c, mask=inside, other=0.0)
        m2 += count * (means - mean) * (means - mean)
    m2 = tl.sum(m2, axis=0, keep_dims=True)
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(rstd_ptr + c, 1.0 / tl.sqrt(m2 / M + eps), mask=c < C)
    if running is not None:
        for i in tl.static_range(2):
            old = tl.load(running[i] + c, mask=c < C, other=0.0).to(mean.dtype)
            statistic = mean if i == 0 else m2 / (M - 1)
            new = (1.0 - momentum) * old + momentum * statistic
            tl.store(new_running[i] + c, new.to(new_running[i].dtype.element_ty), mask=c < C)


def batch_moments(
    x: Tensor,
    moments: tuple[Tensor, Tensor],
    running: tuple[Tensor | None, Tensor | None] | None,
    new_running: tuple[Tensor, Tensor] | None,
    momentum: float,
    eps: float,
) -> None:
    """Write moments = (mean, rstd) and, where running = (mean, var) is given, its successor."""
    view = geometry(x.shape, x.stride())
    M, C = view.sizes[:2]
    programs = 8 * processors(x.device)
    config = pick(view, x.itemsize, tile_bytes=4096, programs=programs)
    BLOCK_M, BLOCK_C, num_warps, splits = config
    split_m = triton.cdiv(triton.cdiv(M, BLOCK_M), splits) * BLOCK_M
    means, m2s = moments[0].new_empty(2, splits, C)
    launch(
        _moments_kernel,
        (triton.cdiv(C, BLOCK_C) * splits,),
        x.device,
        x_ptr=x,
        means_ptr=means,
        m2s_ptr=m2s,
        stride=view.strides[0],
        sizes=view.sizes,
        split_m=split_m,
        ACC=ACC[x.dtype],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
        num_warps=num_warps,
    )
    launch(
        _merge_kernel,
        (triton.cdiv(C, 8),),
        x.device,
        means_ptr=means,
        m2s_ptr=m2s,
        moments=moments,
        running=running,
        new_running=new_running,
        M=M,
        C=C,
        split_m=split_m,
        splits=splits,
        momentum=momentum,
        eps=eps,
        BLOCK_S=128,
        BLOCK_C=8,
        num_warps=8,
    )
