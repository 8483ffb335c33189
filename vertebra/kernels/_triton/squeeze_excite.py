"""Squeeze and excitation: the kernels.

    s = mean(x)    u = W1 s + b1    v = W2 act(u) + b2    y = out_act(x * gate(v) + residual)

    forward    _pool_kernel      image x channels x split    reads x            sums per split, or
                                                                                they are given
               _squeeze_kernel   images x hidden channels    adds the splits    s, u
               _scale_kernel     images x channels x split   reads x, residual  v, y
    backward   _sums_kernel      image x channels x split    reads dy, x, (y)   sums per split, (dz)
               _dhidden_kernel   images x hidden channels    adds the splits    dv, du
               _dweights_kernel  hidden channels x channels  adds the images    dW1, db1, dW2, db2
               _dx_kernel        images x channels x split   reads dy or dz     dx

Each fc needs all values of what comes before it, so a launch ends before each; with three of them,
the second fc has none of its own. A program of the pass that needs its result computes the part it
needs: for its channels, of all the images it owns at once. So does the last pass back with W1^T du.

What that costs: a program reads R weights of each of its channels, at most 4R bytes from L2, and
moves `pixels` values of it, in and out. `_pick` gives it pixels enough to keep the weights below an
eighth of that, several images of them where maps are small, as long as the GPU stays filled. One
kernel for both fcs would have to run on N / images programs, each reading all weights: RegNetY-4GF
at 14x14 (N = 256, C = 512, R = 128; 512 KB of weights) at two images a program is 67 MB through L2
while nothing else happens; here it is 13 MB on 256 programs for the first fc, and for the second 8
(NCHW) to 34 MB in a pass that moves 103 MB of maps.

The fcs themselves are in `_fcs`.
"""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _pool
from ._act import ACTIVATIONS, GATES
from ._affine import pick
from ._fcs import PARTIALS, add_up, matrix, pick_product, project, squeeze
from ._launch import launch
from ._splits import MAX_SPLITS
from ._tile import (
    Geometry,
    channel_block,
    extents,
    geometry,
    load_channels,
    load_tile,
    multiple,
    over_pixels,
    pixel_block,
    processors,
    store_tile,
)

# 4 programs of 4 warps, or 2 of 8, fit on a multiprocessor at once
REGISTERS = {
    "_scale_kernel": 128,
    "_sums_kernel": 128,
    "_dhidden_kernel": 128,
    "_dweights_kernel": 128,
    "_dx_kernel": 128,
}
# without, it spilled 8 bytes in one binary of triton 3.6's; with, so did _dx_kernel
MAXNREG = {"_scale_kernel": 128}


class Config(NamedTuple):
    """A tile, the images and the split of their pixels that a program owns, its chunk of R."""

    BLOCK_M: int
    BLOCK_C: int
    IMAGES: int
    CHUNK: int
    num_warps: int
    splits: int


@lru_cache(maxsize=4096)
def _pick(view: Geometry, N: int, R: int, itemsize: int, programs: int) -> Config:
    """Choose what a program of a map-sized pass owns: see the module docstring.

    At least 8 tiles, behind which the latency of the fc hides, unless that leaves fewer than
    `programs` programs. The fc's partial sums take 32 registers a lane, 64 for 8 images. Rows of 64
    channels are whole cache lines, and leave room for twice the images that rows of 128 do.
    """
    M, C = view.sizes[:2]
    P = M // N
    BLOCK_M, BLOCK_C, num_warps, _ = pick(_pool.one_image(view, N), itemsize, tile_bytes=8192)
    if view.channels_last and BLOCK_C == 128:
        BLOCK_M, BLOCK_C = min(2 * BLOCK_M, triton.next_power_of_2(P)), 64
    least = max(16 * R // itemsize, 8 * BLOCK_M)
    pixels = max(BLOCK_M, min(least, M * triton.cdiv(C, BLOCK_C) // programs))
    partials = num_warps * (1024 if itemsize < 8 else 512) // BLOCK_C
    images = max(1, min(pixels // P, N, 8, partials // 8))
    IMAGES = 1 << (int(images).bit_length() - 1)
    CHUNK = min(triton.next_power_of_2(R), max(16, partials // IMAGES))  # 64 bytes of a row
    tiles = triton.cdiv(P, BLOCK_M)
    splits = triton.cdiv(tiles, pixels // BLOCK_M)
    splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))  # as even as whole tiles allow
    return Config(BLOCK_M, BLOCK_C, IMAGES, CHUNK, num_warps, splits)


@triton.jit
def _of_image(values, n, image, CHANNELS_LAST: tl.constexpr):
    """Return the row of `values`, (IMAGES, BLOCK_C), that belongs to `image`, for its tiles."""
    row = tl.sum(tl.where((n == image)[:, None], values, 0.0), axis=0)
    if CHANNELS_LAST:
        return row[None, :]
    else:
        return row[:, None]


@triton.jit
def _scale_kernel(
    maps,
    fc,
    vectors,
    strides,
    sizes,
    P,
    split_p,
    R,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    OUT_ACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    IMAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    y_ptr, x_ptr, residual_ptr = maps
    u_ptr, v_ptr = vectors
    ACC: tl.constexpr = u_ptr.dtype.element_ty
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    if not CHANNELS_LAST:
        P = multiple(P, UNIT)
    N = M // P
    blocks_c = tl.cdiv(C, BLOCK_C)
    splits = tl.cdiv(P, split_p)
    block_c = tl.program_id(0) % blocks_c
    split = tl.program_id(0) // blocks_c % splits
    first = tl.program_id(0) // blocks_c // splits * IMAGES
    n = first + tl.arange(0, IMAGES).to(tl.int64)
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)

    v = project(u_ptr, fc, n, c, N, C, R, ACT, IMAGES, CHUNK, BLOCK_C)
    if v_ptr is not None:
        inside = (n < N)[:, None] & (c < C)[None, :] & (split == 0)
        tl.store(v_ptr + n[:, None] * C + c[None, :], v, mask=inside)
    gates = GATE(v)
    c = channel_block(block_c, BLOCK_C, CHANNELS_LAST)
    for image in range(first, tl.minimum(first + IMAGES, N)):
        gate = _of_image(gates, n, image, CHANNELS_LAST)
        start = image * P + split * split_p
        stop = tl.minimum(start + split_p, image * P + P)
        for m0 in range(start, stop, BLOCK_M):
            m = pixel_block(m0, BLOCK_M, CHANNELS_LAST)
            tile = (sizes, m, c, (m < stop) & (c < C))
            z = load_tile(x_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT) * gate
            if residual_ptr is not None:
                z += load_tile(residual_ptr, strides[2], tile, ACC, CHANNELS_LAST, UNIT)
            store_tile(y_ptr, strides[0], tile, OUT_ACT(z), CHANNELS_LAST, UNIT)


def forward(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    gate: str,
    out_act: str,
    shares: Tensor | None,
    keeps: bool,
) -> None:
    """Write (y, s, u, v), s and v only if `keeps`."""
    y, s, u, v = outputs
    fc1, fc2 = matrix(fc1_weight), matrix(fc2_weight)
    if shares is None:
        # the splits are added by tiles of many, so there may be as many as fill the GPU
        (sums,) = _pool.pool(x, None, _pool.value, 1, max_splits=MAX_SPLITS)
        pixels = x.shape[2] * x.shape[3]
    else:
        sums, pixels = shares.contiguous().flatten(0, 1), 1
    squeeze(u, s if keeps else None, sums, fc1, fc1_bias, pixels)
    _pass(
        _scale_kernel,
        (y, x, residual),
        (u, v if keeps else None),
        (fc2, fc2_bias, *fc2.stride()),
        ACT=ACTIVATIONS[act][0],
        GATE=GATES[gate][0],
        OUT_ACT=ACTIVATIONS[out_act][0],
    )


def _pass(kernel, maps, vectors, fc, **functions) -> None:
    """Launch a map-sized pass; maps[1] chooses the tile's order, vectors[0] is (N, R)."""
    like = maps[1]
    view = geometry(like.shape, *((like if t is None else t).stride() for t in (like, *maps)))
    N, R = vectors[0].shape
    M, C = view.sizes[:2]
    config = _pick(view, N, R, like.itemsize, 4 * processors(like.device))
    BLOCK_M, BLOCK_C, IMAGES, CHUNK, num_warps, splits = config
    launch(
        kernel,
        (triton.cdiv(C, BLOCK_C) * splits * triton.cdiv(N, IMAGES),),
        like.device,
        maps=maps,
        fc=fc,
        vectors=vectors,
        strides=view.strides[1:],
        sizes=view.sizes,
        P=M // N,
        split_p=triton.cdiv(triton.cdiv(M // N, BLOCK_M), splits) * BLOCK_M,
        R=R,
        **functions,
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        IMAGES=IMAGES,
        CHUNK=CHUNK,
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
        num_warps=num_warps,
    )


@triton.jit
def _sums_kernel(
    maps,
    sums_ptr,
    v_ptr,
    strides,
    sizes,
    P,
    split_p,
    GATE: tl.constexpr,
    DACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dz_ptr, dy_ptr, x_ptr, y_ptr, residual_ptr = maps
    ACC: tl.constexpr = sums_ptr.dtype.element_ty
    _, C = extents(sizes, CHANNELS_LAST, UNIT)
    if not CHANNELS_LAST:
        P = multiple(P, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    splits = tl.cdiv(P, split_p)
    c = channel_block(tl.program_id(0) % blocks_c, BLOCK_C, CHANNELS_LAST)
    row = tl.program_id(0) // blocks_c
    image = row // splits
    start = image * P + row % splits * split_p
    stop = tl.minimum(start + split_p, image * P + P)
    TILE: tl.constexpr = (BLOCK_M, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_M)
    total = tl.zeros(TILE, ACC)
    if v_ptr is not None:
        gate = GATE(load_channels(v_ptr + image.to(tl.int64) * C, c, C, ACC, 0.0))

    for m0 in range(start, stop, BLOCK_M):
        m = pixel_block(m0, BLOCK_M, CHANNELS_LAST)
        tile = (sizes, m, c, (m < stop) & (c < C))
        dz = load_tile(dy_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT)
        x = load_tile(x_ptr, strides[2], tile, ACC, CHANNELS_LAST, UNIT)
        # dz = dy * out_act'(z): relu's from y where there is one, else with z recomputed
        if y_ptr is not None:
            dz *= DACT(load_tile(y_ptr, strides[3], tile, ACC, CHANNELS_LAST, UNIT))
        elif v_ptr is not None:
            z = x * gate
            if residual_ptr is not None:
                z += load_tile(residual_ptr, strides[4], tile, ACC, CHANNELS_LAST, UNIT)
            dz *= DACT(z)
        if dz_ptr is not None:
            store_tile(dz_ptr, strides[0], tile, dz, CHANNELS_LAST, UNIT)
        total += dz * x

    tl.store(sums_ptr + row.to(tl.int64) * C + c, over_pixels(total, CHANNELS_LAST), mask=c < C)


@triton.jit
def _dhidden_kernel(
    dv_ptr,
    du_ptr,
    sums_ptr,
    v_ptr,
    u_ptr,
    fc,
    N,
    C,
    R,
    splits,
    DGATE: tl.constexpr,
    DACT: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    weight_ptr, stride_c, stride_r = fc
    blocks_n = tl.cdiv(N, IMAGES)
    block_r = tl.program_id(0) // blocks_n
    n = tl.program_id(0) % blocks_n * IMAGES + tl.arange(0, IMAGES)[:, None, None].to(tl.int64)
    r = block_r * ROWS + tl.arange(0, ROWS)[None, :, None]
    total = tl.zeros((IMAGES, ROWS, CHUNK), u_ptr.dtype.element_ty)
    for c0 in range(0, C, CHUNK):
        c = c0 + tl.arange(0, CHUNK)[None, None, :]
        inside = (n < N) & (c < C)
        # dv = sum(dz * x) * gate'(v)
        dv = DGATE(tl.load(v_ptr + n * C + c, mask=inside, other=0.0))
        dv *= add_up(sums_ptr, n, c, N, C, splits, IMAGES, CHUNK, BLOCK_S)
        tl.store(dv_ptr + n * C + c, dv, mask=inside & (block_r == 0))
        at = r * stride_r + c * stride_c
        weight = tl.load(weight_ptr + at, mask=(r < R) & (c < C), other=0.0)
        total += dv * weight.to(dv.dtype)
    # du = (W2^T dv) * act'(u)
    inside = (n < N) & (r < R)
    du = DACT(tl.load(u_ptr + n * R + r, mask=inside, other=0.0))
    du *= tl.sum(total, axis=2, keep_dims=True)
    tl.store(du_ptr + n * R + r, du, mask=inside)


@triton.jit
def _outer(
    a_ptr,
    b_ptr,
    r,
    c,
    N,
    R,
    C,
    ACT: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the sums over n of ACT(a[n, r]) * b[n, c], of ACT(a) and of b, each of rank 3."""
    product = tl.zeros((IMAGES, ROWS, COLUMNS), a_ptr.dtype.element_ty)
    sum_a = tl.zeros((IMAGES, ROWS, 1), a_ptr.dtype.element_ty)
    sum_b = tl.zeros((IMAGES, 1, COLUMNS), a_ptr.dtype.element_ty)
    for n0 in range(0, N, IMAGES):
        n = n0 + tl.arange(0, IMAGES)[:, None, None].to(tl.int64)
        a = ACT(tl.load(a_ptr + n * R + r, mask=(n < N) & (r < R), other=0.0))
        b = tl.load(b_ptr + n * C + c, mask=(n < N) & (c < C), other=0.0)
        product += a * b
        sum_a += a
        sum_b += b
    return (
        tl.sum(product, axis=0, keep_dims=True),
        tl.sum(sum_a, axis=0, keep_dims=True),
        tl.sum(sum_b, axis=0, keep_dims=True),
    )


@triton.jit
def _dweights_kernel(
    gradients,
    vectors,
    strides,
    N,
    C,
    R,
    ACT: tl.constexpr,
    IDENTITY: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dw1_ptr, db1_ptr, dw2_ptr, db2_ptr = gradients
    s_ptr, u_ptr, du_ptr, dv_ptr = vectors
    blocks_r = tl.cdiv(R, ROWS)
    block_r = tl.program_id(0) % blocks_r
    block_c = tl.program_id(0) // blocks_r
    r = block_r * ROWS + tl.arange(0, ROWS)[None, :, None]
    c = block_c * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    inside = (r < R) & (c < C)
    KIND: tl.constexpr = dw1_ptr.dtype.element_ty
    if tl.program_id(1) == 0:  # dW1[r, c] = sum(du * s), db1 = sum(du)
        dw1, db1, _s = _outer(du_ptr, s_ptr, r, c, N, R, C, IDENTITY, IMAGES, ROWS, COLUMNS)
        at = r * strides[0][0] + c * strides[0][1]
        tl.store(dw1_ptr + at, dw1.to(KIND), mask=inside)
        tl.store(db1_ptr + r, db1.to(KIND), mask=(r < R) & (block_c == 0))
    else:  # dW2[c, r] = sum(dv * act(u)), db2 = sum(dv)
        dw2, _h, db2 = _outer(u_ptr, dv_ptr, r, c, N, R, C, ACT, IMAGES, ROWS, COLUMNS)
        at = c * strides[1][0] + r * strides[1][1]
        tl.store(dw2_ptr + at, dw2.to(KIND), mask=inside)
        tl.store(db2_ptr + c, db2.to(KIND), mask=(c < C) & (block_r == 0))


@triton.jit
def _dx_kernel(
    maps,
    fc,
    vectors,
    strides,
    sizes,
    P,
    split_p,
    R,
    IDENTITY: tl.constexpr,
    GATE: tl.constexpr,
    DACT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    IMAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dx_ptr, dz_ptr, x_ptr = maps
    du_ptr, v_ptr = vectors
    ACC: tl.constexpr = du_ptr.dtype.element_ty
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    if not CHANNELS_LAST:
        P = multiple(P, UNIT)
    N = M // P
    blocks_c = tl.cdiv(C, BLOCK_C)
    splits = tl.cdiv(P, split_p)
    block_c = tl.program_id(0) % blocks_c
    split = tl.program_id(0) // blocks_c % splits
    first = tl.program_id(0) // blocks_c // splits * IMAGES
    n = first + tl.arange(0, IMAGES).to(tl.int64)
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)

    ds = project(du_ptr, fc, n, c, N, C, R, IDENTITY, IMAGES, CHUNK, BLOCK_C) / P
    inside = (n < N)[:, None] & (c < C)[None, :]
    gates = GATE(tl.load(v_ptr + n[:, None] * C + c[None, :], mask=inside, other=0.0))
    c = channel_block(block_c, BLOCK_C, CHANNELS_LAST)
    for image in range(first, tl.minimum(first + IMAGES, N)):
        gate = _of_image(gates, n, image, CHANNELS_LAST)
        through_s = _of_image(ds, n, image, CHANNELS_LAST)
        start = image * P + split * split_p
        stop = tl.minimum(start + split_p, image * P + P)
        for m0 in range(start, stop, BLOCK_M):
            m = pixel_block(m0, BLOCK_M, CHANNELS_LAST)
            tile = (sizes, m, c, (m < stop) & (c < C))
            dz = load_tile(dz_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT)
            if x_ptr is not None:
                x = load_tile(x_ptr, strides[2], tile, ACC, CHANNELS_LAST, UNIT)
                dz *= DACT(x * gate)
            store_tile(dx_ptr, strides[0], tile, dz * gate + through_s, CHANNELS_LAST, UNIT)


def backward(
    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    s: Tensor,
    u: Tensor,
    v: Tensor,
    act: str,
    gate: str,
    out_act: str,
    needs_weights: bool,
) -> None:
    """Write (dx, dresidual, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias)."""
    dx, dresidual, dw1, db1, dw2, db2 = gradients
    N, R = u.shape
    fc1, fc2 = matrix(fc1_weight), matrix(fc2_weight)
    C = fc1.shape[1]
    # dresidual is dz: where x alone does not yield it, the first pass writes it, the last reads it
    dz = dresidual if dresidual.numel() else None
    sums = _sums(dy, x, y, residual, v, gate, out_act, dz)
    splits = sums.shape[0] // N
    product = pick_product(N, R, C, splits, u.dtype)
    du, dv = u.new_empty(N, R), u.new_empty(N, C)
    launch(
        _dhidden_kernel,
        (triton.cdiv(N, product.IMAGES) * triton.cdiv(R, product.ROWS),),
        dy.device,
        dv_ptr=dv,
        du_ptr=du,
        sums_ptr=sums,
        v_ptr=v,
        u_ptr=u,
        fc=(fc2, *fc2.stride()),
        N=N,
        C=C,
        R=R,
        splits=splits,
        DGATE=GATES[gate][1],
        DACT=ACTIVATIONS[act][1],
        **product._asdict(),
    )
    identity = ACTIVATIONS["none"][0]
    if needs_weights:
        # as many images at once as 64 registers of partial sums allow: fewer round trips
        rows, columns = min(16, triton.next_power_of_2(R)), min(32, triton.next_power_of_2(C))
        images = min(triton.next_power_of_2(N), PARTIALS[u.dtype] // (rows * columns))
        dfc1, dfc2 = matrix(dw1), matrix(dw2)
        launch(
            _dweights_kernel,
            (triton.cdiv(R, rows) * triton.cdiv(C, columns), 2),
            dy.device,
            gradients=(dfc1, db1, dfc2, db2),
            vectors=(s, u, du, dv),
            strides=(dfc1.stride(), dfc2.stride()),
            N=N,
            C=C,
            R=R,
            ACT=ACTIVATIONS[act][0],
            IDENTITY=identity,
            IMAGES=images,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=8,
        )
    recomputes = out_act != "none" and dz is None
    _pass(
        _dx_kernel,
        (dx, dy if dz is None else dz, x if recomputes else None),
        (du, v),
        (fc1, None, *reversed(fc1.stride())),
        IDENTITY=identity,
        GATE=GATES[gate][0],
        DACT=ACTIVATIONS[out_act][1],
    )


def _sums(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    v: Tensor,
    gate: str,
    out_act: str,
    dz: Tensor | None,
) -> Tensor:
    """Return sum(dz * x), (N * splits, C), and write dz where it is wanted."""
    maps = (dz, dy, x, y, residual)
    view = geometry(x.shape, *((x if t is None else t).stride() for t in (x, *maps)))
    N = x.shape[0]
    M, C = view.sizes[:2]
    tile_bytes = 4096 if out_act in ("none", "relu") else 2048  # exp and erf take registers
    programs = 4 * processors(x.device) // N
    one = _pool.one_image(view, N)
    BLOCK_M, BLOCK_C, num_warps, splits = pick(
        one, x.itemsize, tile_bytes=tile_bytes, programs=programs
    )
    sums = v.new_empty(N * splits, C)
    launch(
        _sums_kernel,
        (triton.cdiv(C, BLOCK_C) * N * splits,),
        x.device,
        maps=maps,
        sums_ptr=sums,
        v_ptr=v if out_act != "none" and y is None else None,
        strides=view.strides[1:],
        sizes=view.sizes,
        P=M // N,
        split_p=triton.cdiv(triton.cdiv(M // N, BLOCK_M), splits) * BLOCK_M,
        GATE=GATES[gate][0],
        DACT=ACTIVATIONS[out_act][1],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=BLOCK_M,
        BLOCK_C=BLOCK_C,
        num_warps=num_warps,
    )
    return sums
