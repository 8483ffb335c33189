"""Convolution, normalisation, activation: the unit all three families are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor, nn

from ._act import ActLayer, create_act, has_hooks
from .blur_pool import AaLayer, create_aa
from .conv_same import Conv2dSame
from .fused import Folded, FusedConv2d, epilogue, is_fused
from .gated import conv_act_pool
from .norm_act import NormLayer, create_norm_act, norm_act, pooled

# The convolutions and norms that a block gives to `conv_norm_act` as pairs, by name: its class's
# CONV_NORMS, which `vertebra.fuse` goes by. A block need not have them all.
ConvNorms = tuple[tuple[str, str], ...]

Padding = str | int | tuple[int, int] | None


def create_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: Padding = "",
    dilation: int = 1,
    **kwargs: Any,
) -> nn.Conv2d:
    """Build a convolution from timm's padding: '' or None symmetric, 'same', 'valid', a number."""
    layer = nn.Conv2d
    if isinstance(padding, str) and padding.lower() == "same":
        if stride == 1 and (dilation * (kernel_size - 1)) % 2 == 0:
            padding = ""  # symmetric at every image size
        else:
            layer, padding = Conv2dSame, 0
    elif isinstance(padding, str) and padding.lower() == "valid":
        padding = 0
    elif isinstance(padding, str) and padding:
        raise ValueError(
            f"padding must be '', 'same', 'valid', a number or a pair; got {padding!r}"
        )
    if padding in ("", None):
        padding = ((stride - 1) + dilation * (kernel_size - 1)) // 2
    return layer(
        in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, **kwargs
    )


def conv_norm_act(
    conv: nn.Module,
    norm: nn.Module,
    x: Tensor,
    act: nn.Module | None = None,
    residual: Tensor | None = None,
    pool: nn.Module | None = None,
    drop: nn.Module | None = None,
) -> Tensor:
    """Return `pool(act(drop(norm(conv(x))) + residual))` for whatever stands in a block.

    All but the pool is one op if `vertebra.fuse` made `conv` take over the norm, and a pool that is
    the mean too where kernels of ours run it; else `norm_act` follows it. A `conv` may be a
    sequence that ends in the convolution.
    """
    if isinstance(norm, Folded) and not isinstance(x, torch.fx.Proxy):
        conv, x = _enter(conv, x)
        end = epilogue(norm, act, drop) if is_fused(conv) else None
        if end is not None:
            if isinstance(conv, FusedConv2d):
                return conv_act_pool(conv, x, residual, end, pool)
            return pooled(conv(x, residual, end), pool)
        y = conv(x)
        if has_hooks(conv):  # who has kept y keeps it from an activation in place, as of old
            y = y.clone()
        return norm_act(norm, y, act, residual, pool, drop)
    return norm_act(norm, conv(x), act, residual, pool, drop)


def _enter(conv: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Return the convolution that `conv` is or ends in, and what that reads."""
    if isinstance(conv, ConvNormActs) and conv.ends_in_conv and not has_hooks(conv):
        return conv[-1], conv.forward_but_last(x)
    return conv, x


class ConvNormActs(nn.Sequential):
    """Convolution, norm, activation, again and again, or ending in a convolution: timm's keys."""

    CONV_NORMS: ClassVar[ConvNorms] = (("0", "1"), ("3", "4"))

    @property
    def ends_in_conv(self) -> bool:
        """Whether the last convolution is followed by nothing here."""
        return len(self) % 3 == 1

    def forward_but_last(self, x: Tensor) -> Tensor:
        """Return what the convolution reads that this ends in, if it does."""
        for i in range(0, len(self) - 1, 3):
            x = conv_norm_act(self[i], self[i + 1], x, self[i + 2])
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_but_last(x)
        return self[-1](x) if self.ends_in_conv else x


class ConvNormAct(nn.Module):
    """`act(norm(conv(x)) + residual)`, with the signature and keys (`conv`, `bn`) of timm's module.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of the convolution.
        stride: of the convolution, or of `aa_layer` where there is one.
        padding: '' (symmetric), 'same', 'valid' or a number.
        dilation: of the convolution.
        groups: of the convolution; must divide both channel counts.
        bias: of the convolution.
        apply_norm: build the norm, or leave it out.
        apply_act: end in the activation, or in none.
        norm_layer: class, partial, name or None for batch norm.
        act_layer: class, name or None.
        aa_layer: what subsamples in the convolution's place: class called with `channels` and
            `stride`, "avg", "blur", "blurpc" (a blur that pads with zeros), or None.
        drop_layer: module class called between norm and activation.
        conv_kwargs: passed to the convolution.
        norm_kwargs: passed to the norm.
        act_kwargs: passed to the activation.
        device: of the parameters.
        dtype: of the parameters.
    """

    CONV_NORMS: ClassVar[ConvNorms] = (("conv", "bn"),)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: Padding = "",
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        apply_norm: bool = True,
        apply_act: bool = True,
        norm_layer: str | NormLayer = nn.BatchNorm2d,
        act_layer: ActLayer = nn.ReLU,
        aa_layer: AaLayer = None,
        drop_layer: Callable[[], nn.Module] | None = None,
        conv_kwargs: dict[str, Any] | None = None,
        norm_kwargs: dict[str, Any] | None = None,
        act_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if stride == 1:
            aa_layer = None
        self.conv = create_conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride if aa_layer is None else 1,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            **{**factory, **(conv_kwargs or {})},
        )
        if apply_norm:
            extra = {} if drop_layer is None else {"drop_layer": drop_layer}
            self.bn = create_norm_act(
                norm_layer,
                out_channels,
                act_layer,
                apply_act=apply_act,
                act_kwargs=act_kwargs,
                **extra,
                **{**factory, **(norm_kwargs or {})},
            )
            self._act = create_act(act_layer if apply_act else None, act_kwargs=act_kwargs)
        else:
            self.bn = nn.Sequential()
            if drop_layer is not None:
                self.bn.add_module("drop", drop_layer())
            self._act = nn.Identity()
        self.aa = None if aa_layer is None else create_aa(aa_layer, out_channels, stride)

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.conv.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.conv.out_channels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = conv_norm_act(self.conv, self.bn, x, self._act, residual)
        return y if self.aa is None else self.aa(y)
