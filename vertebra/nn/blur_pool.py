"""Anti-aliased strides: a blur that a subsampling does not fold into other frequencies."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._act import by_name

AaLayer = str | Callable[..., nn.Module] | None


class BlurPool2d(nn.Module):
    """Every channel blurred by a binomial filter, then subsampled.

    Signature and attributes of timm's module of this name; like there, the filter is no part of the
    `state_dict`. Loading one computes the filter anew, for a model that `to_empty` gave memory.

    Zhang 2019 (arXiv:1904.11486).

    Args:
        channels: C of the (N, C, H, W) input; None for any.
        filt_size: side of the filter, at least 2: 3 is [1, 2, 1] / 4 in either direction.
        stride: of the subsampling.
        pad_mode: what `torch.nn.functional.pad` continues the map with.
        device: of the filter.
        dtype: of the filter.

    >>> BlurPool2d(8)(torch.ones(1, 8, 5, 5)).shape
    torch.Size([1, 8, 3, 3])
    """

    filt: Tensor

    def __init__(
        self,
        channels: int | None = None,
        filt_size: int = 3,
        stride: int = 2,
        pad_mode: str = "reflect",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if filt_size < 2:
            raise ValueError(f"BlurPool2d: filt_size must be at least 2; got {filt_size}")
        self.channels = channels
        self.filt_size = filt_size
        self.stride = stride
        self.pad_mode = pad_mode
        self.padding = [(stride - 1 + filt_size - 1) // 2] * 4
        shape = (channels or 1, 1, filt_size, filt_size)
        self.register_buffer("filt", torch.empty(shape, device=device, dtype=dtype), False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Compute the filter."""
        side = self.filt_size
        row = torch.tensor(
            [comb(side - 1, i) / 2 ** (side - 1) for i in range(side)], device=self.filt.device
        )
        self.filt.copy_(row[:, None] * row)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.reset_parameters()
        super()._load_from_state_dict(*args)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1] if self.channels is None else self.channels
        weight = self.filt.expand(channels, -1, -1, -1)
        x = F.pad(x, self.padding, mode=self.pad_mode)
        return F.conv2d(x, weight, stride=self.stride, groups=channels)

    def extra_repr(self) -> str:
        return f"{self.channels}, filt_size={self.filt_size}, stride={self.stride}"


def _blur_with_zeros(channels: int, stride: int) -> BlurPool2d:
    return BlurPool2d(channels, stride=stride, pad_mode="constant")


_BY_NAME: dict[str, Callable[..., nn.Module]] = {
    "avg": nn.AvgPool2d,
    "avgpool": nn.AvgPool2d,
    "blur": BlurPool2d,
    "blurpool": BlurPool2d,
    "blurpc": _blur_with_zeros,
}


def create_aa(aa_layer: str | Callable[..., nn.Module], channels: int, stride: int) -> nn.Module:
    """Build what subsamples by `stride` in a convolution's place, from a name, class or factory.

    `nn.AvgPool2d` becomes an average over `stride` x `stride`; anything else is called with
    `channels` and `stride`.
    """
    if isinstance(aa_layer, str):
        aa_layer = by_name("aa_layer", aa_layer, _BY_NAME)
    if isinstance(aa_layer, type) and issubclass(aa_layer, nn.AvgPool2d):
        return aa_layer(stride)
    return aa_layer(channels=channels, stride=stride)


def create_aa_max_pool(aa_layer: AaLayer, channels: int) -> nn.Module:
    """Build the max-pool of a stem, 3x3 and stride 2, whose stride `aa_layer` may take over.

    `nn.AvgPool2d` takes the place of all of it, as in timm.
    """
    if aa_layer is None:
        return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    pool = create_aa(aa_layer, channels, 2)
    if isinstance(pool, nn.AvgPool2d):
        return pool
    return nn.Sequential(nn.MaxPool2d(kernel_size=3, stride=1, padding=1), pool)
