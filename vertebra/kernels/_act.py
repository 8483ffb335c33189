"""The activations and gates that ops can fuse, by the name the op schemas carry.

`vertebra/kernels/_triton/_act.py` holds their kernels and derivatives under the same names. GELU is
the exact (erf) one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _identity(z: Tensor) -> Tensor:
    return z


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _identity,
    "relu": torch.relu_,  # in place: what ops hand over is their own, and relu saves its output
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,  # relu6(z + 3) / 6
}


def check_act(op: str, act: str, name: str = "act") -> None:
    """Require `act`, the argument `name`, to be the name of a fusible activation."""
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: {name} must be one of {', '.join(ACTIVATIONS)}; got {act!r}")


def check_gate(op: str, gate: str) -> None:
    """Require `gate` to be the name of a fusible gate."""
    if gate not in GATES:
        raise ValueError(f"{op}: gate must be one of {', '.join(GATES)}; got {gate!r}")


def finish(y: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """Return act(y + residual) for a `y` that nobody else holds: the fused ops' eager tail."""
    return ACTIVATIONS[act](y if residual is None else y.add_(residual))


def needs_input(act: str) -> bool:
    """Return whether the derivative of `act` needs z; relu's can be read off its output."""
    return act not in ("none", "relu")
