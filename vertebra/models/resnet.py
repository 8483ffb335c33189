"""ResNet, ResNeXt, Wide ResNet and their kin, with the options of torchvision and its heirs.

    stem (stride 4) -> layer1, layer2, ...: residual blocks, stride 2 from layer2 on -> mean -> fc

Keys, order of construction, initialisation and arithmetic are torchvision's, and timm's where only
that has an option: a checkpoint or a seed gives the same bits here and there. A norm or an
attention, its residual and its activation run as one op.

He et al. 2015 (arXiv:1512.03385), Xie et al. 2016 (arXiv:1611.05431), Zagoruyko & Komodakis 2016
(arXiv:1605.07146); deep stems and average-pooled shortcuts: He et al. 2018 (arXiv:1812.01187);
ResNet-RS: Bello et al. 2021 (arXiv:2103.07579). For attention, anti-aliasing and dropping see their
modules in `vertebra.nn`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..nn import (
    CheckpointSequential,
    ConvNormActs,
    ConvNorms,
    DropBlock2d,
    DropPath,
    Unit,
    conv_attn_act,
    conv_norm_act,
    create_aa,
    create_aa_max_pool,
    create_act,
    create_attn,
    create_conv2d,
    create_norm_act,
)
from ..nn.back_to_back import End, InParts, end_of
from ..nn.fused_blocks import Recorded
from ._features import feature
from ._network import Network
from ._param_groups import Matcher
from ._registry import list_models, override, register_model
from ._resnet_config import CONFIGS, SYNONYMS, ResNetConfig, Stage
from ._weights import Source, load_weights


def _norm(config: ResNetConfig, channels: int, apply_act: bool = True) -> nn.Module:
    return create_norm_act(config.norm_layer, channels, config.act_layer, apply_act=apply_act)


def _aa(config: ResNetConfig, channels: int, stride: int, resamples: bool) -> nn.Module | None:
    """Build what takes over the stride of a block's 3x3, or None where that keeps it."""
    if config.aa_layer is None or not resamples:
        return None
    return create_aa(config.aa_layer, channels, stride)


class BasicBlock(nn.Module):
    """`act(norm(conv3x3(act(norm(conv3x3(x))))) + shortcut(x))`, with the stride in the first.

    DropBlock and what takes over the stride stand around its first activation; attention and
    stochastic depth before the add, in this order.
    """

    expansion = 1
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(
        self,
        config: ResNetConfig,
        in_channels: int,
        out_channels: int,
        downsample: nn.Module | None = None,
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,
        drop_block: nn.Module | None = None,
        drop_path: nn.Module | None = None,
    ) -> None:
        super().__init__()
        width, _ = config.widths(out_channels)
        aa = _aa(config, width, stride, stride > 1 or dilation != first_dilation)
        self.conv1 = create_conv2d(
            *(in_channels, width, 3),
            stride=stride if aa is None else 1,
            dilation=first_dilation,
            bias=False,
        )
        self.bn1 = _norm(config, width)
        self.drop_block = drop_block
        self.relu = create_act(config.act_layer)  # for norms that do not bring their own
        self.aa = aa
        self.conv2 = create_conv2d(width, out_channels, 3, dilation=dilation, bias=False)
        self.bn2 = _norm(config, out_channels, apply_act=config.attn_layer is None)
        self.se = create_attn(config.attn_layer, out_channels)
        self.downsample = downsample
        self.drop_path = drop_path

    def last_unit(self) -> Unit | None:
        """Return what this ends in, if it is a convolution and what follows that."""
        if self.se is not None:
            return None
        return Unit(self.conv2, self.bn2, self.relu, self.drop_path)

    def forward(self, x: Tensor, pool: nn.Module | None = None) -> Tensor:
        y = conv_norm_act(self.conv1, self.bn1, x, self.relu, drop=self.drop_block)
        y = y if self.aa is None else self.aa(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        if self.se is not None:
            end = (self.se, self.relu, shortcut, self.drop_path)
            return conv_attn_act(self.conv2, self.bn2, y, *end)
        return conv_norm_act(self.conv2, self.bn2, y, self.relu, shortcut, pool, self.drop_path)


class Bottleneck(InParts, nn.Module):
    """`BasicBlock` of a narrowing 1x1, a 3x3 with stride and groups, and a widening 1x1.

    DropBlock and what takes over the stride follow the 3x3.
    """

    expansion = 4
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self,
        config: ResNetConfig,
        in_channels: int,
        out_channels: int,
        downsample: nn.Module | None = None,
        stride: int = 1,
        first_dilation: int = 1,
        dilation: int = 1,  # of a second 3x3, which a bottleneck lacks
        drop_block: nn.Module | None = None,
        drop_path: nn.Module | None = None,
    ) -> None:
        super().__init__()
        reduced, width = config.widths(out_channels)
        stride1, stride2 = (stride, 1) if config.downsample_in_bottleneck else (1, stride)
        aa = _aa(config, width, stride2, stride2 > 1 or dilation != first_dilation)
        self.conv1 = create_conv2d(in_channels, reduced, 1, stride=stride1, bias=False)
        self.bn1 = _norm(config, reduced)
        self.conv2 = create_conv2d(
            *(reduced, width, 3),
            stride=stride2 if aa is None else 1,
            dilation=first_dilation,
            groups=config.groups,
            bias=False,
        )
        self.bn2 = _norm(config, width)
        self.drop_block = drop_block
        self.aa = aa
        self.conv3 = create_conv2d(width, out_channels, 1, bias=False)
        self.bn3 = _norm(config, out_channels, apply_act=config.attn_layer is None)
        self.se = create_attn(config.attn_layer, out_channels)
        self.relu = create_act(config.act_layer)  # for norms that do not bring their own
        self.downsample = downsample
        self.drop_path = drop_path

    def last_unit(self) -> Unit | None:
        """Return what this ends in, if it is a convolution and what follows that."""
        if self.se is not None:
            return None
        return Unit(self.conv3, self.bn3, self.relu, self.drop_path)

    def narrow_end(self) -> End | None:
        return end_of(self.conv1, self.bn1, self.relu)

    def widen_end(self) -> End | None:
        unit = self.last_unit()
        return None if unit is None else end_of(*unit)

    def work_end(self) -> End | None:
        if self.aa is not None:
            return None
        return end_of(self.conv2, self.bn2, self.relu, self.drop_block, side=3)

    def narrow(self, x: Tensor) -> Tensor:
        return conv_norm_act(self.conv1, self.bn1, x, self.relu)

    def work(self, y: Tensor) -> Tensor:
        y = conv_norm_act(self.conv2, self.bn2, y, self.relu, drop=self.drop_block)
        return y if self.aa is None else self.aa(y)

    def shortcut_of(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def widen(self, y: Tensor, shortcut: Tensor, pool: nn.Module | None = None) -> Tensor:
        if self.se is not None:
            end = (self.se, self.relu, shortcut, self.drop_path)
            return conv_attn_act(self.conv3, self.bn3, y, *end)
        return conv_norm_act(self.conv3, self.bn3, y, self.relu, shortcut, pool, self.drop_path)


def _stem_conv(config: ResNetConfig) -> nn.Module:
    if not config.stem_type:
        return create_conv2d(config.in_chans, config.stem_channels, 7, stride=2, bias=False)
    width = config.stem_width
    first = 3 * (width // 4) if config.stem_type == "deep_tiered" else width
    return ConvNormActs(
        create_conv2d(config.in_chans, first, 3, stride=2, bias=False),
        _norm(config, first),
        create_act(config.act_layer),
        create_conv2d(first, width, 3, bias=False),
        _norm(config, width),
        create_act(config.act_layer),
        create_conv2d(width, config.stem_channels, 3, bias=False),
    )


def _stem_pool(config: ResNetConfig) -> nn.Module:
    channels = config.stem_channels
    if not config.replace_stem_pool:
        return create_aa_max_pool(config.aa_layer, channels)
    if config.aa_layer is not None:
        return nn.Sequential(
            create_conv2d(channels, channels, 3, bias=False),
            create_aa(config.aa_layer, channels, 2),
            _norm(config, channels, apply_act=False),
            create_act(config.act_layer),
        )
    return ConvNormActs(
        create_conv2d(channels, channels, 3, stride=2, bias=False),
        _norm(config, channels),
        create_act(config.act_layer),
    )


def shortcut_pool(stride: int, dilation: int) -> nn.Module:
    """Build the average pool of a shortcut, in place of the stride of its convolution."""
    if stride > 1:
        return nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
    if dilation > 1:  # keeps the size; as in timm, the zeros of the padding count
        return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1))
    return nn.Identity()


def _shortcut(config: ResNetConfig, stage: Stage) -> nn.Module | None:
    """Build the projection of a stage's first block, or None where the input fits as it is."""
    in_channels, channels, _, stride, first_dilation, dilation, *_ = stage
    if stride == 1 and in_channels == channels:
        return None
    resamples = stride > 1 or dilation > 1
    if not config.avg_down:
        size = config.down_kernel_size if resamples else 1
        dilation = first_dilation if size > 1 else 1
        conv = create_conv2d(
            *(in_channels, channels, size), stride=stride, dilation=dilation, bias=False
        )
        return nn.Sequential(conv, _norm(config, channels, apply_act=False))
    conv = create_conv2d(in_channels, channels, 1, bias=False)
    norm = _norm(config, channels, apply_act=False)
    return nn.Sequential(shortcut_pool(stride, dilation), conv, norm)


def _make_stage(config: ResNetConfig, stage: Stage) -> nn.Sequential:
    block = BasicBlock if config.block == "basic" else Bottleneck
    in_channels, shortcut = stage.in_channels, _shortcut(config, stage)
    stride, first_dilation = stage.stride, stage.first_dilation
    blocks: list[nn.Module] = []
    for drop_path in stage.drop_paths:
        blocks.append(
            block(
                *(config, in_channels, stage.out_channels, shortcut),
                *(stride, first_dilation, stage.dilation),
                drop_block=DropBlock2d(*stage.drop_block) if stage.drop_block else None,
                drop_path=DropPath(drop_path) if drop_path else None,
            )
        )
        in_channels, shortcut = stage.out_channels, None
        stride, first_dilation = 1, stage.dilation
    return CheckpointSequential(*blocks)


class ResNet(Recorded, Network):
    """The network that a `ResNetConfig` describes.

    >>> import torch
    >>> model = ResNet(ResNetConfig("basic", layers=(1,), hidden_sizes=(8,), num_classes=5))
    >>> model(torch.randn(2, 3, 9, 11)).shape
    torch.Size([2, 5])
    """

    family = "resnet"
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"),)

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        self.conv1 = _stem_conv(config)
        # Norm and activation apart: features are asked for by their names, and torchvision and timm
        # run the children of a network one after the other.
        self.bn1 = create_norm_act(config.norm_layer, config.stem_channels, bare=True)
        self.relu = create_act(config.act_layer)
        self.maxpool = _stem_pool(config)
        stages = config.stages()
        self.stage_names = tuple(f"layer{i + 1}" for i in range(len(stages)))
        self.feature_info = [feature(config.stem_channels, 2, "relu")]
        reduction = 4
        for name, stage in zip(self.stage_names, stages, strict=True):
            self.add_module(name, _make_stage(config, stage))
            reduction *= stage.stride
            self.feature_info.append(feature(stage.out_channels, reduction, name))
        self._make_head(config.global_pool)
        self._init_weights()

    def _init_weights(self) -> None:
        if next(self.parameters()).is_meta:
            return  # no values to set, and slow at it
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if self.config.zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                    weight = getattr(last, "weight", None)
                    if weight is not None:
                        nn.init.zeros_(weight)

    @property
    def stem_conv(self) -> nn.Module:
        return self.conv1[0] if isinstance(self.conv1, nn.Sequential) else self.conv1

    def group_matcher(self, coarse: bool = False) -> Matcher:
        blocks = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        return {"stem": r"^(?:conv1|bn1|maxpool)", "blocks": blocks}

    def forward_stem(self, x: Tensor) -> Tensor:
        return conv_norm_act(self.conv1, self.bn1, x, self.relu, pool=self.maxpool)

    def forward_first_feature(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature map before the pool, at half the image's size, and after it."""
        x = conv_norm_act(self.conv1, self.bn1, x, self.relu)
        return x, self.maxpool(x)


def _build(name: str, *, weights: Source | None = None, **overrides: Any) -> ResNet:
    of_blocks: dict[str, Any] = overrides.pop("block_args", {})  # where timm has them
    model = ResNet(override(CONFIGS[name], dict(**overrides, **of_blocks), SYNONYMS))
    if weights is not None:
        load_weights(model, weights)
    return model


@register_model
def resnet18(*, weights: Source | None = None, **overrides: Any) -> ResNet:
    """Build ResNet-18; `overrides` are fields of `ResNetConfig`."""
    return _build("resnet18", weights=weights, **overrides)


@register_model
def resnet34(*, weights: Source | None = None, **overrides: Any) -> ResNet:
    """Build ResNet-34; `overrides` are fields of `ResNetConfig`."""
    return _build("resnet34", weights=weights, **overrides)


@register_model
def resnet50(*, weights: Source | None = None, **overrides: Any) -> ResNet:
    """Build ResNet-50; `overrides` are fields of `ResNetConfig`."""
    return _build("resnet50", weights=weights, **overrides)


@register_model
def resnet101(*, weights: Source | None = None, **overrides: Any) -> ResNet:
    """Build ResNet-101; `overrides` are fields of `ResNetConfig`."""
    return _build("resnet101", weights=weights, **overrides)


@register_model
def resnet152(*, weights: Source | None = None, **overrides: Any) -> ResNet:
    """Build ResNet-152; `overrides` are fields of `ResNetConfig`."""
    return _build("resnet152", weights=weights, **overrides)


@register_model
def resnext50_32x4d(*, weights: Source | None = None, **overrides: Any) -> ResNet:
    """Build ResNeXt-50 32x4d; `overrides` are fields of `ResNetConfig`."""
    return _build("resnext50_32x4d", weights=weights, **overrides)


@register_model
def resnext101_32x8d(*, weights: Source | None = None, **overrides: Any) -> ResNet:
    """Build ResNeXt-101 32x8d; `overrides` are fields of `ResNetConfig`."""
    return _build("resnext101_32x8d", weights=weights, **overrides)


@register_model
def resnext101_64x4d(*, weights: Source | None = None, **overrides: Any) -> ResNet:
    """Build ResNeXt-101 64x4d; `overrides` are fields of `ResNetConfig`."""
    return _build("resnext101_64x4d", weights=weights, **overrides)


@register_model
def wide_resnet50_2(*, weights: Source | None = None, **overrides: Any) -> ResNet:
    """Build Wide ResNet-50-2; `overrides` are fields of `ResNetConfig`."""
    return _build("wide_resnet50_2", weights=weights, **overrides)


@register_model
def wide_resnet101_2(*, weights: Source | None = None, **overrides: Any) -> ResNet:
    """Build Wide ResNet-101-2; `overrides` are fields of `ResNetConfig`."""
    return _build("wide_resnet101_2", weights=weights, **overrides)


for _name in CONFIGS.keys() - list_models():  # timm's, which have no function of their own
    register_model(partial(_build, _name), name=_name)
