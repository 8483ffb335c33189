"""Channel attention: from timm's `attn_layer` to a module, and the block's end behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch.fx
from torch import Tensor, nn

from ._act import by_name, has_hooks
from ._drop import drop_add, is_idle
from .eca import EcaModule
from .squeeze_excite import SqueezeExcite

AttnLayer = str | Callable[..., nn.Module] | None

_BY_NAME: dict[str, type[nn.Module]] = {"se": SqueezeExcite, "eca": EcaModule}


def create_attn(attn_layer: AttnLayer, channels: int) -> nn.Module | None:
    """Build a module that scales `channels`, from a name, a class, a factory, or None (none)."""
    if isinstance(attn_layer, str):
        attn_layer = by_name("attn_layer", attn_layer, _BY_NAME)
    return None if attn_layer is None else attn_layer(channels)


def attn_act(
    attn: nn.Module, x: Tensor, act: nn.Module, residual: Tensor, drop: nn.Module | None = None
) -> Tensor:
    """Return `act(drop(attn(x)) + residual)`: in one op for `SqueezeExcite` where `drop` is idle.

    A traced graph keeps them apart: feature extractors ask for `attn` by its name.

    Args:
        attn: what `create_attn` built.
        x: output of the residual branch's last norm.
        act: the block's last activation.
        residual: the shortcut.
        drop: stochastic depth; None for none.
    """
    excites = type(attn).forward is SqueezeExcite.forward and not isinstance(x, torch.fx.Proxy)
    if excites and not has_hooks(attn) and is_idle(drop):
        return attn(x, residual, act)
    return act(drop_add(drop, attn(x), residual))
