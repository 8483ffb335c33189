"""Normalisation over channels without a mean or a bias: the norms of timm's small ConvNeXts."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.fx
from torch import Tensor, nn

from .layer_norm import check_data_format


def _scaled(
    x: Tensor, weight: Tensor | None, eps: float, channels_last: bool, centred: bool
) -> Tensor:
    """Return x / sqrt(power + eps) * weight; power is the mean square, or the variance."""
    if x.dim() != 4:
        order = "(N, H, W, C)" if channels_last else "(N, C, H, W)"
        raise ValueError(
            f"x must have shape {order}, got {tuple(x.shape)}; add the missing dimension with "
            "unsqueeze or reshape"
        )
    dim = 3 if channels_last else 1
    wide = x if x.dtype == torch.float64 else x.float()
    power = wide.var(dim, keepdim=True) if centred else wide.square().mean(dim, keepdim=True)
    y = wide * torch.rsqrt(power + eps)
    if weight is not None:
        y = y * (weight if channels_last else weight[:, None, None])
    return y.to(x.dtype)


torch.fx.wrap("_scaled")  # a leaf: it looks at shapes, which a proxy does not have


class RmsNorm2d(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` over the channels of each pixel of (N, C, H, W).

    Signature and `state_dict` key of timm's module of this name; with `data_format` also what its
    `RmsNorm` does for (N, H, W, C). Plain PyTorch in fp32; the output has the dtype of the input.

    Args:
        num_channels: C of the input.
        eps: added to the mean square.
        affine: learn weight.
        data_format: `"channels_first"` for (N, C, H, W), `"channels_last"` for (N, H, W, C). This
            is the order of the dimensions; either may have either memory format.
        device: of weight.
        dtype: of weight.

    >>> RmsNorm2d(2)(torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)).flatten() * 12.5**0.5
    tensor([3.0000, 4.0000], grad_fn=<MulBackward0>)
    """

    _centred = False

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        *,
        data_format: str = "channels_first",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_data_format(data_format)
        super().__init__(num_channels, eps, affine, device=device, dtype=dtype)
        self.data_format = data_format

    def forward(self, x: Tensor) -> Tensor:
        channels_last = self.data_format == "channels_last"
        return _scaled(x, self.weight, cast("float", self.eps), channels_last, self._centred)

    def extra_repr(self) -> str:
        suffix = "" if self.data_format == "channels_first" else f", {self.data_format}"
        return super().extra_repr() + suffix


class SimpleNorm2d(RmsNorm2d):
    """`x / sqrt(var(x) + eps) * weight`: `RmsNorm2d` with the unbiased variance of the channels.

    The mean is taken off for the variance only. Signature and `state_dict` key of timm's module of
    this name; with `data_format` also what its `SimpleNorm` does for (N, H, W, C).
    """

    _centred = True
