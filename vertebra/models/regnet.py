"""RegNetX and RegNetY, with the options of torchvision, timm and transformers.

    stem (stride 2) -> block1, block2, ...: residual blocks, stride 2 each -> mean -> fc

Keys, order of construction and arithmetic are torchvision's, and so is initialisation unless it is
timm's: a checkpoint or a seed gives the same bits here and there. What only timm has (blocks that
start with a norm, an average-pooled shortcut, a convolution behind the last stage) has keys in the
same manner. A norm, its residual and its activation run as one op, and so does a squeeze and
excitation.

Radosavovic et al. 2020 (arXiv:2003.13678); RegNetZ: Dollar et al. 2021 (arXiv:2103.06877).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..nn import (
    CheckpointSequential,
    ConvNorms,
    DropPathAdd,
    SqueezeExcite,
    Unit,
    conv_norm_act,
    create_act,
    create_conv2d,
    create_norm_act,
    excited,
    norm_act,
)
from ..nn._act import fusible_act, has_hooks
from ..nn.back_to_back import End, InParts, end_of
from ..nn.fused_blocks import Recorded
from ._features import feature
from ._network import Network
from ._param_groups import Matcher
from ._registry import list_models, override, register_model
from ._regnet_config import CONFIGS, SYNONYMS, Block, RegNetConfig
from ._weights import Source, load_weights
from .resnet import shortcut_pool


def _norm(config: RegNetConfig, channels: int, apply_act: bool = True) -> nn.Module:
    return create_norm_act(config.norm_layer, channels, config.act_layer, apply_act=apply_act)


class _ConvNormAct(nn.Sequential):
    """`act(norm(conv(x)) + residual)`, with torchvision's keys: 0, 1, and 2 without parameters."""

    CONV_NORMS: ClassVar[ConvNorms] = (("0", "1"),)

    def __init__(self, config: RegNetConfig, conv: nn.Conv2d, apply_act: bool = True) -> None:
        act = create_act(config.act_layer if apply_act else None)  # for norms that bring none
        super().__init__(conv, _norm(config, conv.out_channels, apply_act), act)

    def unit(self) -> Unit:
        return Unit(*self)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, pool: nn.Module | None = None
    ) -> Tensor:
        conv, norm, act = self
        return conv_norm_act(conv, norm, x, act, residual, pool)


class _NormActConv(nn.Sequential):
    """`conv(act(norm(x)))`, in that order: keys 0 and 2."""

    def __init__(self, config: RegNetConfig, conv: nn.Conv2d) -> None:
        act = create_act(config.act_layer)  # for norms that bring none
        super().__init__(_norm(config, conv.in_channels), act, conv)

    def forward(self, x: Tensor) -> Tensor:
        return self[2](norm_act(self[0], x, self[1]))


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return create_conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def _conv3x3(config: RegNetConfig, width: int, block: Block) -> nn.Conv2d:
    return create_conv2d(
        *(width, width, 3),
        stride=block.stride,
        dilation=block.dilation,
        groups=config.groups(width),
        bias=False,
    )


def _squeeze_excite(config: RegNetConfig, width: int, block: Block) -> SqueezeExcite | None:
    if not config.squeeze_ratio:
        return None
    hidden = config.squeezed(block.in_channels)
    return SqueezeExcite(
        width, rd_channels=hidden, act_layer=config.se_act_layer or config.act_layer
    )


def _projection(config: RegNetConfig, block: Block) -> nn.Module | None:
    """Build what fits a block's input to its output, or None where it fits or is not added."""
    if not (block.changes_shape and config.downsample):
        return None
    in_channels, channels, stride, dilation, _ = block
    layers: list[nn.Module] = []
    if config.downsample == "avg":
        layers.append(shortcut_pool(stride, dilation))
        stride = 1
    layers.append(_conv1x1(in_channels, channels, stride))
    if not config.preact:
        layers.append(_norm(config, channels, apply_act=False))
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


class BottleneckTransform(nn.Sequential):
    """`c(se(b(a(x)))) + residual`: a 1x1, a 3x3 with stride and groups, a 1x1; "x" has no `se`."""

    CONV_NORMS: ClassVar[ConvNorms] = ()  # its children's affair

    def __init__(self, config: RegNetConfig, block: Block, apply_act: bool) -> None:
        super().__init__()
        width = config.bottleneck_width(block.out_channels)
        self.a = _ConvNormAct(config, _conv1x1(block.in_channels, width))
        self.b = _ConvNormAct(config, _conv3x3(config, width, block))
        self.se = _squeeze_excite(config, width, block)
        self.c = _ConvNormAct(config, _conv1x1(width, block.out_channels), apply_act)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, pool: nn.Module | None = None
    ) -> Tensor:
        x = self.a(x)
        if self.se is not None:
            y = excited(self.b, self.se, self.c, x, residual, pool=pool)
            if y is not None:
                return y
        x = self.b(x)
        if self.se is not None:
            x = self.se(x)
        return self.c(x, residual) if pool is None else self.c(x, residual, pool)


class _Block(nn.Module):
    """What is added to the branch of a block, if anything is."""

    def __init__(self, config: RegNetConfig, block: Block) -> None:
        super().__init__()
        self.adds = bool(config.downsample) or not block.changes_shape
        self.proj = _projection(config, block)

    def shortcut_of(self, x: Tensor) -> Tensor | None:
        if self.proj is not None:
            return self.proj(x)
        return x if self.adds else None


class ResBottleneckBlock(_Block, InParts):
    """`act(drop_path(f(x)) + proj(x))`, where f is a `BottleneckTransform`.

    The add and the activation are part of f's last op, unless stochastic depth comes before them.
    """

    def __init__(self, config: RegNetConfig, block: Block) -> None:
        super().__init__(config, block)
        rate = block.drop_path_rate if self.adds else 0.0
        act_layer = None if config.linear_out else config.act_layer
        self.f = BottleneckTransform(config, block, apply_act=act_layer is not None and rate == 0)
        self.drop_path = DropPathAdd(drop_prob=rate) if rate > 0 else None
        self.activation = create_act(act_layer if rate > 0 else None, inplace=False)

    def zero_init(self) -> None:
        """Let the branch start at 0."""
        weight = getattr(self.f.c[1], "weight", None)
        if weight is not None:
            nn.init.zeros_(weight)

    def last_unit(self) -> Unit | None:
        """Return what this ends in, if it is a convolution and what follows that."""
        watched = has_hooks(self.f) or has_hooks(self.f.c) or has_hooks(self.activation)
        return None if watched or self.drop_path is not None else self.f.c.unit()

    def narrow_end(self) -> End | None:
        watched = has_hooks(self.f) or has_hooks(self.f.a)
        return None if watched else end_of(*self.f.a.unit())

    def widen_end(self) -> End | None:
        if self.training or self.f.se is not None or has_hooks(self.f) or has_hooks(self.f.c):
            return None
        end, act = end_of(*self.f.c.unit()), fusible_act(self.activation)
        if end is None or act is None or "none" not in (act, end.act):
            return None
        return end if act == "none" else End(end.conv, act)

    def narrow(self, x: Tensor) -> Tensor:
        return self.f.a(x)

    def work(self, y: Tensor) -> Tensor:
        return self.f.b(y)

    def widen(self, y: Tensor, shortcut: Tensor | None) -> Tensor:
        return self.activation(self.f.c(y, shortcut))

    def forward(self, x: Tensor, pool: nn.Module | None = None) -> Tensor:
        shortcut = self.shortcut_of(x)
        if isinstance(pool, nn.Module):  # by who has asked for `last_unit`
            return self.f(x, shortcut, pool)
        if self.drop_path is not None and self.training:
            y = self.drop_path(self.f(x), shortcut)
        else:
            y = self.f(x, shortcut)
        return self.activation(y)


class PreActTransform(nn.Sequential):
    """`c(se(b(a(x))))`, where b and c start with a norm and its activation; "x" has no `se`.

    That of b comes right behind a convolution, which runs both of them after `vertebra.fuse`.
    """

    CONV_NORMS: ClassVar[ConvNorms] = (("a", "b.0"),)

    def forward(self, x: Tensor) -> Tensor:
        a, b, *others = self
        if has_hooks(b):
            x = b(a(x))
        else:
            norm, act, conv = cast("_NormActConv", b)
            x = conv(conv_norm_act(a, norm, x, act))
        for layer in others:
            x = layer(x)
        return x


class PreActBlock(_Block):
    """`drop_path(f(z)) + proj(z)` with z = act(norm(x)) and norms in f before its convolutions."""

    def __init__(self, config: RegNetConfig, block: Block) -> None:
        super().__init__(config, block)
        width = config.bottleneck_width(block.out_channels)
        self.norm = _norm(config, block.in_channels)
        self.activation = create_act(config.act_layer)  # for a norm that does not bring its own
        layers = {
            "a": _conv1x1(block.in_channels, width),
            "b": _NormActConv(config, _conv3x3(config, width, block)),
            "se": _squeeze_excite(config, width, block),
            "c": _NormActConv(config, _conv1x1(width, block.out_channels)),
        }
        self.f = PreActTransform()
        for name, layer in layers.items():
            if layer is not None:
                self.f.add_module(name, layer)
        self.drop_path = DropPathAdd(drop_prob=block.drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = norm_act(self.norm, x, self.activation)
        shortcut = self.shortcut_of(x)
        return self.f(x) if shortcut is None else self.drop_path(self.f(x), shortcut)


def _branch_first(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules in the order in which timm draws their weights, shortcuts last."""
    for _, child in sorted(module.named_children(), key=lambda item: item[0] == "proj"):
        yield from _branch_first(child)
    yield module


class RegNet(Recorded, Network):
    """The network that a `RegNetConfig` describes.

    >>> import torch
    >>> model = RegNet(RegNetConfig("y", hidden_sizes=(24, 48), depths=(1, 1), group_width=8))
    >>> model(torch.randn(2, 3, 33, 47)).shape
    torch.Size([2, 1000])
    """

    family = "regnet"

    def __init__(self, config: RegNetConfig) -> None:
        super().__init__(config)
        stem = create_conv2d(config.in_chans, config.stem_channels, 3, stride=2, bias=False)
        self.stem = stem if config.preact else _ConvNormAct(config, stem)
        self.feature_info = [feature(config.stem_channels, 2, "stem")]
        self.trunk_output = nn.Sequential()
        build = PreActBlock if config.preact else ResBottleneckBlock
        reduction = 2
        for i, blocks in enumerate(config.stages(), 1):
            stage = CheckpointSequential()
            for j, block in enumerate(blocks):
                stage.add_module(f"block{i}-{j}", build(config, block))
                reduction *= block.stride
            self.trunk_output.add_module(f"block{i}", stage)
            name = f"trunk_output.block{i}"
            self.feature_info.append(feature(blocks[-1].out_channels, reduction, name))
        self.stage_names = tuple(entry["module"] for entry in self.feature_info[1:])
        self.final_conv = self._make_neck()
        self._make_head(config.global_pool)
        self._init_weights()

    def _make_neck(self) -> nn.Module | None:
        """Build what follows the last stage, and is no part of it to whom wants features."""
        config = self.config
        if config.num_features:
            self.num_features = config.num_features
            return _ConvNormAct(config, _conv1x1(config.channels[-1], config.num_features))
        if config.linear_out or config.preact:
            return create_act(config.act_layer, inplace=False)  # the last stage's map is a feature
        return None

    def _init_weights(self) -> None:
        if next(self.parameters()).is_meta:
            return  # no values to set, and slow at it
        by_group = self.config.init == "timm"
        for module in _branch_first(self) if by_group else self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                fan_out //= module.groups if by_group else 1
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))
                if by_group and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)
            elif self.config.zero_init_residual and isinstance(module, ResBottleneckBlock):
                module.zero_init()

    @property
    def stem_conv(self) -> nn.Module:
        return self.stem[0] if isinstance(self.stem, nn.Sequential) else self.stem

    def group_matcher(self, coarse: bool = False) -> Matcher:
        stage = r"^trunk_output\.block(\d+)"
        return {"stem": r"^stem", "blocks": stage if coarse else stage + r"\.block\d+-(\d+)"}

    def forward_stem(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def forward_neck(self, x: Tensor) -> Tensor:
        return x if self.final_conv is None else self.final_conv(x)

    def neck_unit(self) -> Unit | None:
        neck = self.final_conv
        return neck.unit() if isinstance(neck, _ConvNormAct) and not has_hooks(neck) else None

    @property
    def has_neck(self) -> bool:
        return self.final_conv is not None

    def drop_neck(self) -> None:
        self.final_conv = None
        self.num_features = self.feature_info[len(self.stage_names)]["num_chs"]


def _build(name: str, *, weights: Source | None = None, **overrides: Any) -> RegNet:
    model = RegNet(override(CONFIGS[name], overrides, SYNONYMS))
    if weights is not None:
        load_weights(model, weights)
    return model


@register_model
def regnet_x_400mf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetX-400MF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_x_400mf", weights=weights, **overrides)


@register_model
def regnet_x_800mf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetX-800MF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_x_800mf", weights=weights, **overrides)


@register_model
def regnet_x_1_6gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetX-1.6GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_x_1_6gf", weights=weights, **overrides)


@register_model
def regnet_x_3_2gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetX-3.2GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_x_3_2gf", weights=weights, **overrides)


@register_model
def regnet_x_8gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetX-8GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_x_8gf", weights=weights, **overrides)


@register_model
def regnet_x_16gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetX-16GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_x_16gf", weights=weights, **overrides)


@register_model
def regnet_x_32gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetX-32GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_x_32gf", weights=weights, **overrides)


@register_model
def regnet_y_400mf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetY-400MF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_y_400mf", weights=weights, **overrides)


@register_model
def regnet_y_800mf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetY-800MF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_y_800mf", weights=weights, **overrides)


@register_model
def regnet_y_1_6gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetY-1.6GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_y_1_6gf", weights=weights, **overrides)


@register_model
def regnet_y_3_2gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetY-3.2GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_y_3_2gf", weights=weights, **overrides)


@register_model
def regnet_y_8gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetY-8GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_y_8gf", weights=weights, **overrides)


@register_model
def regnet_y_16gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetY-16GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_y_16gf", weights=weights, **overrides)


@register_model
def regnet_y_32gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetY-32GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_y_32gf", weights=weights, **overrides)


@register_model
def regnet_y_128gf(*, weights: Source | None = None, **overrides: Any) -> RegNet:
    """Build RegNetY-128GF; `overrides` are fields of `RegNetConfig`."""
    return _build("regnet_y_128gf", weights=weights, **overrides)


for _name in CONFIGS.keys() - list_models():  # timm's, which have no function of their own
    register_model(partial(_build, _name), name=_name)
