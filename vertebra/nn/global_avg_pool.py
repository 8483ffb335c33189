"""Global average pooling, with the LayerNorm that follows it in ConvNeXt's head."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from ..kernels import global_avg_pool
from ._act import has_hooks

# for torch.fx this is a leaf: it looks at shapes, which a proxy does not have
torch.fx.wrap("global_avg_pool")


class GlobalAvgPool2d(nn.Module):
    """The mean of each channel of (N, C, H, W): `torch.nn.AdaptiveAvgPool2d(1)` in one op.

    `forward` also takes the norm of a head that normalises what it pools: timm's and torchvision's
    ConvNeXt (pool, LayerNorm2d, flatten) and transformers' (mean, LayerNorm). A LayerNorm over C
    with a weight is fused into the op (`vertebra.kernels.global_avg_pool`), which reads its
    parameters; any other norm, and one with hooks, is called after pooling.

    Args:
        flatten: return (N, C), and not (N, C, 1, 1).

    >>> pool, norm = GlobalAvgPool2d(flatten=True), torch.nn.LayerNorm(8)
    >>> pool(torch.randn(2, 8, 7, 7), norm).shape
    torch.Size([2, 8])
    """

    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        self.flatten = flatten

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        if norm is None:
            y = global_avg_pool(x)
        elif isinstance(norm, nn.LayerNorm) and _is_fusible(norm):
            y = global_avg_pool(x, norm.weight, norm.bias, eps=norm.eps)
        elif type(norm) is nn.LayerNorm:
            y = norm(global_avg_pool(x))
        else:  # a norm of maps
            y = norm(global_avg_pool(x)[:, :, None, None])[:, :, 0, 0]
        return y if self.flatten else y[:, :, None, None]

    def extra_repr(self) -> str:
        return f"flatten={self.flatten}"


def _is_fusible(norm: nn.LayerNorm) -> bool:
    affine = norm.weight is not None  # pyright: ignore[reportUnnecessaryComparison]
    return affine and len(norm.normalized_shape) == 1 and not has_hooks(norm)
