"""Batch normalisation by the batch's own statistics, residual add and activation.

    y = act((x - mean) * rstd * weight + bias + residual)
    mean = E[x]        rstd = 1 / sqrt(E[(x - mean)^2] + eps)        over N, H, W

and, where given, `running = (1 - momentum) * running + momentum * statistic`, with the unbiased
variance.

    dz = dy * act'(z)        dresidual = dz        dbias = sum(dz)        dweight = sum(dz * xhat)
    dx = weight * rstd * (dz - (dbias + xhat * dweight) / (N*H*W))

Shapes   x, residual, y (N, C, H, W); weight, bias, running_mean, running_var (C,) or None
Dtypes   x fp16 | bf16 | fp32 | fp64, residual and y as x; vectors as x or fp32; statistics and sums
         in fp32 (fp64 for fp64), merged tile by tile by Chan's rule, one rounding, to y
Layout   any strides; y keeps x's memory format
Bytes    forward: x twice, residual and y once. backward: dy and x twice, dx once; with a residual
         and an activation dresidual takes the place of dy in the second pass and is written in the
         first, which also reads y (relu) or residual (other activations)
Saves    x, mean, rstd and the vectors; y for relu with a residual (the next layer keeps it anyway),
         residual for other activations
Raises   ValueError, TypeError: rank, channel count, shape, device or dtype of an argument; unknown
         act; one value per channel, which has no variance
Source   Ioffe & Szegedy 2015 (arXiv:1502.03167); Chan, Golub & LeVeque 1983 for the merge. Like
         aten up to rounding: aten rounds after the normalisation and again after the add
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._act import check_act, finish, needs_input
from ._check import check_eps, check_image, check_residual, check_vectors, promote_under_autocast
from ._op import Op, Traffic, define, refuses, sums_dtype, wants_grad


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return `act(batch_norm(x) + residual)`, training form; the module docstring is the contract.

    The running statistics, where given, are updated in place, as by
    `torch.nn.functional.batch_norm`. For stored statistics see `scale_bias_act`.

    >>> x = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    >>> batch_norm_act(x, act="relu", eps=1e-12).flatten()
    tensor([0., 1.])
    """
    check_eps("batch_norm_act", eps)
    x, residual = promote_under_autocast(x, residual)
    return op(x, weight, bias, residual, running_mean, running_var, momentum, eps, act)


def _check(
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
    name = "batch_norm_act"
    check_image(name, x)
    vectors = {"weight": weight, "bias": bias}
    check_vectors(name, x, **vectors, running_mean=running_mean, running_var=running_var)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{name}: give both running_mean and running_var, or neither")
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"{name}: training needs more than one value per channel, got x of shape "
            f"{tuple(x.shape)}; use a larger batch or image, or eval mode"
        )
    check_act(name, act)
    check_residual(name, x, residual)


def _eager(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    act: str,
) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    return finish(y, residual, act)


def _outputs(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = sums_dtype(x)
    mean, rstd = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    if running_mean is None or running_var is None:
        return torch.empty_like(x), mean, rstd, x.new_empty(0), x.new_empty(0)
    new_mean, new_var = torch.empty_like(running_mean), torch.empty_like(running_var)
    return torch.empty_like(x), mean, rstd, new_mean, new_var


@define(
    "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? running_mean, Tensor? running_var, float momentum, float eps, str act) "
    "-> (Tensor y, Tensor mean, Tensor rstd, Tensor new_mean, Tensor new_var)",
    _outputs,
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ._triton import batch_norm_act as kernels

    outputs = _outputs(*args)
    kernels.forward(outputs, *args)
    return outputs


@_forward.in_place
def _forward_in_place(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advance the running statistics where they are: there is nothing left to publish."""
    from ._triton import batch_norm_act as kernels

    y, mean, rstd, no_mean, no_var = _outputs(*args[:4], None, None)
    kernels.forward((y, mean, rstd, *args[4:6]), *args)
    return y, mean, rstd, no_mean, no_var


def _gradients(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    recomputable = y is None and residual is None
    dresidual = dy.new_empty(0) if recomputable else torch.empty_like(x)
    return torch.empty_like(x), dresidual, torch.empty_like(mean), torch.empty_like(mean)


@define(
    "batch_norm_act_backward(Tensor dy, Tensor x, Tensor? y, Tensor? residual, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor rstd, str act) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _gradients,
)
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ._triton import batch_norm_act as kernels

    gradients = _gradients(*args)
    kernels.backward(gradients, *args)
    return gradients


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight, bias, residual, *_, act = args
        y, mean, rstd, new_mean, new_var = _forward(*args)
        # beside x: what tells act'(z) where x alone does not
        joined = residual is not None and act != "none"
        ctx.save_for_backward(
            x,
            y if joined and not needs_input(act) else None,
            residual if joined and needs_input(act) else None,
            *(weight, bias, mean, rstd),
        )
        ctx.act = act
        if not new_mean.numel():
            return y, None, None
        ctx.mark_non_differentiable(new_mean, new_var)
        return y, new_mean, new_var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, residual, weight, bias, mean, rstd = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias, needs_dresidual = ctx.needs_input_grad[:4]
        dx, dresidual, dweight, dbias = _backward(
            dy, x, y, residual, weight, bias, mean, rstd, ctx.act
        )
        if ctx.act == "none":
            dresidual = dy  # dz is dy itself: there was nothing to write
        return (
            dx if needs_dx else None,
            dweight.to(weight.dtype) if needs_dweight else None,
            dbias.to(bias.dtype) if needs_dbias else None,
            dresidual if needs_dresidual else None,
            *(None, None, None, None, None),
        )


def _triton(*args: Any) -> Tensor:
    if wants_grad(*args[:4]):
        y, new_mean, new_var = _BatchNormAct.apply(*args)
    else:
        y, _, _, new_mean, new_var = _forward(*args)
    if new_mean is not None and new_mean.numel():
        # the op itself mutates nothing; one multi-tensor copy publishes the new statistics
        torch._foreach_copy_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            args[4:6], [new_mean, new_var]
        )
    return y


def _traffic(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> Traffic:
    act: str = rest[-1]
    maps = x.numel() * x.element_size()
    has_residual = residual is not None
    # with a residual: read dy, x, y, write dz; read dz, x, write dx
    backward = 7 if has_residual and act != "none" else 5
    return Traffic((3 + has_residual) * maps, backward * maps)


op = Op("batch_norm_act", _check, _eager, _triton, refuses, _traffic)
