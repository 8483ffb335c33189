"""Batch normalisation by the batch's own statistics, residual add and activation: the kernels.

Forward, three launches: the two of `_moments`, and `_affine.apply` for y.

Backward, three launches. `_affine.backward`: dz (written where it is dresidual) and the splits'
sums; their addition; `_dx_kernel`: dx.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import _affine
from ._act import ACTIVATIONS
from ._affine import pick
from ._launch import launch
from ._moments import batch_moments
from ._tile import (
    ACC,
    channel_block,
    extents,
    geometry,
    load_channels,
    load_tile,
    pixel_block,
    store_tile,
)


def forward(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    act: str,
) -> None:
    """Write (y, mean, rstd, new_mean, new_var)."""
    y, mean, rstd, new_mean, new_var = outputs
    tracked = running_mean is not None and running_var is not None
    running = (running_mean, running_var) if tracked else None
    new_running = (new_mean, new_var) if tracked else None
    batch_moments(x, (mean, rstd), running, new_running, momentum, eps)
    _affine.apply(x, residual, y, (mean, rstd, weight, bias), act)


@triton.jit
def _dx_kernel(
    maps,
    affine,
    sums,
    strides,
    sizes,
    DACT: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dx_ptr, dz_ptr, x_ptr = maps
    mean_ptr, rstd_ptr, weight_ptr, bias_ptr = affine
    M, C = extents(sizes, CHANNELS_LAST, UNIT)
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = channel_block(tl.program_id(0) % blocks_c, BLOCK_C, CHANNELS_LAST)
    m = pixel_block(tl.program_id(0) // blocks_c * BLOCK_M, BLOCK_M, CHANNELS_LAST)
    tile = (sizes, m, c, (m < M) & (c < C))
    mean = load_channels(mean_ptr, c, C, ACC, 0.0)
    rstd = load_channels(rstd_ptr, c, C, ACC, 1.0)
    slope = load_channels(weight_ptr, c, C, ACC, 1.0) * rstd
    bias = load_channels(bias_ptr, c, C, ACC, 0.0)
    dweight = load_channels(sums[0], c, C, ACC, 0.0) * rstd / M
    dbias = load_channels(sums[1], c, C, ACC, 0.0) / M

    x = load_tile(x_ptr, strides[2], tile, ACC, CHANNELS_LAST, UNIT)
    dz = load_tile(dz_ptr, strides[1], tile, ACC, CHANNELS_LAST, UNIT)
    deviation = x - mean
    dz *= DACT(deviation * slope + bias)
    # dx = weight * rstd * (dz - E[dz] - xhat * E[dz * xhat]), where xhat = deviation * rstd
    dx = slope * (dz - dbias - deviation * dweight)
    store_tile(dx_ptr, strides[0], tile, dx, CHANNELS_LAST, UNIT)


def backward(
    gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
) -> None:
    """Write (dx, dresidual, dweight, dbias)."""
    dx, dresidual, dweight, dbias = gradients
    affine = (mean, rstd, weight, bias)
    # dresidual is dz: where x alone does not yield it, the first pass writes it and the second
    # reads it
    dz = dresidual if dresidual.numel() else None
    sums = (dweight, dbias)
    _affine.backward(dy, x, y, residual, affine, act, dz=dz, dx=None, sums=sums)

    maps = (dx, dy if dz is None else dz, x)
    view = geometry(x.shape, *(t.stride() for t in maps))
    M, C = view.sizes[:2]
    config = pick(view, x.itemsize, tile_bytes=8192)
    launch(
        _dx_kernel,
        (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(C, config.BLOCK_C),),
        x.device,
        maps=maps,
        affine=affine,
        sums=sums,
        strides=view.strides,
        sizes=view.sizes,
        DACT=ACTIVATIONS[act if dz is None else "none"][1],
        ACC=ACC[x.dtype],
        CHANNELS_LAST=view.channels_last,
        UNIT=view.unit,
        BLOCK_M=config.BLOCK_M,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
    )
