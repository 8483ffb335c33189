"""The stem of a ResNet: batch normalisation, activation and a 3x3 max-pool of stride 2.

    z = (x - mean) * rstd * weight + bias        y[i, j] = max of act(z) over the window of (i, j)

The window is rows 2i - 1 to 2i + 1 and columns 2j - 1 to 2j + 1, cut at the border. In training
mean and rstd are those of the batch, and, where given, the running statistics are advanced as in
`batch_norm_act`; else they come from the running statistics, which are constants, or are 0 and 1
(`bias_act_pool`) behind a convolution that has taken over the norm. Of equal values the first of
the window wins, of several NaN the last: `nn.MaxPool2d`'s rule, in scan order.

    at = where in its window a maximum is (0 to 8)        peak = x there
    dz[p] = act'(z[p]) * sum of dy over the windows whose maximum is at p
    dbias = sum(dz)        dweight = sum(dz * xhat)
    dx = weight * rstd * (dz - (dbias + xhat * dweight) / (N*H*W)), in eval weight * rstd * dz

Shapes   x (N, C, H, W); y (N, C, (H + 1) // 2, (W + 1) // 2); vectors (C,) or None
Dtypes   x fp16 | bf16 | fp32 | fp64, y as x; vectors as x or fp32; statistics and sums in fp32
         (fp64 for fp64); one rounding, to y, after the maximum is taken
Layout   any strides; y has x's memory format
Bytes    in maps of x, y being a quarter of one. forward: x twice (eval: once), y once; if x wants a
         gradient, at (one byte per value of y) once; if the vectors do, or in training, peak (like
         y) once. backward: dy and peak for the sums; dy, at and x for dx, dx once
Saves    x, at, peak, mean, rstd and the vectors: never the normalised map, nor a 64-bit index
Raises   ValueError, TypeError: rank, channel count, device or dtype of an argument; unknown act; an
         image without pixels; in training one value per channel, in eval no running statistics
Source   He et al. 2015 (arXiv:1512.03385), section 3.4. Like aten up to rounding: aten rounds
         before it compares, so among values that its rounding makes equal it takes the first
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._act import check_act, finish
from ._check import check_eps, check_image, check_vectors
from ._op import Op, Traffic, define, refuses, sums_dtype, wants_grad


def batch_norm_act_pool(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "relu",
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return `max_pool2d(act(batch_norm(x)), 3, 2, 1)`; the module docstring is the contract.

    In training the running statistics, where given, are updated in place, as by
    `torch.nn.functional.batch_norm`; in eval mode they are what normalises.

    >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
    >>> stats = {"running_mean": torch.tensor([8.0]), "running_var": torch.tensor([1.0])}
    >>> batch_norm_act_pool(x, training=False, eps=1e-12, **stats).flatten()
    tensor([0., 0., 5., 7.])
    """
    check_eps("batch_norm_act_pool", eps)
    if not training and running_mean is None and running_var is None:
        raise ValueError(
            "batch_norm_act_pool: with training=False the running statistics normalise; "
            "give running_mean and running_var, or training=True"
        )
    return op(x, weight, bias, running_mean, running_var, training, momentum, eps, act)


def bias_act_pool(x: Tensor, bias: Tensor | None = None, act: str = "relu") -> Tensor:
    """Return `max_pool2d(act(x + bias), 3, 2, 1)`: the stem of a network that `fuse` has made.

    >>> bias_act_pool(torch.arange(4.0).reshape(1, 1, 2, 2), torch.tensor([-1.0])).flatten()
    tensor([2.])
    """
    return op(x, None, bias, None, None, False, 0.0, 1e-5, act)


def _check(
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
    name = "batch_norm_act_pool"
    check_image(name, x)
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name}: x must have at least one pixel, got shape {tuple(x.shape)}")
    vectors = {"weight": weight, "bias": bias}
    check_vectors(name, x, **vectors, running_mean=running_mean, running_var=running_var)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{name}: give both running_mean and running_var, or neither")
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"{name}: training needs more than one value per channel, got x of shape "
            f"{tuple(x.shape)}; use a larger batch or image, or eval mode"
        )
    check_act(name, act)


def _eager(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
) -> Tensor:
    if training or running_mean is not None:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    else:
        y = x.clone() if bias is None else (x + bias[:, None, None]).to(x.dtype)
    return F.max_pool2d(finish(y, None, act), 3, 2, 1)


def _outputs(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
    needs_at: bool,
    needs_peak: bool,
) -> tuple[Tensor, ...]:
    N, C, H, W = x.shape
    like = torch.empty_like(x, device="meta")  # dense, where x need not be
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    dense = channels_last and not like.is_contiguous()
    pooled = (N, C, (H + 1) // 2, (W + 1) // 2)

    def new(dtype: torch.dtype) -> Tensor:
        layout = torch.channels_last if dense else torch.contiguous_format
        return torch.empty(pooled, dtype=dtype, device=x.device, memory_format=layout)

    def absent() -> Tensor:
        return x.new_empty(0)

    mean, rstd = (x.new_empty(C if training else 0, dtype=sums_dtype(x)) for _ in range(2))
    new_mean, new_var = absent(), absent()
    if training and running_mean is not None and running_var is not None:
        new_mean, new_var = torch.empty_like(running_mean), torch.empty_like(running_var)
    return (
        new(x.dtype),
        new(torch.uint8) if needs_at else absent(),
        new(x.dtype) if needs_peak else absent(),
        *(mean, rstd, new_mean, new_var),
    )


@define(
    "batch_norm_act_pool(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, bool training, float momentum, float eps, str act, bool needs_at, "
    "bool needs_peak) -> (Tensor y, Tensor at, Tensor peak, Tensor mean, Tensor rstd, "
    "Tensor new_mean, Tensor new_var)",
    _outputs,
)
def _forward(*args: Any) -> tuple[Tensor, ...]:
    from ._triton import batch_norm_act_pool as kernels

    outputs = _outputs(*args)
    kernels.forward(outputs, *args[:-2])
    return outputs


@_forward.in_place
def _forward_in_place(*args: Any) -> tuple[Tensor, ...]:
    """Advance the running statistics where they are: there is nothing left to publish."""
    from ._triton import batch_norm_act_pool as kernels

    call = args[:9]
    x, weight, bias, running_mean, running_var, *rest = args
    *outputs, no_mean, no_var = _outputs(x, weight, bias, None, None, *rest)
    kernels.forward((*outputs, running_mean, running_var), *call)
    return *outputs, no_mean, no_var


def _gradients(
    dy: Tensor,
    x: Tensor | None,
    at: Tensor | None,
    peak: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty(0) if x is None else torch.empty_like(x)
    sums = 0 if peak is None else dy.shape[1]
    dweight, dbias = (dy.new_empty(sums, dtype=sums_dtype(dy)) for _ in range(2))
    return dx, dweight, dbias


@define(
    "batch_norm_act_pool_backward(Tensor dy, Tensor? x, Tensor? at, Tensor? peak, Tensor? weight, "
    "Tensor? bias, Tensor? mean, Tensor? spread, bool training, float eps, str act) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _gradients,
)
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ._triton import batch_norm_act_pool as kernels

    gradients = _gradients(*args)
    kernels.backward(gradients, *args)
    return gradients


class _BatchNormActPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, weight, bias, running_mean, running_var, training, _, eps, act = args
        needs_at, needs_peak = _needs(training, *ctx.needs_input_grad[:3])
        y, at, peak, mean, rstd, new_mean, new_var = _forward(*args, needs_at, needs_peak)
        ctx.save_for_backward(
            x if needs_at else None,
            at if needs_at else None,
            peak if needs_peak else None,
            *(weight, bias),
            mean if training else running_mean,
            rstd if training else running_var,
        )
        ctx.training, ctx.eps, ctx.act = training, eps, act
        if not new_mean.numel():
            return y, None, None
        ctx.mark_non_differentiable(new_mean, new_var)
        return y, new_mean, new_var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, at, peak, weight, bias, mean, spread = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        dx, dweight, dbias = _backward(
            *(dy, x, at, peak, weight, bias, mean, spread, ctx.training, ctx.eps, ctx.act)
        )
        return (
            dx if needs_dx else None,
            dweight.to(weight.dtype) if needs_dweight else None,
            dbias.to(bias.dtype) if needs_dbias else None,
            *(None, None, None, None, None, None),
        )


def _needs(
    training: bool, needs_dx: bool, needs_dweight: bool, needs_dbias: bool
) -> tuple[bool, bool]:
    """Return whether the backward pass reads `at` (and x), and `peak`.

    dx goes where the maxima are. The sums come from the maxima alone, a quarter of the map; in
    training dx is made of them too.
    """
    return needs_dx, needs_dweight or needs_dbias or (training and needs_dx)


def _triton(*args: Any) -> Tensor:
    if wants_grad(*args[:3]):
        y, new_mean, new_var = _BatchNormActPool.apply(*args)
    else:
        y, _, _, _, _, new_mean, new_var = _forward(*args, False, False)
    if new_mean is not None and new_mean.numel():
        # the op itself mutates nothing; one multi-tensor copy publishes the new statistics
        torch._foreach_copy_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            args[3:5], [new_mean, new_var]
        )
    return y


def _traffic(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Traffic:
    training, act = rest[2], rest[-1]
    N, C, H, W = x.shape
    at = N * C * ((H + 1) // 2) * ((W + 1) // 2)  # bytes, one each
    pooled, whole = at * x.element_size(), x.numel() * x.element_size()
    needs_at, needs_peak = _needs(training, wants_grad(x), wants_grad(weight), wants_grad(bias))
    forward = (1 + training) * whole + pooled + needs_at * at + needs_peak * pooled
    backward = needs_peak * 2 * pooled
    if needs_at:  # x is in dx in training, and in act'(z)
        backward += pooled + at + whole * (2 if training or act != "none" else 1)
    return Traffic(forward, backward)


op = Op("batch_norm_act_pool", _check, _eager, _triton, refuses, _traffic)
