"""Activations: from timm's `act_layer` to a module, and from a module to the name ops fuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

ActLayer = str | type[nn.Module] | Callable[..., nn.Module] | None

_BY_NAME: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "hard_swish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
}

_FUSIBLE: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
}


def create_act(
    act_layer: ActLayer, *, inplace: bool = True, act_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """Build an activation from a name, a module class, a factory, or None (identity)."""
    if act_layer is None:
        return nn.Identity()
    if isinstance(act_layer, str):
        if act_layer.lower() not in _BY_NAME:
            raise ValueError(
                f"act_layer must be one of {', '.join(_BY_NAME)}, a module class or None; "
                f"got {act_layer!r}"
            )
        act_layer = _BY_NAME[act_layer.lower()]
    kwargs = {"inplace": inplace, **(act_kwargs or {})}
    try:
        return act_layer(**kwargs)
    except TypeError:  # most activations have no in-place form
        kwargs.pop("inplace")
        return act_layer(**kwargs)


def has_hooks(module: nn.Module) -> bool:
    """Return whether `module` must stay a call of its own, or its hooks would not fire."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def fusible_act(act: nn.Module) -> str | None:
    """Return the name under which an op can run `act` itself, or None."""
    if has_hooks(act):
        return None
    if isinstance(act, nn.GELU) and act.approximate != "none":
        return None
    return _FUSIBLE.get(type(act))
