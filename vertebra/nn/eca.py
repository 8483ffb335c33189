"""Efficient channel attention: a gate per channel that sees the means of its neighbours."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..kernels import global_avg_pool
from ._act import ActLayer, create_act

torch.fx.wrap("global_avg_pool")  # a leaf: it looks at shapes, which a proxy does not have


class EcaModule(nn.Module):
    """`x * gate(conv(mean(x)))`, the convolution along the channels.

    Arguments and `state_dict` key of timm's module of this name, without its `use_mlp` and what
    belongs to that. The kernel is the odd number next to `(log2(channels) + beta) / gamma`, at
    least 3. The means come from `vertebra.kernels.global_avg_pool`.

    Wang et al. 2019 (arXiv:1910.03151).

    Args:
        channels: C of the (N, C, H, W) input; None takes `kernel_size` as it is.
        kernel_size: of the convolution, odd; where there are `channels`, they determine it.
        gamma: in the formula above.
        beta: in the formula above.
        gate_layer: class or name.
        device: of the weight.
        dtype: of the weight.

    >>> EcaModule(256).conv
    Conv1d(1, 1, kernel_size=(5,), stride=(1,), padding=(2,), bias=False)
    """

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int = 3,
        gamma: float = 2,
        beta: float = 1,
        gate_layer: ActLayer = "sigmoid",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels is not None:
            width = int(abs(math.log2(channels) + beta) / gamma)
            kernel_size = max(width + 1 - width % 2, 3)
        if kernel_size % 2 == 0:
            raise ValueError(f"EcaModule: kernel_size must be odd; got {kernel_size}")
        self.conv = nn.Conv1d(
            *(1, 1, kernel_size), padding=kernel_size // 2, bias=False, device=device, dtype=dtype
        )
        self.gate = create_act(gate_layer, inplace=False)

    def forward(self, x: Tensor) -> Tensor:
        s = self.conv(global_avg_pool(x)[:, None])
        return x * self.gate(s)[:, 0, :, None, None]
