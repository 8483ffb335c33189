"""Per-channel scale and shift, residual add and activation in one pass: eval BN's epilogue.

    y = act(xhat * scale + bias + residual)        xhat = x, or (x - mean) / sqrt(var + eps)

With `mean` and `var` this is batch normalisation by stored statistics (eval mode, or a frozen BN);
they are constants, not differentiated.

    dz = dy * act'(z)        dresidual = dz        dbias = sum(dz)        dscale = sum(dz * xhat)
    dx = dz * scale [/ sqrt(var + eps)]

Shapes   x, residual, y (N, C, H, W); scale, bias, mean, var (C,) or None
Dtypes   x fp16 | bf16 | fp32 | fp64, residual and y as x; vectors as x or fp32; arithmetic and sums
         in fp32 (fp64 for fp64), one rounding, to y
Layout   any strides; y keeps x's memory format
Bytes    forward: x, residual, y once each. backward: dy and dx, and dresidual unless act is none,
         and what of x, y and residual the derivatives need (see Saves)
Saves    x if scale wants a gradient or the activation needs z; y for relu otherwise or when there
         is a residual; residual for the other activations; the vectors
Raises   ValueError, TypeError: rank, channel count, shape, device or dtype of an argument; unknown
         act
Source   Ioffe & Szegedy 2015 (arXiv:1502.03167), inference form. Like aten up to rounding: aten
         rounds after the normalisation and again after the add
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._act import check_act, finish, needs_input
from ._check import check_eps, check_image, check_residual, check_vectors, promote_under_autocast
from ._op import Op, Traffic, define, refuses, sums_dtype, wants_grad


def scale_bias_act(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    act: str = "none",
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Return `act(xhat * scale + bias + residual)`; the module docstring is the contract.

    >>> x = torch.tensor([-1.0, 2.0]).reshape(1, 2, 1, 1)
    >>> scale_bias_act(x, torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]), act="relu").flatten()
    tensor([0., 5.])
    """
    check_eps("scale_bias_act", eps)
    x, residual = promote_under_autocast(x, residual)
    return op(x, scale, bias, residual, mean, var, eps, act)


def _check(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    act: str,
) -> None:
    name = "scale_bias_act"
    check_image(name, x)
    check_vectors(name, x, scale=scale, bias=bias, mean=mean, var=var)
    if (mean is None) != (var is None):
        raise ValueError(f"{name}: give both mean and var, or neither")
    check_act(name, act)
    check_residual(name, x, residual)


def _eager(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    if var is not None:
        y = F.batch_norm(x, mean, var, scale, bias, False, 0.0, eps)
    else:
        y = x.clone() if scale is None else x * scale[:, None, None]
        y = (y if bias is None else y + bias[:, None, None]).to(x.dtype)
    return finish(y, residual, act)


def _output(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@define(
    "scale_bias_act(Tensor x, Tensor? scale, Tensor? bias, Tensor? residual, Tensor? mean, "
    "Tensor? var, float eps, str act) -> Tensor",
    _output,
)
def _forward(*args: Any) -> Tensor:
    from ._triton import scale_bias_act as kernels

    y = _output(*args)
    kernels.forward(y, *args)
    return y


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    act: str,
    needs_sums: bool,
    needs_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # a gradient has the layout of the map it is of
    like = next(t for t in (x, y, dy) if t is not None)
    dx = torch.empty_like(like)
    dresidual = torch.empty_like(like) if needs_dresidual else dy.new_empty(0)
    sums = dy.shape[1] if needs_sums else 0
    dtype = sums_dtype(dy)
    return dx, dresidual, dy.new_empty(sums, dtype=dtype), dy.new_empty(sums, dtype=dtype)


@define(
    "scale_bias_act_backward(Tensor dy, Tensor? x, Tensor? y, Tensor? residual, Tensor? scale, "
    "Tensor? bias, Tensor? mean, Tensor? var, float eps, str act, bool needs_sums, "
    "bool needs_dresidual) -> (Tensor dx, Tensor dresidual, Tensor dscale, Tensor dbias)",
    _gradients,
)
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ._triton import scale_bias_act as kernels

    gradients = _gradients(*args)
    kernels.backward(gradients, *args)
    return gradients


class _ScaleBiasAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, scale, bias, residual, mean, var, eps, act = args
        y = _forward(*args)
        keeps_x, keeps_y, keeps_residual = _saved(act, residual, ctx.needs_input_grad[1])
        ctx.save_for_backward(
            x if keeps_x else None,
            y if keeps_y else None,
            residual if keeps_residual else None,
            *(scale, bias, mean, var),
        )
        ctx.eps, ctx.act = eps, act
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, y, residual, scale, bias, mean, var = ctx.saved_tensors
        needs_dx, needs_dscale, needs_dbias, needs_dresidual = ctx.needs_input_grad[:4]
        # without an activation dz is dy itself: nothing to write
        writes_dresidual = needs_dresidual and ctx.act != "none"
        dx, dresidual, dscale, dbias = _backward(
            *(dy, x, y, residual, scale, bias, mean, var, ctx.eps, ctx.act),
            needs_dscale or needs_dbias,
            writes_dresidual,
        )
        return (
            dx if needs_dx else None,
            dscale.to(scale.dtype) if needs_dscale else None,
            dbias.to(bias.dtype) if needs_dbias else None,
            (dresidual if writes_dresidual else dy) if needs_dresidual else None,
            *(None, None, None, None),
        )


def _saved(act: str, residual: Tensor | None, needs_dscale: bool) -> tuple[bool, bool, bool]:
    """Return whether the backward pass reads x, y and residual.

    relu's derivative comes from z recomputed out of x where x is kept anyway and suffices, else
    from y, which the next layer keeps anyway; the others recompute z.
    """
    x = needs_dscale or needs_input(act)
    y = act == "relu" and (residual is not None or not needs_dscale)
    return x, y, needs_input(act) and residual is not None


def _triton(*args: Any) -> Tensor:
    return _ScaleBiasAct.apply(*args) if wants_grad(*args[:4]) else _forward(*args)


def _traffic(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> Traffic:
    act: str = rest[-1]
    maps = x.numel() * x.element_size()
    has_residual = residual is not None
    needs_dscale = scale is not None and scale.requires_grad
    reads = 1 + sum(_saved(act, residual, needs_dscale))
    writes = 1 + (has_residual and act != "none")
    return Traffic((2 + has_residual) * maps, (reads + writes) * maps)


op = Op("scale_bias_act", _check, _eager, _triton, refuses, _traffic)
