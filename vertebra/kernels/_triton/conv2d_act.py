"""Convolution and what is behind it: by a kernel of ours, or by one behind PyTorch's."""

from torch import Tensor

from . import _affine
from ._conv_kernels import configurations, forward, refuses

__all__ = ["configurations", "epilogue", "forward", "refuses"]


def epilogue(
    y: Tensor,
    z: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
) -> None:
    """Write y = act(z * scale + bias + residual); y may be z."""
    if y is z and scale is None and bias is None and residual is None and act == "none":
        return
    _affine.apply(z, residual, y, (None, None, scale, bias), act)
