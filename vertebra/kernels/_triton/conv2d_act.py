"""Convolution and its epilogue: the launches."""

from torch import Tensor

from . import _affine


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
