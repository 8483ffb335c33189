"""Convolution with TensorFlow's padding."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, ...]


def pad_same(x: Tensor, kernel_size: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """Return x with SAME's zeros around it: those that let a convolution give ceil(size / stride).

    One more on the right and at the bottom, where the number is odd.
    """
    pads: list[int] = []
    for size, k, s, d in zip(x.shape[-2:], kernel_size, stride, dilation, strict=True):
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads)


class Conv2dSame(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, by image size: ceil(size / stride) out."""

    def forward(self, x: Tensor) -> Tensor:
        x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)
