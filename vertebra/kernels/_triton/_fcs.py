"""The two fcs of a squeeze and excitation: the first from sums over pixels, the second by tiles.

Products are sums of outer products, kept one per lane until the end. The fcs are tens of MFLOP, a
few us on the FMA units, and there they are exact in fp32 on every device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

# 4 programs of 4 warps, or 2 of 8, fit on a multiprocessor at once
REGISTERS = {"_squeeze_kernel": 128}
# without, it spilled 8 bytes in one binary of triton 3.6's
MAXNREG = {"_squeeze_kernel": 128}

# the partial sums of an fc's tile: 64 registers a lane of 8 warps; fp64 is less in a hurry
PARTIALS = {torch.float32: 16384, torch.float64: 2048}


class Product(NamedTuple):
    """A tile of an fc, images x outputs x inputs, and how many splits are added at once."""

    IMAGES: int
    ROWS: int
    CHUNK: int
    BLOCK_S: int
    num_warps: int


def pick_product(N: int, R: int, C: int, splits: int, dtype: torch.dtype) -> Product:
    """Choose a tile of PARTIALS: 8 images, 16 outputs and the rest inputs, or what there is.

    Fewer images are fewer programs: then 8 outputs, for more of them. Half of it where splits are
    to be added, or what is read of them ahead spills.
    """
    partials = PARTIALS[dtype]
    images = min(8, triton.next_power_of_2(N))
    rows = min(16 if images == 8 else 8, triton.next_power_of_2(R))
    room = partials if splits == 1 else partials // 2
    chunk = min(triton.next_power_of_2(C), room // (images * rows))
    together = min(triton.next_power_of_2(splits), partials // 4 // (images * chunk) or 1)
    values = images * chunk * max(rows, together)
    return Product(images, rows, chunk, together, max(1, min(8, values // (partials // 32))))


@triton.jit
def add_up(
    sums_ptr,
    n,
    c,
    N,
    C,
    splits,
    IMAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the splits of images n, (IMAGES, 1, 1), channels c, (1, 1, CHUNK)."""
    total = tl.zeros((IMAGES, BLOCK_S, CHUNK), sums_ptr.dtype.element_ty)
    for s0 in range(0, splits, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)[None, :, None]
        inside = (n < N) & (s < splits) & (c < C)
        total += tl.load(sums_ptr + (n * splits + s) * C + c, mask=inside, other=0.0)
    return tl.sum(total, axis=1, keep_dims=True)


@triton.jit
def _squeeze_kernel(
    s_ptr,
    u_ptr,
    sums_ptr,
    fc,
    N,
    C,
    R,
    P,
    splits,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    weight_ptr, bias_ptr, stride_r, stride_c = fc
    blocks_n = tl.cdiv(N, IMAGES)  # neighbours read the same weights
    block_r = tl.program_id(0) // blocks_n
    n = tl.program_id(0) % blocks_n * IMAGES + tl.arange(0, IMAGES)[:, None, None].to(tl.int64)
    r = block_r * ROWS + tl.arange(0, ROWS)[None, :, None]
    total = tl.zeros((IMAGES, ROWS, CHUNK), u_ptr.dtype.element_ty)
    for c0 in range(0, C, CHUNK):
        c = c0 + tl.arange(0, CHUNK)[None, None, :]
        s = add_up(sums_ptr, n, c, N, C, splits, IMAGES, CHUNK, BLOCK_S) / P
        if s_ptr is not None:
            tl.store(s_ptr + n * C + c, s, mask=(n < N) & (c < C) & (block_r == 0))
        at = r * stride_r + c * stride_c
        weight = tl.load(weight_ptr + at, mask=(r < R) & (c < C), other=0.0)
        total += s * weight.to(s.dtype)
    u = tl.sum(total, axis=2, keep_dims=True)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + r, mask=r < R, other=0.0).to(u.dtype)
    tl.store(u_ptr + n * R + r, u, mask=(n < N) & (r < R))


@triton.jit
def project(
    a_ptr,
    fc,
    n,
    c,
    N,
    C,
    R,
    ACT: tl.constexpr,
    IMAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return the sum over r of ACT(a[n, r]) * weight[c, r], (IMAGES, BLOCK_C), plus bias[c]."""
    weight_ptr, bias_ptr, stride_c, stride_r = fc
    total = tl.zeros((IMAGES, BLOCK_C, CHUNK), a_ptr.dtype.element_ty)
    for r0 in range(0, R, CHUNK):
        r = r0 + tl.arange(0, CHUNK)[None, None, :]
        inside = (n < N)[:, None, None] & (r < R)
        a = ACT(tl.load(a_ptr + n[:, None, None] * R + r, mask=inside, other=0.0))
        at = c[None, :, None] * stride_c + r * stride_r
        weight = tl.load(weight_ptr + at, mask=(c < C)[None, :, None] & (r < R), other=0.0)
        total += a * weight.to(a.dtype)
    product = tl.sum(total, axis=2)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(product.dtype)[None, :]
    return product


def squeeze(
    u: Tensor, s: Tensor | None, sums: Tensor, fc1: Tensor, bias: Tensor | None, P: int
) -> None:
    """Write u = fc1 s + bias, and s, where `sums`, (N * splits, C), add up to s * P."""
    (N, R), C = u.shape, fc1.shape[1]
    splits = sums.shape[0] // N
    product = pick_product(N, R, C, splits, u.dtype)
    launch(
        _squeeze_kernel,
        (triton.cdiv(N, product.IMAGES) * triton.cdiv(R, product.ROWS),),
        u.device,
        s_ptr=s,
        u_ptr=u,
        sums_ptr=sums,
        fc=(fc1, bias, *fc1.stride()),
        N=N,
        C=C,
        R=R,
        P=P,
        splits=splits,
        **product._asdict(),
    )


def matrix(weight: Tensor) -> Tensor:
    """View the weight of a 1x1 convolution as that of a linear layer."""
    return weight[:, :, 0, 0] if weight.dim() == 4 else weight
