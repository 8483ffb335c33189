"""Global response normalisation: every channel scaled by how large it is beside the others.

    g[n, c] = sqrt(sum of x[n, c]^2 over H, W)        r[n] = g[n] / (mean over c of g[n] + eps)
    y = x + weight * (x * r) + bias

With d = mean(g) + eps, t = sum(dy * x) and u = sum(dy) over H, W of an image:

    dweight = sum over n of r * t        dbias = sum over n of u        dr = weight * t
    dg = dr / d - mean over c of (dr * g) / d^2
    dx = dy * (1 + weight * r) + dg * x / g        (without its last term where g is 0)

Shapes   x, y (N, C, H, W); weight, bias (C,)
Dtypes   x fp16 | bf16 | fp32 | fp64, y as x; vectors as x or fp32; arithmetic and sums in fp32
         (fp64 for fp64), one rounding, to y
Layout   any strides; y keeps x's memory format
Bytes    forward: x twice, y once. backward: dy and x twice, dx once
Saves    x, g (N, C) in fp32, weight
Raises   ValueError, TypeError: rank, channel count, shape, device or dtype of an argument; eps
Source   Woo et al. 2023 (arXiv:2301.00808). timm and transformers round the statistics to x's
         dtype: in fp16 a norm past 65504 is infinite there (|x| = 800 at 96x96), and finite here.
         As there, fp32 squares overflow from |x| = 1.8e19 on
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._check import check_eps, check_image, check_vectors
from ._op import Op, Traffic, define, refuses, sums_dtype, wants_grad


def global_response_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Return `x + weight * (x * r) + bias`; the module docstring is the contract.

    >>> x = torch.tensor([3.0, 4.0, 0.0, 0.0]).reshape(1, 2, 1, 2)  # g is 5 and 0, its mean 2.5
    >>> global_response_norm(x, torch.ones(2), torch.zeros(2), eps=1e-12).flatten()
    tensor([ 9., 12.,  0.,  0.])
    """
    check_eps("global_response_norm", eps)
    return op(x, weight, bias, eps)


def _check(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_image("global_response_norm", x)
    check_vectors("global_response_norm", x, weight=weight, bias=bias)


def _eager(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x.to(sums_dtype(x))
    weight, bias = (v.to(wide.dtype)[:, None, None] for v in (weight, bias))
    g = wide.norm(p=2, dim=(2, 3), keepdim=True)
    r = g / (g.mean(dim=1, keepdim=True) + eps)
    return (wide + torch.addcmul(bias, weight, wide * r)).to(x.dtype)


def _outputs(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[1], dtype=sums_dtype(x))


@define(
    "global_response_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor g)",
    _outputs,
)
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    from ._triton import global_response_norm as kernels

    outputs = _outputs(*args)
    kernels.forward(outputs, *args)
    return outputs


def _gradients(
    dy: Tensor, x: Tensor, g: Tensor, weight: Tensor, eps: float, needs_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.shape[1] if needs_sums else 0
    return torch.empty_like(x), g.new_empty(sums), g.new_empty(sums)


@define(
    "global_response_norm_backward(Tensor dy, Tensor x, Tensor g, Tensor weight, float eps, "
    "bool needs_sums) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _gradients,
)
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ._triton import global_response_norm as kernels

    gradients = _gradients(*args)
    kernels.backward(gradients, *args)
    return gradients


class _GlobalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, g = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, g, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias, _ = ctx.needs_input_grad
        dx, dweight, dbias = _backward(dy, x, g, weight, ctx.eps, needs_dweight or needs_dbias)
        return (
            dx if needs_dx else None,
            dweight.to(weight.dtype) if needs_dweight else None,
            dbias.to(weight.dtype) if needs_dbias else None,
            None,
        )


def _triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if wants_grad(x, weight, bias):
        return _GlobalResponseNorm.apply(x, weight, bias, eps)
    return _forward(x, weight, bias, eps)[0]


def _traffic(x: Tensor, *_: Any) -> Traffic:
    maps = x.numel() * x.element_size()
    return Traffic(3 * maps, 5 * maps)


op = Op("global_response_norm", _check, _eager, _triton, refuses, _traffic)
