"""The rules every op asks of its arguments, checked before anything is computed or launched.

Each message states the rule, what came, and the likely fix.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_image(op: str, x: Tensor) -> None:
    """Require `x` to be a floating-point (N, C, H, W) tensor."""
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{op}: x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(
            f"{op}: x must have shape (N, C, H, W), got {tuple(x.shape)}; "
            "add the missing dimension with unsqueeze or reshape"
        )
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}; convert it with .float()")


def check_eps(op: str, eps: float) -> None:
    """Require `eps` to be positive."""
    if eps <= 0:
        raise ValueError(f"{op}: eps must be positive, got {eps}")


def check_vectors(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """Require vectors of shape (C,), on x's device, all of one dtype: x's or float32."""
    channels = x.shape[1:2]
    for name, v in vectors.items():
        if v is not None and v.shape != channels:
            raise ValueError(
                f"{op}: {name} must have shape ({x.shape[1]},), one value per channel of x "
                f"{tuple(x.shape)}; got {tuple(v.shape)}"
            )
    check_parameters(op, x, **vectors)


def check_parameters(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """Require tensors on x's device, all of one dtype: x's or float32."""
    device, dtype = x.device, x.dtype
    first: tuple[str, torch.dtype] | None = None
    for name, v in parameters.items():
        if v is None:
            continue
        if v.device != device:
            raise ValueError(
                f"{op}: {name} is on {v.device} and x on {device}; move one with .to()"
            )
        own = v.dtype
        if first is not None and own == first[1]:
            continue
        narrower = dtype in (torch.float16, torch.bfloat16)
        if own != dtype and not (narrower and own == torch.float32):
            raise TypeError(
                f"{op}: {name} must have x's dtype ({dtype})"
                + (" or float32" if narrower else "")
                + f", got {own}; convert the module or the input with .to(dtype)"
            )
        if first is not None:
            raise TypeError(
                f"{op}: parameters must share one dtype; {first[0]} is {first[1]} "
                f"and {name} is {own}"
            )
        first = (name, own)


def check_residual(
    op: str, x: Tensor, residual: Tensor | None, shape: tuple[int, ...] | None = None
) -> None:
    """Require `residual` to look like `x`, or have y's `shape`: no broadcasting, no promotion."""
    if residual is None:
        return
    wanted = x.shape if shape is None else shape
    if residual.shape != wanted:
        raise ValueError(
            f"{op}: residual must have {'x' if shape is None else 'y'}'s shape {tuple(wanted)}, "
            f"got {tuple(residual.shape)}; project it (the block's downsample) or expand it first"
        )
    if residual.device != x.device:
        raise ValueError(
            f"{op}: residual is on {residual.device} and x on {x.device}; move one with .to()"
        )
    if residual.dtype != x.dtype:
        raise TypeError(
            f"{op}: residual must have x's dtype {x.dtype}, got {residual.dtype}; "
            "convert it with .to()"
        )


def promote_under_autocast(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Under autocast, bring x and residual to their common dtype, as the add they replace would."""
    if (
        isinstance(residual, Tensor)
        and isinstance(x, Tensor)
        and residual.dtype != x.dtype
        and torch.is_autocast_enabled(x.device.type)
    ):
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return x.to(dtype), residual.to(dtype)
    return x, residual
