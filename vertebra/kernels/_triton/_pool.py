"""Sums over the pixels of each image: the first stage of pooling, and of what else pools.

One program owns one image, BLOCK_C channels and one split of the image's pixels; it walks them tile
by tile, keeps one sum per lane, and adds the lanes up once at its end:

    sums[k, n * splits + split, c] = sum of SUMMANDS(x, other)[k] over the split's pixels

What follows adds the splits of an image in a fixed order (`image_sum`). An image is split when
there are too few images and channel blocks to fill the GPU: batch 1 at 112x112 is not left to one
program per channel block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._affine import pick
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

# As many programs as fit at once: with 64 registers a lane, 8 of 4 warps fit on a multiprocessor.
# Two summands of two maps take more; what they hold in flight is twice as much as well.
REGISTERS = {"_pool_kernel": 80}

# What follows is one program per image, which reads all of its splits: with more of them it takes
# longer than they save.
MAX_IMAGE_SPLITS = 32

# Values of the tile with all splits that it reads at once: 8 a lane of 8 warps, so that the dozen
# of such tiles that a kernel may hold need no spill.
_IMAGE_TILE = 2048


def one_image(view: Geometry, N: int) -> Geometry:
    """Return a view with the pixels of one of the N images, to pick a tile for."""
    M, *rest = view.sizes
    return view._replace(sizes=(M // N, *rest))


@triton.jit
def value(x, other):
    """Summand: x itself."""
    return (x,)


@triton.jit
def image_sum(sums_ptr, n, splits, c, C, BLOCK_S: tl.constexpr):
    """Add up the splits of image n: `pool`'s sums of channels c, which is (1, BLOCK_C)."""
    s = tl.arange(0, BLOCK_S)[:, None]
    row = n * splits + s
    parts = tl.load(sums_ptr + row * C + c, mask=(s < splits) & (c < C), other=0.0)
    return tl.sum(parts, axis=0, keep_dims=True)


def image_blocks(sums: Tensor, N: int, lane: int = 8) -> dict[str, Any]:
    """Return the arguments of a kernel that reads `pool`'s sums, one program per image.

    A lane of a program has `lane` of the sums at a time.
    """
    _, rows, C = sums.shape
    splits = rows // N
    BLOCK_S = triton.next_power_of_2(splits)
    BLOCK_C = min(triton.next_power_of_2(C), _IMAGE_TILE // BLOCK_S)
    num_warps = max(1, min(8, BLOCK_S * BLOCK_C // (32 * lane)))
    blocks = {"BLOCK_S": BLOCK_S, "BLOCK_C": BLOCK_C, "num_warps": num_warps}
    return {"C": C, "splits": splits, **blocks}


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


def pool(
    x: Tensor,
    other: Tensor | None,
    summands: Any,
    count: int,
    max_splits: int = MAX_IMAGE_SPLITS,
) -> Tensor:
    """Return the sums (count, N * splits, C) of `summands(x, other)`, `count` (1 or 2) of them."""
    view = geometry(x.shape, *(x.stride() if t is None else t.stride() for t in (x, other)))
    N = x.shape[0]
    M, C = view.sizes[:2]
    P = M // N
    programs = 8 * processors(x.device) // N
    # narrow accesses of one map leave registers free: 16 channels of 7x7 at a time, and not 8
    narrow = other is None and view.unit * x.itemsize < 16
    tile_bytes = 8192 if narrow else 4096
    config = pick(one_image(view, N), x.itemsize, tile_bytes=tile_bytes, programs=programs)
    BLOCK_M, BLOCK_C, num_warps, splits = config
    # every split but the last is whole tiles, and none is empty
    split_p = triton.cdiv(triton.cdiv(P, BLOCK_M), min(splits, max_splits)) * BLOCK_M
    splits = triton.cdiv(P, split_p)
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
