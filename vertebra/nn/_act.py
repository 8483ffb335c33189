"""Activations: from timm's `act_layer` to a module, and from a module to the name ops fuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

ActLayer = str | type[nn.Module] | Callable[..., nn.Module] | None

_BY_NAME: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "hard_swish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "hard_sigmoid": nn.Hardsigmoid,
    "hardsigmoid": nn.Hardsigmoid,
}

# by what they compute, which a class may take from torch's
_FUSIBLE: dict[Callable[..., Any], str] = {
    nn.Identity.forward: "none",
    nn.ReLU.forward: "relu",
    nn.SiLU.forward: "silu",
    nn.GELU.forward: "gelu",
    nn.Hardswish.forward: "hardswish",
    nn.Sigmoid.forward: "sigmoid",
}

_GATES: dict[Callable[..., Any], str] = {
    nn.Sigmoid.forward: "sigmoid",
    nn.Hardsigmoid.forward: "hard_sigmoid",
}


def by_name(option: str, name: str, layers: Mapping[str, T]) -> T:
    """Return the layer that is called `name`, in whatever case and with or without underscores."""
    for key in (name.lower(), name.lower().replace("_", "").replace("-", "")):
        if key in layers:
            return layers[key]
    raise ValueError(
        f"{option} must be one of {', '.join(layers)}, a module class or None; got {name!r}"
    )


def create_act(
    act_layer: ActLayer, *, inplace: bool = True, act_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """Build an activation from a name, a module class, a factory, or None (identity)."""
    if act_layer is None:
        return nn.Identity()
    if isinstance(act_layer, str):
        act_layer = by_name("act_layer", act_layer, _BY_NAME)
    kwargs = {"inplace": inplace, **(act_kwargs or {})}
    try:
        return act_layer(**kwargs)
    except TypeError:  # most activations have no in-place form
        kwargs.pop("inplace")
        return act_layer(**kwargs)


def has_hooks(module: nn.Module) -> bool:
    """Return whether `module` has hooks: it stays a call of its own, or they would not fire.

    So does one whose `forward` is replaced on the instance, which is how accelerate of Hugging Face
    hooks a module whose weights it moves.
    """
    m: Any = module
    return bool(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in vars(m)
    )


def fusible_act(act: nn.Module) -> str | None:
    """Return the name under which an op can run `act` itself, or None."""
    if has_hooks(act) or getattr(act, "approximate", "none") != "none":
        return None
    return _FUSIBLE.get(type(act).forward)


def fusible_gate(gate: nn.Module) -> str | None:
    """Return the name under which an op can run `gate` itself, or None."""
    return None if has_hooks(gate) else _GATES.get(type(gate).forward)
