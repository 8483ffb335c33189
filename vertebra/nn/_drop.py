"""What may stand between the last norm of a residual branch and the add: dropping, or nothing."""

from __future__ import annotations

from typing import TypeGuard

import torch.fx
from torch import Tensor, nn

from ..kernels import drop_path_add
from ._act import has_hooks
from .drop_block import DropBlock2d
from .drop_path import DropPath, DropPathAdd

torch.fx.wrap("drop_path_add")  # a leaf: it looks at shapes, which a proxy does not have


def is_drop_path(drop: nn.Module) -> TypeGuard[DropPath]:
    """Return whether `drop` computes what `DropPath` does, and nobody watches it."""
    return type(drop).forward is DropPath.forward and not has_hooks(drop)


def is_idle(drop: nn.Module | None) -> bool:
    """Return whether `drop` returns what it is given, and nobody watches it."""
    if drop is None:
        return True
    forward = type(drop).forward
    if forward in (DropPath.forward, DropPathAdd.forward, DropBlock2d.forward):
        if getattr(drop, "gamma", None) is not None:
            return False
        return not (drop.training and drop.drop_prob) and not has_hooks(drop)
    return forward is nn.Identity.forward and not has_hooks(drop)


def drop_add(
    drop: nn.Module | None, x: Tensor, residual: Tensor | None, gamma: Tensor | None = None
) -> Tensor:
    """Return `drop(gamma * x) + residual`, of x's shape: one op where `drop` is a `DropPath`."""
    if drop is not None and not is_idle(drop):
        if residual is not None and is_drop_path(drop):
            return drop_path_add(
                *(x, residual, gamma), drop_prob=drop.drop_prob, scale_by_keep=drop.scale_by_keep
            )
        x = drop(x if gamma is None else drop_path_add(x, gamma=gamma))
    elif gamma is not None:
        return drop_path_add(x, residual, gamma)
    return x if residual is None else x + residual.expand_as(x)
