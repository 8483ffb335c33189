"""The mean of each channel over the image, and LayerNorm of those means: a classifier's way in.

    p[n, c] = mean of x[n, c] over H, W
    y = p        or with eps: y = (p - mean) * rstd * weight + bias, mean and rstd over c of p[n]

With phat = (p - mean) * rstd and dphat = dy * weight:

    dweight = sum over n of dy * phat        dbias = sum over n of dy
    dp = rstd * (dphat - mean(dphat) - phat * mean(dphat * phat))        or dy, without eps
    dx = dp / (H*W)

Shapes   x (N, C, H, W); y (N, C); weight, bias (C,) or None
Dtypes   x fp16 | bf16 | fp32 | fp64, y as x; vectors as x or fp32; arithmetic and sums in fp32
         (fp64 for fp64), one rounding, to y: p is not rounded on its way to LayerNorm
Layout   any strides; dx keeps x's memory format
Bytes    forward: x once. backward: dx once
Saves    with eps phat (N, C) and rstd (N) in fp32, and the vectors. Not x: only its strides
Raises   ValueError, TypeError: rank, channel count, shape, device or dtype of an argument; eps
Source   Lin et al. 2013 (arXiv:1312.4400); Ba et al. 2016 (arXiv:1607.06450). Like aten up to
         rounding: aten rounds p. Under autocast y has x's dtype, where aten's LayerNorm gives fp32
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_eps, check_image, check_vectors
from ._op import Op, Traffic, define, refuses, sums_dtype, wants_grad


def global_avg_pool(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float | None = None,
) -> Tensor:
    """Return the means over H and W, (N, C), normalised over C where `eps` is given.

    The module docstring is the contract.

    >>> x = torch.tensor([1.0, 3.0, 5.0, 7.0]).reshape(1, 2, 1, 2)
    >>> global_avg_pool(x)
    tensor([[2., 6.]])
    >>> global_avg_pool(x, torch.ones(2), torch.zeros(2), eps=1e-12)
    tensor([[-1.,  1.]])
    """
    if eps is not None:
        check_eps("global_avg_pool", eps)
    return op(x, weight, bias, eps)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> None:
    name = "global_avg_pool"
    check_image(name, x)
    check_vectors(name, x, weight=weight, bias=bias)
    if eps is None and not (weight is None and bias is None):
        raise ValueError(f"{name}: weight and bias belong to LayerNorm; give its eps, or leave out")


def _eager(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None) -> Tensor:
    if eps is None:
        return means(x)
    p = x.mean((2, 3), dtype=sums_dtype(x))
    weight, bias = (None if v is None else v.to(p.dtype) for v in (weight, bias))
    return F.layer_norm(p, p.shape[1:], weight, bias, eps).to(x.dtype)


def means(x: Tensor) -> Tensor:
    """Return the means over H and W, (N, C), by PyTorch's ops.

    On CPUs aten's `mean` begins with a copy in fp32 of a map in half precision. A pool sums in fp32
    without one.
    """
    copies = x.is_cpu and x.dtype in (torch.float16, torch.bfloat16)
    if copies and not torch.compiler.is_compiling() and not wants_grad(x):
        return F.avg_pool2d(x, x.shape[2:]).flatten(1)
    return x.mean((2, 3))


def _outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    N, C = x.shape[:2]
    dtype, saved = sums_dtype(x), eps is not None
    phat = x.new_empty((N, C) if saved else 0, dtype=dtype)
    return x.new_empty(N, C), phat, x.new_empty(N if saved else 0, dtype=dtype)


@define(
    "global_avg_pool(Tensor x, Tensor? weight, Tensor? bias, float? eps) "
    "-> (Tensor y, Tensor phat, Tensor rstd)",
    _outputs,
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ._triton import global_avg_pool as kernels

    outputs = _outputs(*args)
    kernels.forward(outputs, *args)
    return outputs


def _gradients(
    dy: Tensor,
    phat: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    size: list[int],
    stride: list[int],
    needs_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # the strides of empty_like(x), whatever x's are, without an x
    x = torch.empty_strided(size, stride, dtype=dy.dtype, device="meta")
    dx = torch.empty_like(x, device=dy.device)
    sums, dtype = dy.shape[1] if needs_sums else 0, sums_dtype(dy)
    return dx, dy.new_empty(sums, dtype=dtype), dy.new_empty(sums, dtype=dtype)


@define(
    "global_avg_pool_backward(Tensor dy, Tensor? phat, Tensor? rstd, Tensor? weight, "
    "SymInt[] size, SymInt[] stride, bool needs_sums) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _gradients,
)
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ._triton import global_avg_pool as kernels

    gradients = _gradients(*args)
    dy, phat, rstd, weight, *_ = args
    kernels.backward(gradients, dy, phat, rstd, weight)
    return gradients


class _GlobalAvgPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, eps = args
        y, phat, rstd = _forward(*args)
        rows = (None, None) if eps is None else (phat, rstd)
        ctx.save_for_backward(*rows, weight, bias)
        ctx.size, ctx.stride = x.shape, x.stride()
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        phat, rstd, weight, bias = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias, _ = ctx.needs_input_grad
        dx, dweight, dbias = _backward(
            # rows, which are small: a sum's gradient comes expanded, of stride zero
            *(dy.contiguous(), phat, rstd, weight, ctx.size, ctx.stride),
            needs_dweight or needs_dbias,
        )
        return (
            dx if needs_dx else None,
            dweight.to(weight.dtype) if needs_dweight else None,
            dbias.to(bias.dtype) if needs_dbias else None,
            None,
        )


def _triton(*args: Any) -> Tensor:
    return _GlobalAvgPool.apply(*args) if wants_grad(*args[:3]) else _forward(*args)[0]


def _traffic(x: Tensor, *_: Any) -> Traffic:
    maps = x.numel() * x.element_size()
    return Traffic(maps, maps)


op = Op("global_avg_pool", _check, _eager, _triton, refuses, _traffic)
