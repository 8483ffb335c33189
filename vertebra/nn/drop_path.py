"""Stochastic depth and layer scale, each by itself and both with the residual add they precede."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..kernels import drop_path_add

# for torch.fx these are leaves: they look at shapes, which a proxy does not have
torch.fx.wrap("drop_path_add")
torch.fx.wrap("_drop_path")
torch.fx.wrap("_scale_last")


def _drop_path(x: Tensor, drop_prob: float, scale_by_keep: bool) -> Tensor:
    """Drop samples of an x of any rank: the op only asks where a sample begins."""
    if x.dim() == 4:
        return drop_path_add(x, drop_prob=drop_prob, scale_by_keep=scale_by_keep)
    image = x.reshape(*x.shape[:3], *(1,) * (4 - x.dim())) if x.dim() < 4 else x.flatten(3)
    return drop_path_add(image, drop_prob=drop_prob, scale_by_keep=scale_by_keep).reshape(x.shape)


def _scale_last(x: Tensor, gamma: Tensor) -> Tensor:
    """Return x * gamma for an x of any rank whose last dimension is the channels."""
    image = x if x.dim() == 4 else x.reshape(x.shape[0], 1, -1, x.shape[-1])
    return drop_path_add(image.movedim(3, 1), gamma=gamma).movedim(1, 3).reshape(x.shape)


class DropPath(nn.Module):
    """Stochastic depth per sample: while training, x of a sample becomes zero with `drop_prob`.

    Signature and attributes of timm's module of this name; takes x of any rank whose first
    dimension is the batch. In eval mode, and with `drop_prob` 0, it returns x itself.

    Args:
        drop_prob: probability that a sample is dropped.
        scale_by_keep: divide what is kept by 1 - drop_prob, which preserves the mean.

    >>> DropPath(1.0)(torch.ones(2, 3, 4, 4)).sum()
    tensor(0.)
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        return _drop_path(x, self.drop_prob, self.scale_by_keep)

    def extra_repr(self) -> str:
        return f"drop_prob={round(self.drop_prob, 3):0.3f}"


class LayerScale(nn.Module):
    """`x * gamma`, one learned factor per channel, for channels in the last dimension.

    Signature, attributes and `state_dict` key of timm's module of this name. Unlike there, y has
    x's dtype if gamma is fp32 beside fp16 or bf16.

    Args:
        dim: number of channels.
        init_values: what every factor starts from.
        inplace: write the result to x.
        device: of gamma.
        dtype: of gamma.
    """

    def __init__(
        self,
        dim: int,
        init_values: float = 1e-5,
        inplace: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init_values = init_values
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to `init_values`."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.gamma) if self.inplace else _scale_last(x, self.gamma)


class LayerScale2d(LayerScale):
    """`LayerScale` for (N, C, H, W) maps, as timm's module of this name."""

    def forward(self, x: Tensor) -> Tensor:
        if self.inplace:
            return x.mul_(self.gamma[:, None, None])
        return drop_path_add(x, gamma=self.gamma)


class DropPathAdd(DropPath):
    """`residual + drop_path(gamma * x)`: how a residual block ends, in one pass over memory.

    A `DropPath`, so that what looks for those to change their `drop_prob` finds it; its gamma, if
    it has one, is that of `LayerScale2d`. `forward` also takes the gamma of a block that holds it
    itself, as ConvNeXt's do. Runs as `vertebra.kernels.drop_path_add`.

    Args:
        dim: number of channels; not needed without gamma.
        init_values: what every factor of gamma starts from; None for no gamma.
        drop_prob: probability that a sample's x is dropped while training.
        scale_by_keep: divide what is kept by 1 - drop_prob, which preserves the mean.
        device: of gamma.
        dtype: of gamma.

    >>> x, residual = torch.randn(2, 2, 8, 4, 4)
    >>> end = DropPathAdd(8, init_values=1e-6, drop_prob=0.1)
    >>> end(x, residual).shape
    torch.Size([2, 8, 4, 4])
    """

    gamma: Tensor | None

    def __init__(
        self,
        dim: int | None = None,
        init_values: float | None = None,
        drop_prob: float = 0.0,
        scale_by_keep: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(drop_prob, scale_by_keep)
        self.init_values = init_values
        if init_values is None:
            self.register_parameter("gamma", None)
        elif dim is None:
            raise ValueError("DropPathAdd: init_values needs dim, the number of channels")
        else:
            self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor of gamma to `init_values`."""
        if self.gamma is not None and self.init_values is not None:
            nn.init.constant_(self.gamma, self.init_values)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        return drop_path_add(
            *(x, residual, self.gamma if gamma is None else gamma),
            drop_prob=self.drop_prob if self.training else 0.0,
            scale_by_keep=self.scale_by_keep,
        )

    def extra_repr(self) -> str:
        scale = "" if self.gamma is None else f"{len(self.gamma)}, init_values={self.init_values}, "
        return scale + super().extra_repr()
