"""How kernels see an (N, C, H, W) tensor: tiles of pixels x channels, at any strides.

A tile is BLOCK_M pixels by BLOCK_C channels. A pixel index m counts over N, H and W together, so a
tile runs across image borders and a 7x7 map wastes no lanes. The fastest axis of the tile is the
one that is contiguous in memory:

    channels last                     channels first
              c  ->                             m  ->
        +-------------+                   +-------------+
      m |  BLOCK_M    |                 c |  BLOCK_C    |
      | |  x BLOCK_C  |                 | |  x BLOCK_M  |
      v +-------------+                 v +-------------+

`geometry` merges what strides allow to merge: dense channels_last becomes M rows of C (HW = W = 1),
dense NCHW becomes N x C rows of HW (W = 1). Triton specialises the ones away, so m // HW and p // W
cost nothing there. It also finds the unit that sizes and strides are multiples of, for `multiple`
to tell the compiler: Triton's own specialisation knows multiples of 16 only, and would read a 14x14
map (196 pixels) or one of 104 channels one element at a time.
"""

from functools import cache, lru_cache
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# what a map's values are computed in
ACC = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Geometry(NamedTuple):
    """The merged view: sizes (M, C, HW, W), strides (n, c, h, w) per tensor, the tile's order."""

    sizes: tuple[int, int, int, int]
    strides: tuple[tuple[int, ...], ...]
    channels_last: bool
    unit: int  # 1 to 8: runs along the contiguous axis start and end at its multiples


@lru_cache(maxsize=4096)
def geometry(shape: tuple[int, int, int, int], *strides: tuple[int, ...]) -> Geometry:
    """Merge the dimensions of tensors of one `shape`; the first one chooses the tile's order."""
    N, C, H, W = shape
    # a dimension of size 1 never moves the pointer: give it no stride, so that it always merges
    strides = tuple(
        tuple(s if n > 1 else 0 for s, n in zip(st, shape, strict=True)) for st in strides
    )
    pixel, channel = (strides[0][3] or strides[0][2] or strides[0][0]), strides[0][1]
    channels_last = 0 < channel < pixel or pixel == 0

    if H == 1 or W == 1 or all(st[2] == W * st[3] for st in strides):
        strides = tuple((st[0], st[1], st[3] or st[2], 0) for st in strides)
        H, W = H * W, 1
        if channels_last and (N == 1 or H == 1 or all(st[0] == H * st[2] for st in strides)):
            strides = tuple((st[2] or st[0], st[1], 0, 0) for st in strides)
            N, H = N * H, 1
    axis, run = (1, C) if channels_last else (2, H * W) if W == 1 else (3, W)
    others = (s for st in strides for i, s in enumerate(st) if i != axis)
    unit = gcd(8, run, *others) if all(st[axis] == 1 for st in strides) else 1
    return Geometry((N * H * W, C, H * W, W), strides, channels_last, unit)


@cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors the grid should fill."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 2  # ahead of time: an H100's; the interpreter: a few


@triton.jit
def channel_block(pid, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    if CHANNELS_LAST:
        return c[None, :]
    else:
        return c[:, None]


@triton.jit
def pixel_block(start, BLOCK_M: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    m = start + tl.arange(0, BLOCK_M)
    if CHANNELS_LAST:
        return m[:, None]
    else:
        return m[None, :]


@triton.jit
def multiple(x, UNIT: tl.constexpr):
    """Return x, known to the compiler to be the multiple of UNIT that it is."""
    return x // UNIT * UNIT


@triton.jit
def extents(sizes, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr):
    """Return how many pixels and channels there are."""
    if CHANNELS_LAST:
        return sizes[0], multiple(sizes[1], UNIT)
    else:
        return multiple(sizes[0], UNIT), sizes[1]


@triton.jit
def offset(stride, sizes, m, c, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr):
    """Offset of pixel m, channel c; 64-bit, for tensors past 2^31 elements."""
    if CHANNELS_LAST:
        HW = sizes[2]
        stride_c = stride[1]
    else:
        HW = multiple(sizes[2], UNIT)
        stride_c = multiple(stride[1], UNIT)
    W = sizes[3]
    n = (m // HW).to(tl.int64)
    p = m % HW
    h = (p // W).to(tl.int64)
    w = (p % W).to(tl.int64)
    base = n * multiple(stride[0], UNIT) + c.to(tl.int64) * stride_c
    return base + h * stride[2] + w * stride[3]


@triton.jit
def load_tile(
    ptr, stride, tile, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr
):
    """Load a tile, which is (sizes, m, c, mask), as ACC; 0 outside of the mask."""
    sizes, m, c, inside = tile
    at = offset(stride, sizes, m, c, CHANNELS_LAST, UNIT)
    return tl.load(ptr + at, mask=inside, other=0.0).to(ACC)


@triton.jit
def store_tile(ptr, stride, tile, x, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr):
    """Store a tile, which is (sizes, m, c, mask), rounded to the type of its target."""
    sizes, m, c, inside = tile
    at = offset(stride, sizes, m, c, CHANNELS_LAST, UNIT)
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_channels(ptr, c, C, ACC: tl.constexpr, default: tl.constexpr):
    """Load a per-channel vector as ACC, or `default` where the pointer is None."""
    if ptr is None:
        return tl.full(c.shape, default, ACC)
    else:
        return tl.load(ptr + c, mask=c < C, other=default).to(ACC)


@triton.jit
def over_pixels(x, CHANNELS_LAST: tl.constexpr):
    """Sum a tile over its pixels; the result broadcasts against the tile."""
    if CHANNELS_LAST:
        return tl.sum(x, axis=0, keep_dims=True)
    else:
        return tl.sum(x, axis=1, keep_dims=True)
