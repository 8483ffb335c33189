"""Per-channel scale and shift, residual add and activation: the launches.

Both directions are one map-sized pass of `_affine`, one program per tile. The backward pass adds up
dscale and dbias on its way when they are wanted; its programs then own splits, and a second, tiny
kernel adds those up.
"""

from torch import Tensor

from . import _affine


def forward(
    y: Tensor,
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    act: str,
) -> None:
    """Write y."""
    affine = (mean, var, scale, bias)
    _affine.apply(x, residual, y, affine, act, eps=eps, spread_is_var=var is not None)


def backward(
    gradients: tuple[Tensor, Tensor, Tensor, Tensor],
    dy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    act: str,
    needs_sums: bool,
    needs_dresidual: bool,
) -> None:
    """Write (dx, dresidual, dscale, dbias)."""
    dx, dresidual, dscale, dbias = gradients
    _affine.backward(
        *(dy, x, y, residual, (mean, var, scale, bias), act),
        dz=dresidual if needs_dresidual else None,
        dx=dx,
        sums=(dscale, dbias) if needs_sums else None,
        eps=eps,
        spread_is_var=var is not None,
    )
