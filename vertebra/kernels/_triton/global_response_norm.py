"""Global response normalisation: the kernels.

Forward, three launches: `pool` sums x^2 per image, `_response_kernel` turns the sums into g and
into the slope of each (n, c), `combine` writes y = slope * x + bias.

Backward, three launches, four with dweight and dbias. `pool` sums dy * x and dy per image;
`_response_backward_kernel` turns them into the slopes of dx = dy_slope * dy + x_slope * x and into
each image's part of dweight and dbias, which `add_splits` adds up; `combine` writes dx.

The kernels here see no map. One program owns one image, as the mean over C asks for; it walks the
channels twice, and reads the same few KB again, from cache, the second time.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._per_image import combine
from ._pool import image_blocks, image_sum, pool
from ._splits import add_splits
from ._tile import load_channels


@triton.jit
def _square(x, other):
    return (x * x,)


@triton.jit
def _product(x, dy):
    return (dy * x,)


@triton.jit
def _product_and_dy(x, dy):
    return (dy * x, dy)


@triton.jit(do_not_specialize=["splits"])
def _response_kernel(
    sums_ptr,
    g_ptr,
    slope_ptr,
    weight_ptr,
    C,
    splits,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = g_ptr.dtype.element_ty
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((1, BLOCK_C), ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        g = tl.sqrt(image_sum(sums_ptr, n, splits, c, C, BLOCK_S))
        tl.store(g_ptr + n * C + c, g, mask=c < C)
        total += g
    rscale = 1.0 / (tl.sum(total) / C + eps)

    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        g = tl.sqrt(image_sum(sums_ptr, n, splits, c, C, BLOCK_S))
        slope = 1.0 + load_channels(weight_ptr, c, C, ACC, 0.0) * (g * rscale)
        tl.store(slope_ptr + n * C + c, slope, mask=c < C)


def forward(
    outputs: tuple[Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> None:
    """Write (y, g)."""
    y, g = outputs
    slope = g.new_empty(g.shape)
    sums = pool(x, None, _square, 1)
    launch(
        _response_kernel,
        (x.shape[0],),
        x.device,
        sums_ptr=sums,
        g_ptr=g,
        slope_ptr=slope,
        weight_ptr=weight,
        eps=eps,
        **image_blocks(sums, x.shape[0]),
    )
    combine(y, (x,), (slope,), bias=bias)


@triton.jit(do_not_specialize=["splits"])
def _response_backward_kernel(
    sums_ptr,
    g_ptr,
    slopes,
    parts_ptr,
    weight_ptr,
    C,
    splits,
    eps,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = g_ptr.dtype.element_ty
    dy_slope_ptr, x_slope_ptr = slopes
    N = tl.num_programs(0)
    n = tl.program_id(0).to(tl.int64)
    sum_g = tl.zeros((1, BLOCK_C), ACC)
    sum_g_dr = tl.zeros((1, BLOCK_C), ACC)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        g = load_channels(g_ptr + n * C, c, C, ACC, 0.0)
        dr = image_sum(sums_ptr, n, splits, c, C, BLOCK_S)
        dr *= load_channels(weight_ptr, c, C, ACC, 0.0)
        sum_g += g
        sum_g_dr += g * dr
    rscale = 1.0 / (tl.sum(sum_g) / C + eps)
    # what every g of the image loses because it raises their mean
    shared = tl.sum(sum_g_dr) / C * rscale * rscale

    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        g = load_channels(g_ptr + n * C, c, C, ACC, 0.0)
        t = image_sum(sums_ptr, n, splits, c, C, BLOCK_S)
        weight = load_channels(weight_ptr, c, C, ACC, 0.0)
        r = g * rscale
        dg = weight * t * rscale - shared
        # dg/dx = x / g, and 0 for a channel that is 0 all over
        x_slope = tl.where(g == 0.0, 0.0, dg / tl.where(g == 0.0, 1.0, g))
        tl.store(dy_slope_ptr + n * C + c, 1.0 + weight * r, mask=c < C)
        tl.store(x_slope_ptr + n * C + c, x_slope, mask=c < C)
        if parts_ptr is not None:
            u = image_sum(sums_ptr, N + n, splits, c, C, BLOCK_S)
            tl.store(parts_ptr + n * C + c, r * t, mask=c < C)
            tl.store(parts_ptr + (N + n) * C + c, u, mask=c < C)


def backward(
    gradients: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    eps: float,
    needs_sums: bool,
) -> None:
    """Write (dx, dweight, dbias)."""
    dx, dweight, dbias = gradients
    N, C = g.shape
    slopes = (g.new_empty(N, C), g.new_empty(N, C))
    parts = g.new_empty(2, N, C) if needs_sums else None
    sums = pool(x, dy, _product_and_dy if needs_sums else _product, 1 + needs_sums)
    launch(
        _response_backward_kernel,
        (N,),
        x.device,
        sums_ptr=sums,
        g_ptr=g,
        slopes=slopes,
        parts_ptr=parts,
        weight_ptr=weight,
        eps=eps,
        **image_blocks(sums, N, lane=16),  # with 8 ptxas spilled 8 bytes on sm_100
    )
    if parts is not None:
        add_splits(parts, (dweight, dbias))
    combine(dx, (dy, x), slopes)
