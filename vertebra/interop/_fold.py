"""What a convolution or linear layer takes over, folded into its weight and bias in fp64.

    norm    weight * s, (bias - mean) * s + shift     s = scale / sqrt(var + eps)
    gamma   weight * gamma, bias * gamma
    image   conv((x - mean) / std): weight / std, bias - sum(weight / std * mean)

The last is exact as it stands where no padding is: a pixel of padding is 0 after the normalisation,
not before. With padding the mean is subtracted from the image first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.fused import FusedConv2d, FusedImageConv2d


def scale_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Return in fp64 what a norm multiplies a channel by, and what it then adds."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def fold(layer: Any, scale: Tensor, shift: Tensor | None = None) -> None:
    """Make `layer` return its output times `scale`, plus `shift`, by filter."""
    weight = layer.weight
    by_filter = scale.reshape(-1, *[1] * (weight.dim() - 1))
    bias = shift
    if layer.bias is not None:
        scaled = layer.bias.double() * scale
        bias = scaled if shift is None else scaled + shift
    _set(layer, weight.double() * by_filter, bias)


def fold_image(conv: FusedConv2d, mean: Sequence[float], std: Sequence[float]) -> None:
    """Make `conv` normalise the image that it reads."""
    like = conv.weight
    offset = torch.tensor(mean, dtype=torch.float64, device=like.device)
    scale = torch.tensor(std, dtype=torch.float64, device=like.device)
    weight = like.double() / scale[:, None, None]
    bias = None if conv.bias is None else conv.bias.double()
    if conv.padding not in ("valid", (0, 0)):
        conv.__class__ = FusedImageConv2d
        conv.register_buffer("mean", offset[:, None, None].to(like.dtype))
    else:
        shift = -(weight * offset[:, None, None]).sum((1, 2, 3))
        bias = shift if bias is None else bias + shift
    _set(conv, weight, bias)


def _set(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Round once, to the dtype of the layer."""
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
