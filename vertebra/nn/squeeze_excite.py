"""Squeeze and excitation, and the residual add and activation of the block behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..kernels import squeeze_excite
from ..kernels._act import ACTIVATIONS, GATES
from ..kernels._onednn import fc
from ..kernels.conv2d_act import runs_on_onednn
from ..kernels.global_avg_pool import means
from ._act import ActLayer, create_act, fusible_act, fusible_gate, has_hooks
from .fused import is_fused
from .gated import Excitation, is_plain

torch.fx.wrap("squeeze_excite")  # a leaf: it looks at shapes, which a proxy does not have


class SqueezeExcite(nn.Module):
    """`x * gate(fc2(act(fc1(mean(x)))))`: every channel scaled by what all of them say.

    Signature, attributes and `state_dict` keys of timm's module of this name (also `SEModule`), and
    the keys of torchvision's `SqueezeExcitation`; `forward` also takes the residual and the last
    activation of a block that ends in it. Everything runs as one op
    (`vertebra.kernels.squeeze_excite`) unless `add_maxpool`, `norm_layer` or an activation asks for
    what it does not know: plain PyTorch then.

    The hidden channels are `rd_channels`, or `rd_round_fn(channels * rd_ratio)`, by default the
    nearest multiple of `rd_divisor`. Those of others, of which transformers and torchvision always
    have ReLU and the sigmoid:

    * torchvision and transformers RegNet, timm RegNet: `rd_channels=int(round(block_in / 4))`,
      with the channels that enter the block; Python rounds halves to even (54 / 4 to 14);
    * timm EfficientNet: `rd_ratio=0.25, rd_round_fn=round`;
    * timm SE-ResNet: the defaults.

    Args:
        channels: C of the (N, C, H, W) input.
        rd_ratio: hidden channels per channel.
        rd_channels: hidden channels, in place of the ratio.
        rd_divisor: of the hidden channels, where they come from the ratio.
        add_maxpool: squeeze by the average of mean and maximum.
        bias: of both fcs.
        act_layer: between the fcs: class or name.
        norm_layer: class of a norm before it, called with the hidden channels.
        gate_layer: class or name, "sigmoid" or "hard_sigmoid".
        device: of the parameters.
        dtype: of the parameters.
        rd_round_fn: from `channels * rd_ratio` to the hidden channels.

    >>> se = SqueezeExcite(64, rd_ratio=0.25)
    >>> x = torch.randn(2, 64, 4, 4)
    >>> bool((se(x, residual=x, out_act=nn.ReLU()) >= 0).all())
    True
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1.0 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        add_maxpool: bool = False,
        bias: bool = True,
        act_layer: ActLayer = nn.ReLU,
        norm_layer: Callable[..., nn.Module] | None = None,
        gate_layer: ActLayer = "sigmoid",
        device: Any = None,
        dtype: torch.dtype | None = None,
        rd_round_fn: Callable[[float], float] | None = None,
    ) -> None:
        super().__init__()
        self.add_maxpool = add_maxpool
        if not rd_channels:
            wanted = channels * rd_ratio
            rd_channels = (
                int(rd_round_fn(wanted))
                if rd_round_fn is not None
                else max(rd_divisor, int(wanted + rd_divisor / 2) // rd_divisor * rd_divisor)
            )
        self.fc1 = nn.Conv2d(channels, rd_channels, 1, bias=bias, device=device, dtype=dtype)
        self.bn = (
            norm_layer(rd_channels, device=device, dtype=dtype) if norm_layer else nn.Identity()
        )
        self.act = create_act(act_layer, inplace=True)
        self.fc2 = nn.Conv2d(rd_channels, channels, 1, bias=bias, device=device, dtype=dtype)
        self.gate = create_act(gate_layer, inplace=False)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, out_act: nn.Module | None = None
    ) -> Tensor:
        if not isinstance(out_act, nn.Module):  # None, or the proxy of an argument left out
            out_act = None
        layers = SqueezeExcite.excitation(self)
        if layers is not None:
            return excite(x, *layers, residual, out_act)
        s = x.mean((2, 3), keepdim=True)
        if self.add_maxpool:
            s = 0.5 * s + 0.5 * x.amax((2, 3), keepdim=True)
        y = x * self.gate(self.fc2(self.act(self.bn(self.fc1(s)))))
        y = y if residual is None else y + residual
        return y if out_act is None else out_act(y)

    def excitation(self) -> Excitation | None:
        """Return the layers, None where there is more to it."""
        if type(self.bn) is nn.Identity and not has_hooks(self.bn) and not self.add_maxpool:
            return Excitation(self.fc1, self.act, self.fc2, self.gate)
        return None


def excite(
    x: Tensor,
    fc1: nn.Module,
    act: nn.Module,
    fc2: nn.Module,
    gate: nn.Module,
    residual: Tensor | None = None,
    out_act: nn.Module | None = None,
) -> Tensor:
    """Return `out_act(x * gate(fc2(act(fc1(mean(x))))) + residual)`, in one op if it knows all."""
    act_name, gate_name = fusible_act(act), fusible_gate(gate)
    if act_name is not None and gate_name is not None:
        if is_fused(fc1) and is_fused(fc2) and runs_on_onednn(x):
            u = ACTIVATIONS[act_name](fc(means(x), fc1.filters, fc1.bias))
            gates = GATES[gate_name](fc(u, fc2.filters, fc2.bias)).to(x.dtype)
            y = x * gates.view(*gates.shape, 1, 1)
            y = y if residual is None else y.add_(residual)
            return y if out_act is None else out_act(y)
        # what is put in place of a convolution may compute something else
        if is_plain(fc1) and is_plain(fc2):
            tail = "none" if out_act is None else fusible_act(out_act)
            y = squeeze_excite(
                *(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, residual),
                *(act_name, gate_name, tail or "none"),
            )
            return y if out_act is None or tail is not None else out_act(y)
    y = x * gate(fc2(act(fc1(x.mean((2, 3), keepdim=True)))))
    y = y if residual is None else y + residual
    return y if out_act is None else out_act(y)
