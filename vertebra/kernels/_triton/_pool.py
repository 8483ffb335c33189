"""Sums over the pixels of each image: the first stage of pooling, and of what else pools.

One program owns one image, BLOCK_C channels and one split of the image's pixels; it walks them tile
by tile, keeps one sum per lane, and adds the lanes up once at its end:

    sums[k, n * splits + split, c] = sum of SUMMANDS(x, other)[k] over the split's pixels

What follows adds the splits of an image in a fixed order. An image is split when there are too few
images and channel blocks to fill the GPU: batch 1 at 112x112 runs on as many programs as batch 256.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._affine import Config
from ._launch import launch
from ._tile import (
    ACC,
    Geometry,
    channel_block,
    extents,
    geometry,
    load_tile,
    multiple,
    over_pixels,
    pixel_block,
    processors,
)


@lru_cache(maxsize=4096)
def _pick(view: Geometry, N: int, itemsize: int, programs: int) -> Config:
    """Choose a tile of at most 4096 bytes, within one image, and the splits of an image."""
    M, C = view.sizes[:2]
    P = M // N
    tile = 4096 // itemsize // max(1, min(4, 16 // (view.unit * itemsize)))
    if view.channels_last:
        BLOCK_C = min(triton.next_power_of_2(C), 128, tile)
        BLOCK_M = min(tile // BLOCK_C, triton.next_power_of_2(P))
    else:
        BLOCK_M = min(triton.next_power_of_2(P), 512, tile)
        BLOCK_C = min(tile // BLOCK_M, triton.next_power_of_2(C))
    tiles = triton.cdiv(P, BLOCK_M)
    splits = max(1, min(tiles, programs // (N * triton.cdiv(C, BLOCK_C))))
    # every split but the last is whole tiles, and none is empty
    splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))
    return Config(BLOCK_M, BLOCK_C, 4 if BLOCK_M * BLOCK_C >= 512 else 1, splits)


@triton.jit
def value(x, other):
    """Summand: x itself."""
    return (x,)


@triton.jit
def _pool_kernel(
    maps,
    sums_ptr,
    strides,
    sizes,
    P,
    split_p,
    SUMMANDS: tl.constexpr,
    COUNT: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    x_ptr, other_ptr = maps
    _, C = extents(sizes, CHANNELS_LAST, UNIT)
    if not CHANNELS_LAST:
        P = multiple(P, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    splits = tl.cdiv(P, split_p)
    c = channel_block(tl.program_id(0) % blocks_c, BLOCK_C, CHANNELS_LAST)
    row = tl.program_id(0) // blocks_c
    n = row // splits
    start = n * P + row % splits * split_p
    stop = tl.minimum(start + split_p, n * P + P)
    TILE: tl.constexpr = (BLOCK_M, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_M)
    first = tl.zeros(TILE, ACC)
    second = tl.zeros(TILE, ACC)

    for m0 in range(start, stop, BLOCK_M):
        m = pixel_block(m0, BLOCK_M, CHANNELS_LAST)
        tile = (sizes, m, c, (m < stop) & (c < C))
        x = load_tile(x_ptr, strides[0], tile, ACC, CHANNELS_LAST, UNIT)
        other = x
        if other_ptr is not None:
            other = load_tile(other_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT)
        summands = SUMMANDS(x, other)
        first += summands[0]
        if COUNT == 2:
            second += summands[1]

    tl.store(sums_ptr + row.to(tl.int64) * C + c, over_pixels(first, CHANNELS_LAST), mask=c < C)
    if COUNT == 2:
        row += tl.num_programs(0) // blocks_c
        total = over_pixels(second, CHANNELS_LAST)
        tl.store(sums_ptr + row.to(tl.int64) * C + c, total, mask=c < C)


def pool(x: Tensor, other: Tensor | None, summands: Any, count: int) -> Tensor:
    """Return the sums (count, N * splits, C) of `summands(x, other)`, `count` (1 or 2) of them."""
    view = geometry(x.shape, *(x.stride() if t is None else t.stride() for t in (x, other)))
    N = x.shape[0]
    M, C = view.sizes[:2]
    BLOCK_M, BLOCK_C, num_warps, splits = _pick(view, N, x.itemsize, 8 * processors(x.device))
    P = M // N
    split_p = triton.cdiv(triton.cdiv(P, BLOCK_M), splits) * BLOCK_M
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.new_empty(count, N * splits, C, dtype=dtype)
    launch(
        _pool_kernel,
        (triton.cdiv(C, BLOCK_C) * N * splits,),
        x.device,
        maps=(x, other),
        sums_ptr=sums,
        strides=view.strides,
        sizes=view.sizes,
        P=P,
        split_p=split_p,
        SUMMANDS=summands,
        COUNT=count,
        ACC=ACC[x.dtype],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
        num_warps=num_warps,
    )
    return sums
