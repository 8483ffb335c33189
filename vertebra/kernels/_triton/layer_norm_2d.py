"""Layer normalisation over the channels of each pixel: the kernels.

A program owns BLOCK_M pixels and all of their channels. How many channels there are decides between
two designs, and the memory order which way their tiles lie:

    whole   all C in one tile: read once, kept in registers between statistics and result.
            Channels last up to C = 4096; NCHW, where a row is 64 bytes at least, up to 256, in
            the backward pass 128
    walk    C in chunks of BLOCK_C, walked twice: once for the statistics, once for the result.
            The second walk finds in cache what the first one read: at C = 768 the programs that
            run at once hold about 30 MB, of the 50 MB of an H100's L2

Backward, a program owns every num_programs-th tile. Of dweight and dbias the whole design keeps its
share in registers; the walk keeps it in the program's row of the scratch buffer that `_splits`
then adds up, a row that no other program touches: no atomics, and the same bits every time.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._splits import MAX_SPLITS, add_splits
from ._tile import (
    ACC,
    Geometry,
    channel_block,
    extents,
    geometry,
    load_channels,
    load_tile,
    over_pixels,
    pixel_block,
    processors,
    store_tile,
)

# 16 warps fit on a multiprocessor at 128 registers: what a backward pass fills it with
REGISTERS = {"_whole_backward_kernel": 128, "_walk_backward_kernel": 128}
MAXNREG = REGISTERS  # a walk spilled 16 bytes under one triton, and took 144 under another
WARPS = 16


class Config(NamedTuple):
    """A tile, and whether it holds all channels."""

    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    whole: bool


@lru_cache(maxsize=4096)
def pick(view: Geometry, itemsize: int, backward: bool, sms: int) -> Config:
    """Choose a tile that a lane can hold its share of, and that leaves every SM some work.

    A lane's share is 64 bytes of each map, or 32 where it keeps as much again: sums in a walk, two
    maps in a backward pass. An access takes an address, so a share shrinks with its width.
    """
    M, C = view.sizes[:2]
    all_c = triton.next_power_of_2(C)
    # where pixels are contiguous a row of the tile is two sectors, but for a map of few pixels
    row, least = (1, 1) if view.channels_last else (64 // itemsize, 16 // itemsize)
    share = 32 if backward else 64
    lane = share // itemsize // max(1, min(4, 16 // (view.unit * itemsize)))
    lane = max(1, lane)
    whole = all_c <= 4096 if view.channels_last else all_c * row <= lane * 32 * 8
    if not whole and not backward:
        lane = max(1, lane // 2)
    # with 2 pixels at a time in 4 warps, the sums of as many programs are 1/10 of a 7x7 map
    fat = not whole or (backward and (all_c >= 1024 or not view.channels_last))
    tile = lane * 32 * (8 if fat else 4)

    BLOCK_M = min(max(row, min(512, tile // all_c)), triton.next_power_of_2(M))
    while BLOCK_M > least and triton.cdiv(M, BLOCK_M) < sms:
        BLOCK_M //= 2
    BLOCK_C = all_c if whole else min(all_c, max(1, tile // BLOCK_M))
    while 32 < BLOCK_C < all_c and triton.cdiv(C, BLOCK_C) * BLOCK_C * 7 > C * 8:
        BLOCK_C //= 2
    num_warps = min(16, max(1, BLOCK_M * BLOCK_C // (32 * lane)))
    return Config(BLOCK_M, BLOCK_C, num_warps, BLOCK_C >= C)


@triton.jit
def over_channels(x, CHANNELS_LAST: tl.constexpr):
    """Sum a tile over its channels; the result broadcasts against the tile."""
    if CHANNELS_LAST:
        return tl.sum(x, axis=1, keep_dims=True)
    else:
        return tl.sum(x, axis=0, keep_dims=True)


@triton.jit
def store_statistics(statistics, mean, rstd, m, M):
    """Store what the backward pass needs of each pixel, if there is to be one."""
    if statistics is not None:
        tl.store(statistics[0] + m, mean, mask=m < M)
        tl.store(statistics[1] + m, rstd, mask=m < M)


@triton.jit
def load_statistics(statistics, m, M):
    """Load mean and rstd of each pixel."""
    mean = tl.load(statistics[0] + m, mask=m < M, other=0.0)
    rstd = tl.load(statistics[1] + m, mask=m < M, other=0.0)
    return mean, rstd


@triton.jit
def _whole_kernel(
    maps,
    statistics,
    affine,
    strides,
    sizes,
    eps,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    y_ptr, x_ptr = maps
    weight_ptr, bias_ptr = affine
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    c = channel_block(0, BLOCK_C, CHANNELS_LAST)
    m = pixel_block(tl.program_id(0) * BLOCK_M, BLOCK_M, CHANNELS_LAST)
    tile = (sizes, m, c, (m < M) & (c < C))
    weight = load_channels(weight_ptr, c, C, ACC, 1.0)
    bias = load_channels(bias_ptr, c, C, ACC, 0.0)

    x = load_tile(x_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT)
    mean = over_channels(x, CHANNELS_LAST) / C
    deviation = tl.where(c < C, x - mean, 0.0)
    # what rounding has left of a large mean
    rest = over_channels(deviation, CHANNELS_LAST) / C
    mean += rest
    deviation = tl.where(c < C, deviation - rest, 0.0)
    rstd = 1.0 / tl.sqrt(over_channels(deviation * deviation, CHANNELS_LAST) / C + eps)
    y = deviation * rstd * weight + bias
    store_tile(y_ptr, strides[0], tile, y, CHANNELS_LAST, UNIT)
    store_statistics(statistics, mean, rstd, m, M)


@triton.jit
def _walk_kernel(
    maps,
    statistics,
    affine,
    strides,
    sizes,
    eps,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    y_ptr, x_ptr = maps
    weight_ptr, bias_ptr = affine
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    m = pixel_block(tl.program_id(0) * BLOCK_M, BLOCK_M, CHANNELS_LAST)
    TILE: tl.constexpr = (BLOCK_M, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_M)
    means = tl.zeros(TILE, ACC)
    m2s = tl.zeros(TILE, ACC)

    # Welford's update, a lane by itself, of deviations from its first channel, which are small
    # where the mean is large; a lane past the end learns nothing
    c = channel_block(0, BLOCK_C, CHANNELS_LAST)
    first = load_tile(x_ptr, strides[1], (sizes, m, c, (m < M) & (c < C)), ACC, CHANNELS_LAST, UNIT)
    for i in range(1, tl.cdiv(C, BLOCK_C)):
        c = channel_block(i, BLOCK_C, CHANNELS_LAST)
        tile = (sizes, m, c, (m < M) & (c < C))
        x = load_tile(x_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT) - first
        delta = tl.where(c < C, x - means, 0.0)
        means += delta * (tl.full((), 1.0, ACC) / (i + 1))
        m2s += delta * (x - means)

    # lane j has seen the channels j, j + BLOCK_C, ...; Chan's rule merges all lanes at once
    j = channel_block(0, BLOCK_C, CHANNELS_LAST)
    count = tl.cdiv(C - j, BLOCK_C).to(ACC)
    mean = over_channels(count * (first + means), CHANNELS_LAST) / C
    mean += over_channels(count * (first - mean + means), CHANNELS_LAST) / C  # what rounding left
    means += first - mean
    m2s += count * means * means
    rstd = 1.0 / tl.sqrt(over_channels(m2s, CHANNELS_LAST) / C + eps)
    store_statistics(statistics, mean, rstd, m, M)

    for i in range(0, tl.cdiv(C, BLOCK_C)):
        c = channel_block(i, BLOCK_C, CHANNELS_LAST)
        tile = (sizes, m, c, (m < M) & (c < C))
        weight = load_channels(weight_ptr, c, C, ACC, 1.0)
        bias = load_channels(bias_ptr, c, C, ACC, 0.0)
        x = load_tile(x_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT)
        y = (x - mean) * rstd * weight + bias
        store_tile(y_ptr, strides[0], tile, y, CHANNELS_LAST, UNIT)


def forward(
    outputs: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    saves: bool,
) -> None:
    """Write (y, mean, rstd), or y alone."""
    y, mean, rstd = outputs
    view = geometry(x.shape, y.stride(), x.stride())
    config = pick(view, x.itemsize, False, processors(x.device))
    launch(
        _whole_kernel if config.whole else _walk_kernel,
        (triton.cdiv(view.sizes[0], config.BLOCK_M),),
        x.device,
        maps=(y, x),
        statistics=(mean, rstd) if saves else None,
        affine=(weight, bias),
        strides=view.strides,
        sizes=view.sizes,
        eps=eps,
        ACC=ACC[x.dtype],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )


@triton.jit
def _whole_backward_kernel(
    maps,
    sums_ptr,
    statistics,
    weight_ptr,
    strides,
    sizes,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dx_ptr, dy_ptr, x_ptr = maps
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    c = channel_block(0, BLOCK_C, CHANNELS_LAST)
    weight = load_channels(weight_ptr, c, C, ACC, 1.0)
    # the pixels of a tile are in different warps, or else contiguous and mostly within a lane
    SUMS: tl.constexpr = (BLOCK_M, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, 1)
    dweight = tl.zeros(SUMS, ACC)
    dbias = tl.zeros(SUMS, ACC)

    for t in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        m = pixel_block(t * BLOCK_M, BLOCK_M, CHANNELS_LAST)
        tile = (sizes, m, c, (m < M) & (c < C))
        mean, rstd = load_statistics(statistics, m, M)
        dy = load_tile(dy_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT)
        x = load_tile(x_ptr, strides[2], tile, ACC, CHANNELS_LAST, UNIT)
        xhat = (x - mean) * rstd
        wdy = weight * dy
        mean_wdy = over_channels(wdy, CHANNELS_LAST) / C
        mean_wdy_xhat = over_channels(wdy * xhat, CHANNELS_LAST) / C
        dx = rstd * (wdy - mean_wdy - xhat * mean_wdy_xhat)
        store_tile(dx_ptr, strides[0], tile, dx, CHANNELS_LAST, UNIT)
        if sums_ptr is not None:
            if CHANNELS_LAST:
                dweight += dy * xhat
                dbias += dy
            else:
                dweight += over_pixels(dy * xhat, CHANNELS_LAST)
                dbias += over_pixels(dy, CHANNELS_LAST)

    if sums_ptr is not None:
        if CHANNELS_LAST:
            dweight = over_pixels(dweight, CHANNELS_LAST)
            dbias = over_pixels(dbias, CHANNELS_LAST)
        dweight_ptr = sums_ptr + tl.program_id(0) * C
        tl.store(dweight_ptr + c, dweight, mask=c < C)
        tl.store(dweight_ptr + tl.num_programs(0) * C + c, dbias, mask=c < C)


@triton.jit
def _walk_backward_kernel(
    maps,
    sums_ptr,
    statistics,
    weight_ptr,
    strides,
    sizes,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dx_ptr, dy_ptr, x_ptr = maps
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    TILE: tl.constexpr = (BLOCK_M, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_M)

    for t in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        m = pixel_block(t * BLOCK_M, BLOCK_M, CHANNELS_LAST)
        mean, rstd = load_statistics(statistics, m, M)
        sum_wdy = tl.zeros(TILE, ACC)
        sum_wdy_deviation = tl.zeros(TILE, ACC)
        for i in range(0, tl.cdiv(C, BLOCK_C)):
            c = channel_block(i, BLOCK_C, CHANNELS_LAST)
            tile = (sizes, m, c, (m < M) & (c < C))
            weight = load_channels(weight_ptr, c, C, ACC, 1.0)
            dy = load_tile(dy_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT)
            x = load_tile(x_ptr, strides[2], tile, ACC, CHANNELS_LAST, UNIT)
            sum_wdy += weight * dy
            sum_wdy_deviation += weight * dy * (x - mean)
        mean_wdy = over_channels(sum_wdy, CHANNELS_LAST) / C
        mean_wdy_xhat = over_channels(sum_wdy_deviation, CHANNELS_LAST) * rstd / C

        for i in range(0, tl.cdiv(C, BLOCK_C)):
            c = channel_block(i, BLOCK_C, CHANNELS_LAST)
            tile = (sizes, m, c, (m < M) & (c < C))
            weight = load_channels(weight_ptr, c, C, ACC, 1.0)
            dy = load_tile(dy_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT)
            x = load_tile(x_ptr, strides[2], tile, ACC, CHANNELS_LAST, UNIT)
            xhat = (x - mean) * rstd
            dx = rstd * (weight * dy - mean_wdy - xhat * mean_wdy_xhat)
            store_tile(dx_ptr, strides[0], tile, dx, CHANNELS_LAST, UNIT)
            if sums_ptr is not None:
                dweight_ptr = sums_ptr + tl.program_id(0) * C + c
                dbias_ptr = dweight_ptr + tl.num_programs(0) * C
                # the first tile finds nothing there, the next ones what the one before has left
                later = (c < C) & (t != tl.program_id(0))
                dweight = tl.load(dweight_ptr, mask=later, other=0.0)
                dbias = tl.load(dbias_ptr, mask=later, other=0.0)
                dweight += over_pixels(dy * xhat, CHANNELS_LAST)
                dbias += over_pixels(dy, CHANNELS_LAST)
                tl.store(dweight_ptr, dweight, mask=c < C)
                tl.store(dbias_ptr, dbias, mask=c < C)
        if sums_ptr is not None:
            tl.debug_barrier()  # the next tile may load what another thread has stored


def backward(
    gradients: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs_sums: bool,
) -> None:
    """Write (dx, dweight, dbias), or dx alone."""
    dx, dweight, dbias = gradients
    view = geometry(x.shape, dx.stride(), dy.stride(), x.stride())
    sms = processors(x.device)
    config = pick(view, x.itemsize, True, sms)
    tiles = triton.cdiv(view.sizes[0], config.BLOCK_M)
    programs = min(tiles, MAX_SPLITS, WARPS * sms // config.num_warps)
    sums = mean.new_empty(2, programs, x.shape[1]) if needs_sums else None
    launch(
        _whole_backward_kernel if config.whole else _walk_backward_kernel,
        (programs,),
        x.device,
        maps=(dx, dy, x),
        sums_ptr=sums,
        statistics=(mean, rstd),
        weight_ptr=weight,
        strides=view.strides,
        sizes=view.sizes,
        ACC=ACC[x.dtype],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )
    if sums is not None:
        add_splits(sums, (dweight, dbias))
