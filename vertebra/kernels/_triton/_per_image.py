"""One pass over maps whose coefficients are per image and channel: what follows pooling.

    y[n, c, p] = sum of slopes[i][n, c] * maps[i][n, c, p] + bias[c] + spread[n, c] / P

`spread` is a value per image and channel spread evenly over its P pixels: the gradient of a mean.
One program owns one tile, which lies within one image, so that its coefficients are one vector and
cost nothing beside the maps.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._affine import pick
from ._launch import launch
from ._pool import one_image
from ._tile import (
    ACC,
    channel_block,
    extents,
    geometry,
    load_channels,
    load_tile,
    multiple,
    pixel_block,
    store_tile,
)


@triton.jit
def _combine_kernel(
    maps,
    slopes,
    bias_ptr,
    spread_ptr,
    strides,
    sizes,
    P,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, C = extents(sizes, CHANNELS_LAST, UNIT)
    if not CHANNELS_LAST:
        P = multiple(P, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    tiles = tl.cdiv(P, BLOCK_M)
    c = channel_block(tl.program_id(0) % blocks_c, BLOCK_C, CHANNELS_LAST)
    n = tl.program_id(0) // blocks_c // tiles
    start = n * P + tl.program_id(0) // blocks_c % tiles * BLOCK_M
    m = pixel_block(start, BLOCK_M, CHANNELS_LAST)
    tile = (sizes, m, c, (m < n * P + P) & (c < C))
    image = n.to(tl.int64) * C
    TILE: tl.constexpr = (BLOCK_M, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_M)

    y = tl.zeros(TILE, ACC)
    for i in tl.static_range(len(slopes)):
        x = load_tile(maps[1 + i], strides[1 + i], tile, ACC, CHANNELS_LAST, UNIT)
        y += load_channels(slopes[i] + image, c, C, ACC, 0.0) * x
    if bias_ptr is not None:
        y += load_channels(bias_ptr, c, C, ACC, 0.0)
    if spread_ptr is not None:
        y += load_channels(spread_ptr + image, c, C, ACC, 0.0) / P
    store_tile(maps[0], strides[0], tile, y, CHANNELS_LAST, UNIT)


def combine(
    y: Tensor,
    maps: tuple[Tensor, ...],
    slopes: tuple[Tensor, ...],
    *,
    bias: Tensor | None = None,
    spread: Tensor | None = None,
) -> None:
    """Write y; `slopes`, one per map, and `spread` are (N, C) and contiguous, `bias` is (C,)."""
    view = geometry(y.shape, *(t.stride() for t in (y, *maps)))
    N = y.shape[0]
    M, C = view.sizes[:2]
    P = M // N
    config = pick(one_image(view, N), y.itemsize, tile_bytes=8192)
    launch(
        _combine_kernel,
        (triton.cdiv(C, config.BLOCK_C) * triton.cdiv(P, config.BLOCK_M) * N,),
        y.device,
        maps=(y, *maps),
        slopes=slopes,
        bias_ptr=bias,
        spread_ptr=spread,
        strides=view.strides,
        sizes=view.sizes,
        P=P,
        ACC=ACC[y.dtype],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )
