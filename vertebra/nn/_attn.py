"""Channel attention: from timm's `attn_layer` to a module, and the block's end behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch.fx
from torch import Tensor, nn

from ._act import by_name, has_hooks
from ._drop import drop_add, is_idle
from .conv_norm_act import conv_norm_act
from .eca import EcaModule
from .gated import Unit, excited_last
from .squeeze_excite import SqueezeExcite

AttnLayer = str | Callable[..., nn.Module] | None

_BY_NAME: dict[str, type[nn.Module]] = {"se": SqueezeExcite, "eca": EcaModule}


def create_attn(attn_layer: AttnLayer, channels: int) -> nn.Module | None:
    """Build a module that scales `channels`, from a name, a class, a factory, or None (none)."""
    if isinstance(attn_layer, str):
        attn_layer = by_name("attn_layer", attn_layer, _BY_NAME)
    return None if attn_layer is None else attn_layer(channels)


def conv_attn_act(
    conv: nn.Module,
    norm: nn.Module,
    x: Tensor,
    attn: nn.Module,
    act: nn.Module,
    residual: Tensor,
    drop: nn.Module | None = None,
) -> Tensor:
    """Return `act(drop(attn(norm(conv(x)))) + residual)`, the end of a block.

    All from `attn` on is one op for `SqueezeExcite` where `drop` is idle; after `vertebra.fuse` the
    convolution leaves it the means of its map, where kernels of ours run that. A traced graph keeps
    them apart: feature extractors ask for `attn` by its name.

    Args:
        conv: the residual branch's last convolution.
        norm: follows it.
        x: what the convolution reads.
        attn: what `create_attn` built.
        act: the block's last activation.
        residual: the shortcut.
        drop: stochastic depth; None for none.
    """
    excites = type(attn).forward is SqueezeExcite.forward and not isinstance(x, torch.fx.Proxy)
    if not (excites and not has_hooks(attn) and is_idle(drop)):
        return act(drop_add(drop, attn(conv_norm_act(conv, norm, x)), residual))
    y = excited_last(Unit(conv, norm), attn, x, residual, act)
    return attn(conv_norm_act(conv, norm, x), residual, act) if y is None else y
