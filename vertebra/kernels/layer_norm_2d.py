"""Layer normalisation over the channels of each pixel: ConvNeXt's channels-first LayerNorm.

    y = (x - mean) * rstd * weight + bias
    mean = E[x]        rstd = 1 / sqrt(E[(x - mean)^2] + eps)        over C, for each n, h, w

    dbias = sum(dy)        dweight = sum(dy * xhat)                  over N, H, W
    dx = rstd * (weight * dy - E[weight * dy] - xhat * E[weight * dy * xhat])        E over C

Shapes   x, y (N, C, H, W); weight, bias (C,) or None; any C
Dtypes   x fp16 | bf16 | fp32 | fp64, y as x, also under autocast; weight and bias as x or fp32;
         statistics by deviations from the mean, they and all sums in fp32 (fp64 for fp64), one
         rounding, to y
Layout   any strides; y keeps x's memory format
Bytes    forward: x and y once. backward: dy, x and dx once. Where the channels of a pixel do not
         fit in registers, the inputs are read again while they are still in cache. And 8 bytes a
         pixel for the statistics, if a gradient is wanted
Saves    x, mean, rstd and weight
Raises   ValueError, TypeError: rank, channel count, device or dtype of an argument; eps
Source   Ba, Kiros & Hinton 2016 (arXiv:1607.06450), over channels as in Liu et al. 2022
         (arXiv:2201.03545). Like aten up to rounding; aten's answer is fp32 under autocast
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_eps, check_image, check_vectors
from ._op import Op, Traffic, define, refuses, sums_dtype, wants_grad


def layer_norm_2d(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Return `layer_norm(x)` over the channels of each pixel; the module docstring is the contract.

    >>> x = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> layer_norm_2d(x, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0]), eps=1e-12).flatten()
    tensor([-1.,  7.])
    """
    check_eps("layer_norm_2d", eps)
    return op(x, weight, bias, eps)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_image("layer_norm_2d", x)
    check_vectors("layer_norm_2d", x, weight=weight, bias=bias)


def _eager(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    rows = x.permute(0, 2, 3, 1)
    mixed = any(v is not None and v.dtype != x.dtype for v in (weight, bias))
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if x.dtype != torch.float64 and (mixed or autocast):
        rows = rows.float()
        weight, bias = (None if v is None else v.float() for v in (weight, bias))
    y = F.layer_norm(rows, (x.shape[1],), weight, bias, eps).to(x.dtype).permute(0, 3, 1, 2)
    return y if x.stride(1) == 1 else y.contiguous()  # rows are dense: that is channels_last


def _outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, saves: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, _, H, W = x.shape
    shape = (N, 1, H, W) if saves else (0,)
    dtype = sums_dtype(x)
    mean, rstd = (x.new_empty(shape, dtype=dtype) for _ in range(2))
    return torch.empty_like(x), mean, rstd


@define(
    "layer_norm_2d(Tensor x, Tensor? weight, Tensor? bias, float eps, bool saves) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    _outputs,
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ._triton import layer_norm_2d as kernels

    outputs = _outputs(*args)
    kernels.forward(outputs, *args)
    return outputs


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, needs_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (mean.new_empty(x.shape[1] if needs_sums else 0) for _ in range(2))
    return torch.empty_like(x), dweight, dbias


@define(
    "layer_norm_2d_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
    "bool needs_sums) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _gradients,
)
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ._triton import layer_norm_2d as kernels

    gradients = _gradients(*args)
    kernels.backward(gradients, *args)
    return gradients


class _LayerNorm2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, _ = args
        y, mean, rstd = _forward(*args, True)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias, _ = ctx.needs_input_grad
        dx, dweight, dbias = _backward(dy, x, weight, mean, rstd, needs_dweight or needs_dbias)
        return (
            dx if needs_dx else None,
            dweight.to(weight.dtype) if needs_dweight else None,
            dbias.to(ctx.bias_dtype) if needs_dbias else None,
            None,
        )


def _triton(*args: Any) -> Tensor:
    return _LayerNorm2d.apply(*args) if wants_grad(*args[:3]) else _forward(*args, False)[0]


def _traffic(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Traffic:
    maps = x.numel() * x.element_size()
    statistics = 2 * x.numel() // x.shape[1] * (8 if x.dtype == torch.float64 else 4)
    saved = statistics if wants_grad(x, weight, bias) else 0
    return Traffic(2 * maps + saved, 3 * maps + statistics)


op = Op("layer_norm_2d", _check, _eager, _triton, refuses, _traffic)
