"""Layer scale, stochastic depth and the residual add: the kernels.

    out = residual + row * gamma * x
    dx = row * gamma * dout        dgamma = sum(row * dout * x)

The forward pass is one program per tile. dx is the same pass over dout without a residual, and runs
as one, unless gamma wants its gradient: then a program owns BLOCK_C channels and one split of the
pixels, writes dx as it walks, keeps a sum per lane, and the splits' sums are added up by `_splits`.

A tile runs across image borders (see `_tile`), so every pixel looks up the noise of its own sample,
m // P, and the comparison becomes part of the mask that x is loaded under: a dropped sample is zero
without having been read. Neighbouring pixels share a sample, and Triton knows it where P is known
to be a multiple of the vector's width, so that the mask does not narrow the access.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._affine import pick
from ._launch import launch
from ._splits import add_splits
from ._tile import (
    ACC,
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

# A reduction runs as many programs as fit at once (see _affine): with 80 registers, 6 of 4 warps.
# The tile of the forward pass is half of _affine's: x waits for its noise, and twice as many
# programs hide that.
REGISTERS = {"_drop_path_add_kernel": 48, "_drop_path_backward_kernel": 80}


@triton.jit
def _kept(
    noise_ptr, keep_prob, P, sizes, m, inside, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr
):
    """Return which of the pixels `inside` are of samples that are kept.

    Numbers that are not negative compare as their bits do; of a comparison of integers the compiler
    sees that neighbouring pixels share its outcome, of floats it does not.
    """
    if noise_ptr is None:
        return inside
    else:
        if CHANNELS_LAST:
            n = m // P
        else:  # here HW is never merged away
            n = m // multiple(sizes[2], UNIT)
        noise = tl.load(noise_ptr.to(tl.pointer_type(tl.int32)) + n, mask=inside, other=0)
        limit = tl.full(m.shape, keep_prob, tl.float32).to(tl.int32, bitcast=True)
        return inside & (noise < limit)


@triton.jit
def _drop_path_add_kernel(
    maps,
    gamma_ptr,
    noise_ptr,
    strides,
    sizes,
    P,
    keep_prob,
    scale,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    out_ptr, x_ptr, residual_ptr = maps
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = channel_block(tl.program_id(0) % blocks_c, BLOCK_C, CHANNELS_LAST)
    m = pixel_block(tl.program_id(0) // blocks_c * BLOCK_M, BLOCK_M, CHANNELS_LAST)
    kept = _kept(noise_ptr, keep_prob, P, sizes, m, m < M, CHANNELS_LAST, UNIT)
    slope = load_channels(gamma_ptr, c, C, ACC, 1.0) * scale

    branch = (sizes, m, c, kept & (c < C))
    tile = (sizes, m, c, (m < M) & (c < C))
    out = load_tile(x_ptr, strides[1], branch, ACC, CHANNELS_LAST, UNIT) * slope
    if residual_ptr is not None:
        out += load_tile(residual_ptr, strides[2], tile, ACC, CHANNELS_LAST, UNIT)
    store_tile(out_ptr, strides[0], tile, out, CHANNELS_LAST, UNIT)


def forward(
    out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    noise: Tensor | None,
    keep_prob: float,
    scale: float,
) -> None:
    """Write out = residual + row * gamma * x."""
    maps = (out, x, residual)
    view = geometry(x.shape, *((x if t is None else t).stride() for t in maps))
    M, C = view.sizes[:2]
    config = pick(view, x.itemsize, tile_bytes=4096)
    launch(
        _drop_path_add_kernel,
        (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(C, config.BLOCK_C),),
        x.device,
        maps=maps,
        gamma_ptr=gamma,
        noise_ptr=noise,
        strides=view.strides,
        sizes=view.sizes,
        P=x.shape[2] * x.shape[3],
        keep_prob=keep_prob,
        scale=scale,
        ACC=ACC[x.dtype],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )


@triton.jit
def _drop_path_backward_kernel(
    maps,
    sums_ptr,
    gamma_ptr,
    noise_ptr,
    strides,
    sizes,
    P,
    split_m,
    keep_prob,
    scale,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dx_ptr, dout_ptr, x_ptr = maps
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    split = tl.program_id(0) // blocks_c
    c = channel_block(tl.program_id(0) % blocks_c, BLOCK_C, CHANNELS_LAST)
    start = split * split_m
    stop = tl.minimum(start + split_m, M)
    slope = load_channels(gamma_ptr, c, C, ACC, 1.0) * scale
    TILE: tl.constexpr = (BLOCK_M, BLOCK_C) if CHANNELS_LAST else (BLOCK_C, BLOCK_M)
    sum_dout_x = tl.zeros(TILE, ACC)

    for m0 in range(start, stop, BLOCK_M):
        m = pixel_block(m0, BLOCK_M, CHANNELS_LAST)
        kept = _kept(noise_ptr, keep_prob, P, sizes, m, m < stop, CHANNELS_LAST, UNIT)
        branch = (sizes, m, c, kept & (c < C))
        tile = (sizes, m, c, (m < stop) & (c < C))
        dout = load_tile(dout_ptr, strides[1], branch, ACC, CHANNELS_LAST, UNIT)
        x = load_tile(x_ptr, strides[2], branch, ACC, CHANNELS_LAST, UNIT)
        store_tile(dx_ptr, strides[0], tile, dout * slope, CHANNELS_LAST, UNIT)
        sum_dout_x += dout * x

    dgamma = over_pixels(sum_dout_x, CHANNELS_LAST) * scale
    tl.store(sums_ptr + split * C + c, dgamma, mask=c < C)


def backward(
    gradients: tuple[Tensor, Tensor],
    dout: Tensor,
    x: Tensor | None,
    gamma: Tensor | None,
    noise: Tensor | None,
    keep_prob: float,
    scale: float,
) -> None:
    """Write dx = row * gamma * dout, and dgamma = sum(row * dout * x) where x is given."""
    dx, dgamma = gradients
    if x is None:
        forward(dx, dout, None, gamma, noise, keep_prob, scale)
        return
    maps = (dx, dout, x)
    view = geometry(x.shape, *(t.stride() for t in maps))
    M, C = view.sizes[:2]
    config = pick(view, x.itemsize, tile_bytes=4096, programs=6 * processors(x.device))
    scratch = dgamma.new_empty(1, config.splits, C)
    launch(
        _drop_path_backward_kernel,
        (triton.cdiv(C, config.BLOCK_C) * config.splits,),
        x.device,
        maps=maps,
        sums_ptr=scratch,
        gamma_ptr=gamma,
        noise_ptr=noise,
        strides=view.strides,
        sizes=view.sizes,
        P=x.shape[2] * x.shape[3],
        split_m=triton.cdiv(triton.cdiv(M, config.BLOCK_M), config.splits) * config.BLOCK_M,
        keep_prob=keep_prob,
        scale=scale,
        ACC=ACC[x.dtype],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )
    add_splits(scratch, (dgamma,))
