"""The passes both ops share: y = act(xhat * scale + bias + residual), its gradient, its sums.

`affine` is the tuple (mean, spread, scale, bias) of per-channel pointers, None where absent. With a
mean, xhat = (x - mean) * rstd, where `spread` is rstd, or a variance if SPREAD_IS_VAR; without,
xhat = x. `maps` is the tuple of map-sized pointers, `strides` that of their strides in the same
order.

One program of a map-sized pass owns one tile. One program of a reducing pass owns BLOCK_C channels
and one split of the pixels, walks it tile by tile, keeps a sum per lane, and adds the lanes up once
at its end; the splits' sums go to a (splits, C) buffer that a second, tiny kernel adds in a fixed
order: no atomics, and the same bits every time.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._act import ACTIVATIONS
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

# A reduction runs as many programs as fit at once, so that none is left for a second wave: with 128
# registers a lane, 4 programs of 4 warps fit on a multiprocessor, with 64, 8.
REGISTERS = {"_backward_kernel": 128}


Affine = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Config(NamedTuple):
    """A tile, and over how many programs the pixels of one channel block are split."""

    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    splits: int


@lru_cache(maxsize=4096)
def pick(view: Geometry, itemsize: int, *, tile_bytes: int, programs: int = 1) -> Config:
    """Choose a tile of at most `tile_bytes`, and at most `programs` programs for a reduction.

    An access takes an address, so the tile shrinks with its width. A row of the tile is at least
    64 bytes of bf16, and its far end wastes less than 1/8 where a power of two allows it.
    """
    M, C = view.sizes[:2]
    tile = tile_bytes // itemsize // max(1, min(4, 16 // (view.unit * itemsize)))
    if view.channels_last:
        BLOCK_C = min(triton.next_power_of_2(C), 128, tile)
        while BLOCK_C > 32 and triton.cdiv(C, BLOCK_C) * BLOCK_C * 7 > C * 8:
            BLOCK_C //= 2
        BLOCK_M = min(tile // BLOCK_C, triton.next_power_of_2(M))
    else:
        BLOCK_M = min(triton.next_power_of_2(M), 512, tile)
        BLOCK_C = min(tile // BLOCK_M, triton.next_power_of_2(C))
    tiles = triton.cdiv(M, BLOCK_M)
    splits = max(1, min(MAX_SPLITS, tiles, programs // triton.cdiv(C, BLOCK_C)))
    # every split but the last is whole tiles, and none is empty
    splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))
    return Config(BLOCK_M, BLOCK_C, 4 if BLOCK_M * BLOCK_C >= 512 else 1, splits)


@triton.jit
def moments(mean_ptr, spread_ptr, c, C, eps, SPREAD_IS_VAR: tl.constexpr, ACC: tl.constexpr):
    """Load mean and rstd; 0 and 1 without."""
    mean = load_channels(mean_ptr, c, C, ACC, 0.0)
    rstd = load_channels(spread_ptr, c, C, ACC, 1.0)
    if SPREAD_IS_VAR:
        rstd = 1.0 / tl.sqrt(rstd + eps)
    return mean, rstd


@triton.jit
def _apply_kernel(
    maps,
    affine,
    strides,
    sizes,
    eps,
    ACT: tl.constexpr,
    SPREAD_IS_VAR: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    y_ptr, x_ptr, residual_ptr = maps
    mean_ptr, spread_ptr, scale_ptr, bias_ptr = affine
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = channel_block(tl.program_id(0) % blocks_c, BLOCK_C, CHANNELS_LAST)
    m = pixel_block(tl.program_id(0) // blocks_c * BLOCK_M, BLOCK_M, CHANNELS_LAST)
    tile = (sizes, m, c, (m < M) & (c < C))
    mean, rstd = moments(mean_ptr, spread_ptr, c, C, eps, SPREAD_IS_VAR, ACC)
    slope = load_channels(scale_ptr, c, C, ACC, 1.0) * rstd
    bias = load_channels(bias_ptr, c, C, ACC, 0.0)

    x = load_tile(x_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT)
    z = (x - mean) * slope + bias
    if residual_ptr is not None:
        z += load_tile(residual_ptr, strides[2], tile, ACC, CHANNELS_LAST, UNIT)
    store_tile(y_ptr, strides[0], tile, ACT(z), CHANNELS_LAST, UNIT)


def apply(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    affine: Affine,
    act: str,
    *,
    eps: float = 0.0,
    spread_is_var: bool = False,
) -> None:
    """Write y = act(xhat * scale + bias + residual)."""
    maps = (y, x, residual)
    view = geometry(x.shape, *(y.stride() if t is None else t.stride() for t in maps))
    M, C = view.sizes[:2]
    config = pick(view, x.itemsize, tile_bytes=8192)
    launch(
        _apply_kernel,
        (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(C, config.BLOCK_C),),
        x.device,
        maps=maps,
        affine=affine,
        strides=view.strides,
        sizes=view.sizes,
        eps=eps,
        ACT=ACTIVATIONS[act][0],
        SPREAD_IS_VAR=spread_is_var,
        ACC=ACC[x.dtype],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )


@triton.jit
def _backward_kernel(
    maps,
    sums_ptr,
    affine,
    strides,
    sizes,
    split_m,
    eps,
    DACT: tl.constexpr,
    SPREAD_IS_VAR: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dx_ptr, dz_ptr, dy_ptr, x_ptr, y_ptr, residual_ptr = maps
    mean_ptr, spread_ptr, scale_ptr, bias_ptr = affine
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    split = tl.program_id(0) // blocks_c
    c = channel_block(tl.program_id(0) % blocks_c, BLOCK_C, CHANNELS_LAST)
    start = split * split_m
    stop = tl.minimum(start + split_m, M)
    mean, rstd = moments(mean_ptr, spread_ptr, c, C, eps, SPREAD_IS_VAR, ACC)
    slope = load_channels(scale_ptr, c, C, ACC, 1.0) * rstd
    bias = load_channels(bias_ptr, c, C, ACC, 0.0)
    TILE: tl.constexpr = (BLOCK_M, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_M)
    sum_dz = tl.zeros(TILE, ACC)
    sum_dz_deviation = tl.zeros(TILE, ACC)

    for m0 in range(start, stop, BLOCK_M):
        m = pixel_block(m0, BLOCK_M, CHANNELS_LAST)
        tile = (sizes, m, c, (m < stop) & (c < C))
        dz = load_tile(dy_ptr, strides[2], tile, ACC, CHANNELS_LAST, UNIT)
        if x_ptr is not None:
            x = load_tile(x_ptr, strides[3], tile, ACC, CHANNELS_LAST, UNIT)
            deviation = x - mean

        # dz = dy * act'(z): relu's from y where there is one, else with z recomputed
        if y_ptr is not None:
            y = load_tile(y_ptr, strides[4], tile, ACC, CHANNELS_LAST, UNIT)
            dz *= DACT(y)
        elif x_ptr is not None:
            z = deviation * slope + bias
            if residual_ptr is not None:
                z += load_tile(residual_ptr, strides[5], tile, ACC, CHANNELS_LAST, UNIT)
            dz *= DACT(z)

        if dz_ptr is not None:
            store_tile(dz_ptr, strides[1], tile, dz, CHANNELS_LAST, UNIT)
        if dx_ptr is not None:  # with statistics that are constants: dx = dz * scale * rstd
            store_tile(dx_ptr, strides[0], tile, dz * slope, CHANNELS_LAST, UNIT)
        if sums_ptr is not None:
            sum_dz += dz
            sum_dz_deviation += dz * deviation

    if sums_ptr is not None:
        dbias_ptr = sums_ptr + tl.num_programs(0) // blocks_c * C
        sum_dz_xhat = over_pixels(sum_dz_deviation, CHANNELS_LAST) * rstd
        tl.store(sums_ptr + split * C + c, sum_dz_xhat, mask=c < C)
        tl.store(dbias_ptr + split * C + c, over_pixels(sum_dz, CHANNELS_LAST), mask=c < C)


def backward(
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    residual: Tensor | None,
    affine: Affine,
    act: str,
    *,
    dz: Tensor | None,
    dx: Tensor | None,
    sums: tuple[Tensor, Tensor] | None,
    eps: float = 0.0,
    spread_is_var: bool = False,
) -> None:
    """Write those given of dz = dy * act'(z), dx = dz * scale * rstd, (sum(dz * xhat), sum(dz)).

    The derivative of relu is read off `y` where that is given; others come from z, recomputed out
    of `x` and `residual`.
    """
    maps = (dx, dz, dy, x, y, residual)
    like = next(t for t in (x, y, dx, dy) if t is not None)
    view = geometry(dy.shape, *((like if t is None else t).stride() for t in (like, *maps)))
    M, C = view.sizes[:2]
    tile_bytes = 4096 if act in ("none", "relu") else 2048  # exp and erf take registers
    programs = 4 * processors(dy.device)
    config = pick(view, dy.itemsize, tile_bytes=tile_bytes, programs=programs)
    tiles = triton.cdiv(M, config.BLOCK_M)
    splits = tiles if sums is None else config.splits
    scratch = None if sums is None else sums[0].new_empty(2, splits, C)
    launch(
        _backward_kernel,
        (triton.cdiv(C, config.BLOCK_C) * splits,),
        dy.device,
        maps=maps,
        sums_ptr=scratch,
        affine=affine,
        strides=view.strides[1:],
        sizes=view.sizes,
        split_m=triton.cdiv(tiles, splits) * config.BLOCK_M,
        eps=eps,
        DACT=ACTIVATIONS[act][1],
        SPREAD_IS_VAR=spread_is_var,
        ACC=ACC[dy.dtype],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )
    if scratch is not None and sums is not None:
        add_splits(scratch, sums)
