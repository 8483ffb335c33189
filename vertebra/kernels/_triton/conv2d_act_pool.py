"""Convolution image by image, by the kernels of a convolution: see `_conv_kernels`."""

from ._conv_kernels import configurations, forward, refuses

__all__ = ["configurations", "forward", "refuses"]
