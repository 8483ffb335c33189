"""Global pooling by name: timm's choices for what a classifier reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .global_avg_pool import GlobalAvgPool2d

POOLS = ("avg", "max", "avgmax", "catavgmax")


class GlobalPool2d(nn.Module):
    """The mean, the maximum, half their sum, or both of each channel of (N, C, H, W).

    Args:
        pool_type: "max", "avgmax" (mean and maximum, averaged) or "catavgmax" (2C channels, the
            means first). Plain averaging is `GlobalAvgPool2d`.
        flatten: return (N, C), and not (N, C, 1, 1).

    >>> GlobalPool2d("catavgmax", flatten=True)(torch.randn(2, 8, 7, 7)).shape
    torch.Size([2, 16])
    """

    def __init__(self, pool_type: str, flatten: bool = False) -> None:
        super().__init__()
        self.pool_type = pool_type
        self.flatten = flatten
        self.avg = None if pool_type == "max" else GlobalAvgPool2d(flatten)

    def forward(self, x: Tensor) -> Tensor:
        largest = x.amax((2, 3), keepdim=not self.flatten)
        if self.avg is None:
            return largest
        mean = self.avg(x)
        if self.pool_type == "avgmax":
            return 0.5 * (mean + largest)
        return torch.cat((mean, largest), 1)

    def extra_repr(self) -> str:
        return f"{self.pool_type!r}, flatten={self.flatten}"


def create_global_pool(pool_type: str, flatten: bool = False) -> nn.Module:
    """Build a pooling from timm's name: one of `POOLS`, the same after "fast", or "" for none."""
    name = pool_type.removeprefix("fast") or ("avg" if pool_type else "")
    if not name:
        return nn.Identity()
    if name not in POOLS:
        raise ValueError(f"global_pool must be '' or one of {', '.join(POOLS)}; got {pool_type!r}")
    return GlobalAvgPool2d(flatten) if name == "avg" else GlobalPool2d(name, flatten)


def pooled_channels(pool_type: str, channels: int) -> int:
    """Return how many channels leave a pooling that `channels` enter."""
    return 2 * channels if pool_type.endswith("catavgmax") else channels
