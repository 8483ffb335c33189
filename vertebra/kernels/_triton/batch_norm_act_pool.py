"""Batch normalisation, activation and a 3x3 max-pool of stride 2: the kernels.

A tile is BLOCK_M output columns by BLOCK_C channels, where an output column m counts over N and OW
together. A program owns one tile and walks down `rows` output rows, two input rows at each step:

              2j-1   2j  2j+1
      2i-1      x     x     x   <- the last row of the step before: its winner is still in registers
      2i        x     x     x   <- read
      2i+1      x     x     x   <- read, and kept for the next step

A window is decided row by row: the winner of each row, then the winner of the rows. "b, unless a
came first and is no less" is associative, so that this is the scan's own winner; it carries its x
and its place along. A window cut by the border reads its nearest pixel twice, under one and the
same place, which changes neither the maximum nor where it is.

Forward: the two launches of `_moments`, in training; `_max_pool_kernel`.

Backward: `_affine.backward` adds up dweight and dbias over the maxima, which the forward pass has
kept, a quarter of the map. `_unpool_kernel` owns the four pixels (2i, 2j) to (2i+1, 2j+1) of each
window in its tile. They are also in the windows to the right, below and diagonally, whose gradients
it reads too: four windows, nine places to compare with, no atomics.

Where pixels are contiguous, a row is read as runs of (even, odd) pairs, at full width, and the odd
column to the left of each pair, or the window to the right of each, is gathered from the cache. An
odd row length breaks the pairs: then all columns are gathered.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _affine
from ._act import ACTIVATIONS
from ._affine import moments, pick
from ._launch import launch
from ._moments import batch_moments
from ._tile import (
    ACC,
    Geometry,
    channel_block,
    geometry,
    load_channels,
    multiple,
    pixel_block,
    processors,
)

# 8 programs of 2 warps at once, each with two rows of x under way
REGISTERS = {"_max_pool_kernel": 128, "_unpool_kernel": 128}

# A run ends with the row, since windows do.
ROWS = ("_max_pool_kernel", "_unpool_kernel")

# Neighbours one element off, and every second element of a row: no two lanes' are adjacent.
GATHERS = {"_max_pool_kernel": ("gathered_ptr",), "_unpool_kernel": ("gathered",)}

# Activations that keep the order of z: the maximum is found before they are applied.
_KEEPS_ORDER = ("none", "relu")


class View(NamedTuple):
    """Two grids: `fine` strides (n, c, h, w) are of maps like x, `coarse` ones of maps like y.

    Units are what runs along the contiguous axis start and end at multiples of. `paired`: pixels
    are contiguous and rows consist of pairs.
    """

    fine: tuple[tuple[int, ...], ...]
    coarse: tuple[tuple[int, ...], ...]
    channels_last: bool
    paired: bool
    fine_unit: int
    coarse_unit: int


@lru_cache(maxsize=4096)
def _view(
    shape: tuple[int, int, int, int],
    fine: tuple[tuple[int, ...], ...],
    coarse: tuple[tuple[int, ...], ...],
) -> View:
    """Choose the tile's order by the first fine map, and find the units."""
    N, C, H, W = shape
    pooled = (N, C, (H + 1) // 2, (W + 1) // 2)
    # a dimension of size 1 never moves the pointer
    fine, coarse = (
        tuple(tuple(s if n > 1 else 0 for s, n in zip(st, sizes, strict=True)) for st in strides)
        for strides, sizes in ((fine, shape), (coarse, pooled))
    )
    channels_last = geometry(shape, fine[0]).channels_last
    axis = 1 if channels_last else 3

    def unit(run: int, strides: tuple[tuple[int, ...], ...]) -> int:
        others = (s for st in strides for i, s in enumerate(st) if i != axis)
        return gcd(8, run, *others) if all(st[axis] == 1 for st in strides) else 1

    if channels_last:
        both = unit(C, fine + coarse)
        return View(fine, coarse, True, False, both, both)
    paired = W % 2 == 0 and all(st[3] == 1 for st in fine)
    return View(fine, coarse, False, paired, unit(W, fine), unit(pooled[3], coarse))


class Config(NamedTuple):
    """A tile, the output rows a program walks down, and the programs."""

    BLOCK_M: int
    BLOCK_C: int
    num_warps: int
    rows: int
    programs: int


@lru_cache(maxsize=4096)
def _pick(shape: tuple[int, int, int, int], view: View, itemsize: int, sms: int) -> Config:
    """Choose a tile, and the longest walks that still leave 32 programs to a multiprocessor.

    A lane owns 8 bytes of y: with 16, two rows of windows and what is kept of a third take more
    than 128 registers. The pairs of a row are 16 bytes of x a lane even so.
    The first row of a walk is read by the walk above too: long walks read less. 32 programs are
    four waves of the eight that fit at once, so that the last one, partly empty, costs little. With
    4 warps to a program, and with 2 where 8 columns of 32 channels are a tile, ptxas spilled 8
    bytes on sm_80.
    """
    N, C, H, W = shape
    M, OH = N * ((W + 1) // 2), (H + 1) // 2
    flat = Geometry((M, C, 1, 1), (), view.channels_last, view.coarse_unit)
    BLOCK_M, BLOCK_C, _, _ = pick(flat, itemsize, tile_bytes=512)
    if view.channels_last and BLOCK_C < 64:
        BLOCK_M = max(1, BLOCK_M // 2)
    num_warps = max(1, min(4, BLOCK_M * BLOCK_C // 128))  # a window takes registers
    tiles = triton.cdiv(M, BLOCK_M) * triton.cdiv(C, BLOCK_C)
    rows = triton.cdiv(OH, min(OH, triton.cdiv(32 * sms, tiles)))
    return Config(BLOCK_M, BLOCK_C, num_warps, rows, tiles * triton.cdiv(OH, rows))


@triton.jit
def _walk(sizes, rows, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Return what this program owns: output columns as (n, j), channels, a mask, output rows."""
    N, C, H, W = sizes
    OH = (H + 1) // 2
    OW = (W + 1) // 2
    if CHANNELS_LAST:
        C = multiple(C, UNIT)
    else:
        OW = multiple(OW, UNIT)
    walks = tl.cdiv(OH, rows)
    first = tl.program_id(0) % walks * rows
    tile = tl.program_id(0) // walks
    blocks_c = tl.cdiv(C, BLOCK[1])
    c = channel_block(tile % blocks_c, BLOCK[1], CHANNELS_LAST)
    m0 = tile // blocks_c * BLOCK[0]
    m = pixel_block(m0, BLOCK[0], CHANNELS_LAST)
    inside = (m < N * OW) & (c < C)
    return m // OW, m % OW, c, inside, m0, first, tl.minimum(first + rows, OH)


@triton.jit
def _at(stride, n, c, w, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr):
    """Offset of image n, channel c, column w, in row 0; 64-bit, for tensors past 2^31 elements."""
    n = n.to(tl.int64) * multiple(stride[0], UNIT)
    if CHANNELS_LAST:
        return n + c.to(tl.int64) * stride[1] + w.to(tl.int64) * multiple(stride[3], UNIT)
    else:
        return n + c.to(tl.int64) * multiple(stride[1], UNIT) + w.to(tl.int64) * stride[3]


@triton.jit
def _pairs_at(stride, sizes, m0, c, UNIT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Offsets of the pairs of columns that the output columns from m0 on begin with; a mask."""
    N, C, _, W = sizes
    W = multiple(W, UNIT)
    column = pixel_block(2 * m0, 2 * BLOCK_M, False)
    inside = (column < N * W) & (c < C)
    return _at(stride, column // W, c, column % W, False, UNIT), inside


@triton.jit
def _down(stride, h, UNIT: tl.constexpr):
    """Offset of row h."""
    return tl.cast(h, tl.int64) * multiple(stride[2], UNIT)


@triton.jit
def _winner(a, b):
    """The one of a and b that the scan ends with if b comes after a: (key, x, place)."""
    later = (b[0] > a[0]) | (b[0] != b[0])
    return tl.where(later, b[0], a[0]), tl.where(later, b[1], a[1]), tl.where(later, b[2], a[2])


@triton.jit
def _key(x, vectors, ACT: tl.constexpr, KEEPS_ORDER: tl.constexpr):
    """What the pool compares: act(z), or x * slope, which orders x as z does."""
    mean, slope, bias = vectors
    if KEEPS_ORDER:
        return x * slope
    else:
        return ACT((x - mean) * slope + bias)


@triton.jit
def _row(source, h, row, vectors, MODE: tl.constexpr):
    """The winner of row h, which is row `row` of every window."""
    ACT: tl.constexpr = MODE[0]
    KEEPS_ORDER: tl.constexpr = MODE[1]
    ACC: tl.constexpr = MODE[2]
    PAIRED: tl.constexpr = MODE[3]
    x_ptr, beside_ptr, columns, pairs, places, inside, stride = source
    down = _down(stride, h, MODE[4])
    left = tl.load(beside_ptr + columns[0] + down, mask=inside, other=0.0).to(ACC)
    if PAIRED:
        x = tl.load(x_ptr + pairs[0] + down, mask=pairs[1], other=0.0).to(ACC)
        middle, right = tl.split(tl.reshape(x, (inside.shape[0], inside.shape[1], 2)))
    else:
        middle = tl.load(x_ptr + columns[1] + down, mask=inside, other=0.0).to(ACC)
        right = tl.load(x_ptr + columns[2] + down, mask=inside, other=0.0).to(ACC)
    best = (_key(left, vectors, ACT, KEEPS_ORDER), left, 3 * row + places[0])
    best = _winner(best, (_key(middle, vectors, ACT, KEEPS_ORDER), middle, 3 * row + 1))
    return _winner(best, (_key(right, vectors, ACT, KEEPS_ORDER), right, 3 * row + places[1]))


@triton.jit
def _max_pool_kernel(
    maps,
    gathered_ptr,
    affine,
    strides,
    sizes,
    rows,
    eps,
    ACT: tl.constexpr,
    KEEPS_ORDER: tl.constexpr,
    SPREAD_IS_VAR: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PAIRED: tl.constexpr,
    FINE_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    y_ptr, peak_ptr, at_ptr, x_ptr = maps
    mean_ptr, spread_ptr, weight_ptr, bias_ptr = affine
    _, C, H, W = sizes
    n, j, c, inside, m0, first, last = _walk(sizes, rows, CHANNELS_LAST, UNIT, (BLOCK_M, BLOCK_C))
    mean, rstd = moments(mean_ptr, spread_ptr, c, C, eps, SPREAD_IS_VAR, ACC)
    slope = load_channels(weight_ptr, c, C, ACC, 1.0) * rstd
    bias = load_channels(bias_ptr, c, C, ACC, 0.0)
    vectors = (mean, slope, bias)

    # at the border the nearest column of the window, under its own place
    left = tl.maximum(2 * j - 1, 0)
    right = tl.minimum(2 * j + 1, W - 1)
    places = (left - 2 * j + 1, right - 2 * j + 1)
    columns = (
        _at(strides[0], n, c, left, CHANNELS_LAST, FINE_UNIT),
        _at(strides[0], n, c, 2 * j, CHANNELS_LAST, FINE_UNIT),
        _at(strides[0], n, c, right, CHANNELS_LAST, FINE_UNIT),
    )
    pairs = (columns[1], inside)
    if PAIRED:
        pairs = _pairs_at(strides[0], sizes, m0, c, FINE_UNIT, BLOCK_M)
    if x_ptr is None:
        x_ptr = gathered_ptr
    beside_ptr = x_ptr
    if gathered_ptr is not None:
        beside_ptr = gathered_ptr
    source = (x_ptr, beside_ptr, columns, pairs, places, inside, strides[0])
    out = _at(strides[1], n, c, j, CHANNELS_LAST, UNIT)

    MODE: tl.constexpr = (ACT, KEEPS_ORDER, ACC, PAIRED, FINE_UNIT)
    above = tl.maximum(2 * first - 1, 0)
    key, x, at = _row(source, above, above - 2 * first + 1, vectors, MODE)
    for i in range(first, last):
        best = _winner((key, x, at), _row(source, 2 * i, 1, vectors, MODE))
        below = tl.minimum(2 * i + 1, H - 1)
        key, x, at = _row(source, below, below - 2 * i + 1, vectors, MODE)
        best = _winner(best, (key, x, at))
        at -= 6  # it is row 0 of the next window

        down = _down(strides[1], i, UNIT)
        y = ACT((best[1] - mean) * slope + bias) if KEEPS_ORDER else best[0]
        tl.store(y_ptr + out + down, y.to(y_ptr.dtype.element_ty), mask=inside)
        if peak_ptr is not None:
            tl.store(peak_ptr + out + down, best[1].to(peak_ptr.dtype.element_ty), mask=inside)
        if at_ptr is not None:
            tl.store(at_ptr + out + down, best[2].to(tl.uint8), mask=inside)


def forward(
    outputs: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
) -> None:
    """Write (y, at, peak, mean, rstd, new_mean, new_var), those that are not empty."""
    y, at, peak, mean, rstd, new_mean, new_var = outputs
    affine = (running_mean, running_var, weight, bias)
    if training:
        tracked = running_mean is not None
        running = (running_mean, running_var) if tracked else None
        batch_moments(
            x, (mean, rstd), running, (new_mean, new_var) if tracked else None, momentum, eps
        )
        affine = (mean, rstd, weight, bias)

    view = _view(tuple(x.shape), (x.stride(),), (y.stride(),))
    config = _pick(tuple(x.shape), view, x.itemsize, processors(x.device))
    wide = view.channels_last or view.paired
    launch(
        _max_pool_kernel,
        (config.programs,),
        x.device,
        maps=(
            y,
            peak if peak.numel() else None,
            at if at.numel() else None,
            x if wide else None,
        ),
        gathered_ptr=None if view.channels_last else x,
        affine=affine,
        strides=(view.fine[0], view.coarse[0]),
        sizes=tuple(x.shape),
        rows=config.rows,
        eps=eps,
        ACT=ACTIVATIONS[act][0],
        KEEPS_ORDER=act in _KEEPS_ORDER,
        SPREAD_IS_VAR=not training and running_var is not None,
        ACC=ACC[x.dtype],
        CHANNELS_LAST=view.channels_last,
        PAIRED=view.paired,
        FINE_UNIT=view.fine_unit,
        UNIT=view.coarse_unit,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )


@triton.jit
def _windows(ptrs, dy_at, place_at, inside, ACC: tl.constexpr):
    """The gradients of windows and the places they go to."""
    dy = tl.load(ptrs[0] + dy_at, mask=inside, other=0.0).to(ACC)
    return dy, tl.load(ptrs[1] + place_at, mask=inside, other=255)


@triton.jit
def _to(window, place: tl.constexpr):
    """What of a window's gradient goes to this place of it."""
    return tl.where(window[1] == place, window[0], 0.0)


@triton.jit
def _write_dx(
    dx_ptr, x_ptr, dx_at, x_at, inside, dy, vectors, DACT: tl.constexpr, ACC: tl.constexpr
):
    """Write the gradient of pixels whose windows have `dy` for them."""
    dz = dy
    if x_ptr is not None:
        deviation = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(ACC) - vectors[0]
        dz *= DACT(deviation * vectors[1] + vectors[2])
        if len(vectors) > 3:  # the statistics depend on x
            dz -= vectors[4] + deviation * vectors[3]
    tl.store(dx_ptr + dx_at, (dz * vectors[1]).to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _unpool_kernel(
    maps,
    gathered,
    affine,
    sums,
    strides,
    sizes,
    rows,
    eps,
    DACT: tl.constexpr,
    SPREAD_IS_VAR: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PAIRED: tl.constexpr,
    FINE_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dx_ptr, x_ptr, dy_ptr, at_ptr = maps
    mean_ptr, spread_ptr, weight_ptr, bias_ptr = affine
    N, C, H, W = sizes
    OH = (H + 1) // 2
    OW = (W + 1) // 2
    n, j, c, inside, m0, first, last = _walk(sizes, rows, CHANNELS_LAST, UNIT, (BLOCK_M, BLOCK_C))
    mean, rstd = moments(mean_ptr, spread_ptr, c, C, eps, SPREAD_IS_VAR, ACC)
    slope = load_channels(weight_ptr, c, C, ACC, 1.0) * rstd
    bias = load_channels(bias_ptr, c, C, ACC, 0.0)
    vectors = (mean, slope, bias)
    if sums is not None:
        dweight = load_channels(sums[0], c, C, ACC, 0.0) * rstd / (N * H * W)
        dbias = load_channels(sums[1], c, C, ACC, 0.0) / (N * H * W)
        vectors = (mean, slope, bias, dweight, dbias)

    beside = inside & (j + 1 < OW)
    beside_ptrs = (gathered[2], gathered[3])
    if CHANNELS_LAST:
        beside_ptrs = (dy_ptr, at_ptr)
    dy_at = _at(strides[2], n, c, j, CHANNELS_LAST, UNIT)
    at_at = _at(strides[3], n, c, j, CHANNELS_LAST, UNIT)
    dy_beside = _at(strides[2], n, c, j + 1, CHANNELS_LAST, UNIT)
    at_beside = _at(strides[3], n, c, j + 1, CHANNELS_LAST, UNIT)
    if PAIRED:
        dx_pairs, inside_pairs = _pairs_at(strides[0], sizes, m0, c, FINE_UNIT, BLOCK_M)
        x_pairs, _ = _pairs_at(strides[1], sizes, m0, c, FINE_UNIT, BLOCK_M)
    else:
        if dx_ptr is None:
            dx_ptr = gathered[0]
            x_ptr = gathered[1]
        odd = inside & (2 * j + 1 < W)
        dx_even = _at(strides[0], n, c, 2 * j, CHANNELS_LAST, FINE_UNIT)
        dx_odd = _at(strides[0], n, c, 2 * j + 1, CHANNELS_LAST, FINE_UNIT)
        x_even = _at(strides[1], n, c, 2 * j, CHANNELS_LAST, FINE_UNIT)
        x_odd = _at(strides[1], n, c, 2 * j + 1, CHANNELS_LAST, FINE_UNIT)

    dy_down = _down(strides[2], first, UNIT)
    at_down = _down(strides[3], first, UNIT)
    here = _windows((dy_ptr, at_ptr), dy_at + dy_down, at_at + at_down, inside, ACC)
    right = _windows(beside_ptrs, dy_beside + dy_down, at_beside + at_down, beside, ACC)
    for i in range(first, last):
        dy_down = _down(strides[2], i + 1, UNIT)
        at_down = _down(strides[3], i + 1, UNIT)
        lower = inside & (i + 1 < OH)
        below = _windows((dy_ptr, at_ptr), dy_at + dy_down, at_at + at_down, lower, ACC)
        lower = beside & (i + 1 < OH)
        across = _windows(beside_ptrs, dy_beside + dy_down, at_beside + at_down, lower, ACC)

        for k in tl.static_range(2):
            h = 2 * i + k
            if k == 0:
                even = _to(here, 4)
                uneven = _to(here, 5) + _to(right, 3)
            else:
                even = _to(here, 7) + _to(below, 1)
                uneven = _to(here, 8) + _to(right, 6) + _to(below, 2) + _to(across, 0)
            dx_down = _down(strides[0], h, FINE_UNIT)
            x_down = _down(strides[1], h, FINE_UNIT)
            if PAIRED:
                dz = tl.reshape(tl.join(even, uneven), (BLOCK_C, 2 * BLOCK_M))
                _write_dx(
                    *(dx_ptr, x_ptr, dx_pairs + dx_down, x_pairs + x_down),
                    *(inside_pairs & (h < H), dz, vectors, DACT, ACC),
                )
            else:
                _write_dx(
                    *(dx_ptr, x_ptr, dx_even + dx_down, x_even + x_down),
                    *(inside & (h < H), even, vectors, DACT, ACC),
                )
                _write_dx(
                    *(dx_ptr, x_ptr, dx_odd + dx_down, x_odd + x_down),
                    *(odd & (h < H), uneven, vectors, DACT, ACC),
                )
        here = below
        right = across


def backward(
    gradients: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    x: Tensor | None,
    at: Tensor | None,
    peak: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    spread: Tensor | None,
    training: bool,
    eps: float,
    act: str,
) -> None:
    """Write (dx, dweight, dbias): dx where x is given, the sums where peak is."""
    dx, dweight, dbias = gradients
    affine = (mean, spread, weight, bias)
    sums = (dweight, dbias)
    if peak is not None:
        _affine.backward(
            *(dy, peak, None, None, affine, act),
            dz=None,
            dx=None,
            sums=sums,
            eps=eps,
            spread_is_var=not training and spread is not None,
        )
    if x is None or at is None:
        return

    # with constant statistics and no activation, dx is dy, scaled, and x is not read
    source = x if training or act != "none" else None
    fine = (dx.stride(), dx.stride() if source is None else source.stride())
    view = _view(tuple(dx.shape), fine, (dy.stride(), at.stride()))
    config = _pick(tuple(dx.shape), view, dx.itemsize, processors(dx.device))
    wide = view.channels_last or view.paired
    launch(
        _unpool_kernel,
        (config.programs,),
        dx.device,
        maps=(dx if wide else None, source if wide else None, dy, at),
        gathered=(
            None if wide else dx,
            None if wide else source,
            None if view.channels_last else dy,
            None if view.channels_last else at,
        ),
        affine=affine,
        sums=sums if training else None,
        strides=(*view.fine, *view.coarse),
        sizes=tuple(dx.shape),
        rows=config.rows,
        eps=eps,
        DACT=ACTIVATIONS[act][1],
        SPREAD_IS_VAR=not training and spread is not None,
        ACC=ACC[dx.dtype],
        CHANNELS_LAST=view.channels_last,
        PAIRED=view.paired,
        FINE_UNIT=view.fine_unit,
        UNIT=view.coarse_unit,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )
