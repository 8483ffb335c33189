"""What distinguishes one ResNet from another, as plain data: the config and the named variants.

Not here, of timm's: ecaresnet50d_pruned and ecaresnet101d_pruned, whose channels come from a table
of every convolution, and test_resnet, which has another block in one stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from ..nn import AaLayer, ActLayer, AttnLayer, NormLayer, SqueezeExcite
from ._config import requirement


class Stage(NamedTuple):
    """What the blocks of one stage are built from."""

    in_channels: int
    out_channels: int
    depth: int
    stride: int
    first_dilation: int  # of the first 3x3, which still reads the stage before
    dilation: int
    drop_paths: tuple[float, ...]  # of each block
    drop_block: tuple[float, int, float] | None  # rate, side of a square, factor of the rate


@dataclass(frozen=True)
class ResNetConfig:
    """What a ResNet is made from; the defaults make torchvision's ResNet-50.

    One name per concept, torchvision's where it has one; `create_model` also takes `SYNONYMS`.

    Args:
        block: "bottleneck" (1x1, 3x3, 1x1) or "basic" (3x3, 3x3). transformers: `layer_type`.
        layers: blocks per stage. transformers: `depths`.
        num_classes: outputs of the classifier; 0 for none, and pooled features come out.
        in_chans: channels of the image. transformers: `num_channels`.
        hidden_sizes: channels that leave each stage; None for 64, 128, 256, ... times the block's
            expansion, 1 or 4. timm: `channels`, given before the expansion.
        groups: of a bottleneck's 3x3. timm: `cardinality`.
        width_per_group: of a bottleneck's 3x3, relative to 64. timm: `base_width`.
        norm_layer: class, factory, "batchnorm2d", "frozenbatchnorm2d", "groupnorm", "groupnorm1",
            "layernorm2d", or None for batch norm.
        act_layer: class, factory, name, or None. transformers: `hidden_act`, which leaves the
            activations inside a block at ReLU where this one sets them all.
        attn_layer: what scales the channels of a residual branch before it is added: "se", "eca", a
            class or factory called with their number, or None. timm: in `block_args`.
        aa_layer: anti-aliasing, which takes over the stride of the stem's pool and of the 3x3 of
            each block: "avg", "blur", "blurpc" (a blur that pads with zeros), a class or factory
            called with `channels` and `stride`, or None.
        zero_init_residual: let every residual branch start at 0. timm: `zero_init_last`.
        output_stride: 32, or 16 or 8 to trade the strides beyond it for dilation, as timm does.
        replace_stride_with_dilation: that trade spelled out for each stage after the first.
        stem_type: "" (one 7x7), "deep" (three 3x3) or "deep_tiered" (the first of them narrower).
        stem_width: channels inside a deep stem.
        embedding_size: channels that leave the stem; None for 64, or 2 * stem_width if it is deep.
        replace_stem_pool: a 3x3 convolution of stride 2 in place of the max pool.
        downsample_in_first_stage: stride 2 in the first stage as well.
        downsample_in_bottleneck: put a bottleneck's stride on its first 1x1, not on its 3x3.
        avg_down: average-pool in a shortcut, in place of the stride of its convolution.
        down_kernel_size: of the convolution of a shortcut that has a stride or a dilation.
        block_reduce_first: divisor of the channels between the first two convolutions of a block.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" with num_classes=0.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, to which a line leads from 0.
        drop_block_rate: DropBlock behind the norm of the 3x3 that may have a stride, in the third
            stage of squares of 5x5 and in the fourth of 3x3.
    """

    block: str = "bottleneck"
    layers: Sequence[int] = (3, 4, 6, 3)
    num_classes: int = 1000
    in_chans: int = 3
    hidden_sizes: Sequence[int] | None = None
    groups: int = 1
    width_per_group: int = 64
    norm_layer: str | NormLayer | None = None
    act_layer: ActLayer = nn.ReLU
    attn_layer: AttnLayer = None
    aa_layer: AaLayer = None
    zero_init_residual: bool = False
    output_stride: int = 32
    replace_stride_with_dilation: Sequence[bool] | None = None
    stem_type: str = ""
    stem_width: int = 64
    embedding_size: int | None = None
    replace_stem_pool: bool = False
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    avg_down: bool = False
    down_kernel_size: int = 1
    block_reduce_first: int = 1
    global_pool: str = "avg"
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_block_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_sizes", "replace_stride_with_dilation"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        self._check()

    def _check(self) -> None:
        require = requirement(self)
        for name in ("in_chans", "groups", "width_per_group", "stem_width", "block_reduce_first"):
            require(getattr(self, name) >= 1, name, f"{name} must be at least 1")
        require(self.num_classes >= 0, "num_classes", "num_classes must be 0 (none) or more")
        for name in ("drop_rate", "drop_path_rate", "drop_block_rate"):
            require(0 <= getattr(self, name) <= 1, name, f"{name} must lie in [0, 1]")
        require(self.block in _EXPANSION, "block", f"block must be one of {', '.join(_EXPANSION)}")
        require(
            len(self.layers) > 0 and min(self.layers) > 0,
            "layers",
            "layers must hold the number of blocks of each stage, all at least 1",
        )
        require(
            len(self.channels) == len(self.layers),
            "hidden_sizes layers",
            "hidden_sizes must have one entry per stage in layers",
        )
        require(
            self.block == "bottleneck" or (self.groups, self.width_per_group) == (1, 64),
            "block groups width_per_group",
            "groups and width_per_group shape a bottleneck; leave them at 1 and 64, or set "
            "block='bottleneck'",
        )
        widths = [self.widths(channels)[0] for channels in self.channels]
        require(
            min(widths) > 0 and all(width % self.groups == 0 for width in widths),
            "groups width_per_group hidden_sizes block_reduce_first",
            f"each stage's 3x3 reads {widths} channels, which groups must divide; change one",
        )
        require(
            self.stem_type in ("", "deep", "deep_tiered"),
            "stem_type",
            "stem_type must be '', 'deep' or 'deep_tiered'",
        )
        require(
            self.stem_channels >= 1 and (self.stem_type != "deep_tiered" or self.stem_width >= 4),
            "embedding_size stem_type stem_width",
            "embedding_size must be at least 1, and stem_width 4 in a tiered stem",
        )
        require(
            self.aa_layer is None or not self.downsample_in_bottleneck,
            "aa_layer downsample_in_bottleneck",
            "aa_layer takes over the stride of a 3x3, and downsample_in_bottleneck leaves it none; "
            "give one of them",
        )
        require(self.down_kernel_size % 2 == 1, "down_kernel_size", "down_kernel_size must be odd")
        require(
            self.output_stride in (8, 16, 32), "output_stride", "output_stride must be 8, 16 or 32"
        )
        dilate = self.replace_stride_with_dilation
        require(
            dilate is None or len(dilate) == len(self.layers) - 1,
            "replace_stride_with_dilation layers",
            "replace_stride_with_dilation must have one bool per stage after the first",
        )
        require(
            dilate is None or self.output_stride == 32,
            "replace_stride_with_dilation output_stride",
            "replace_stride_with_dilation and output_stride say the same thing; give one of them",
        )

    @property
    def stem_channels(self) -> int:
        """Channels that leave the stem."""
        if self.embedding_size is not None:
            return self.embedding_size
        return 2 * self.stem_width if self.stem_type else 64

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels that leave each stage."""
        if self.hidden_sizes is not None:
            return tuple(self.hidden_sizes)
        return tuple((64 << i) * _EXPANSION[self.block] for i in range(len(self.layers)))

    def widths(self, out_channels: int) -> tuple[int, int]:
        """Return the channels that enter and leave the second convolution of a block."""
        planes = out_channels // _EXPANSION[self.block]
        width = planes * self.width_per_group // 64 * self.groups
        return width // self.block_reduce_first, width

    def stages(self) -> list[Stage]:
        """Return the stages, with every trade of stride for dilation made."""
        stages: list[Stage] = []
        last = max(sum(self.layers) - 1, 1)
        in_channels, reduction, dilation = self.stem_channels, 4, 1
        for i, (depth, out_channels) in enumerate(zip(self.layers, self.channels, strict=True)):
            stride = 2 if i > 0 or self.downsample_in_first_stage else 1
            first_dilation = dilation
            if self.replace_stride_with_dilation is not None:
                dilate = i > 0 and self.replace_stride_with_dilation[i - 1]
            else:
                dilate = self.output_stride < 32 and reduction >= self.output_stride
            if dilate:
                dilation, stride = dilation * stride, 1
            before = sum(self.layers[:i])
            blocks = range(before, before + depth)
            drop_paths = tuple(self.drop_path_rate * block / last for block in blocks)
            drop_block = (self.drop_block_rate, *_SQUARES[i]) if i in _SQUARES else None
            stages.append(
                Stage(
                    *(in_channels, out_channels, depth, stride, first_dilation, dilation),
                    drop_paths,
                    drop_block if self.drop_block_rate else None,
                )
            )
            in_channels, reduction = out_channels, reduction * stride
        return stages


_EXPANSION = {"basic": 1, "bottleneck": 4}
_SQUARES = {2: (5, 0.25), 3: (3, 1.0)}  # what DropBlock drops, and the factor of its rate, by stage

SYNONYMS = {
    "layer_type": "block",
    "depths": "layers",
    "cardinality": "groups",
    "base_width": "width_per_group",
    "hidden_act": "act_layer",
    "zero_init_last": "zero_init_residual",
}


def _se_quarter(channels: int) -> SqueezeExcite:
    return SqueezeExcite(channels, rd_ratio=0.25)


_18 = ResNetConfig("basic", (2, 2, 2, 2))
_26 = ResNetConfig("bottleneck", (2, 2, 2, 2))
_34 = ResNetConfig("basic", (3, 4, 6, 3))
_50 = ResNetConfig("bottleneck", (3, 4, 6, 3))
_101 = ResNetConfig("bottleneck", (3, 4, 23, 3))
_152 = ResNetConfig("bottleneck", (3, 8, 36, 3))
_200 = ResNetConfig("bottleneck", (3, 24, 36, 3))
_269 = ResNetConfig("bottleneck", (3, 30, 48, 8))
# timm's suffixes, after He et al. 2018
_C: dict[str, Any] = {"stem_type": "deep", "stem_width": 32}
_D: dict[str, Any] = {**_C, "avg_down": True}
_S: dict[str, Any] = {"stem_type": "deep"}
_T: dict[str, Any] = {**_D, "stem_type": "deep_tiered"}
_X4: dict[str, Any] = {"groups": 32, "width_per_group": 4}
_X8: dict[str, Any] = {"groups": 32, "width_per_group": 8}
_RS: dict[str, Any] = {**_D, "replace_stem_pool": True, "attn_layer": _se_quarter}

CONFIGS = {
    "resnet10t": ResNetConfig("basic", (1, 1, 1, 1), **_T),
    "resnet14t": ResNetConfig("bottleneck", (1, 1, 1, 1), **_T),
    "resnet18": _18,
    "resnet18d": replace(_18, **_D),
    "resnet26": _26,
    "resnet26d": replace(_26, **_D),
    "resnet26t": replace(_26, **_T),
    "resnet34": _34,
    "resnet34d": replace(_34, **_D),
    "resnet50": _50,
    "resnet50_gn": replace(_50, norm_layer="groupnorm"),
    "resnet50c": replace(_50, **_C),
    "resnet50d": replace(_50, **_D),
    "resnet50s": replace(_50, **_S),
    "resnet50t": replace(_50, **_T),
    "resnet101": _101,
    "resnet101c": replace(_101, **_C),
    "resnet101d": replace(_101, **_D),
    "resnet101s": replace(_101, **_S),
    "resnet152": _152,
    "resnet152c": replace(_152, **_C),
    "resnet152d": replace(_152, **_D),
    "resnet152s": replace(_152, **_S),
    "resnet200": _200,
    "resnet200d": replace(_200, **_D),
    "resnext50_32x4d": replace(_50, **_X4),
    "resnext50d_32x4d": replace(_50, **_X4, **_D),
    "resnext101_32x4d": replace(_101, **_X4),
    "resnext101_32x8d": replace(_101, **_X8),
    "resnext101_32x16d": replace(_101, groups=32, width_per_group=16),
    "resnext101_32x32d": replace(_101, groups=32, width_per_group=32),
    "resnext101_64x4d": replace(_101, groups=64, width_per_group=4),
    "seresnet18": replace(_18, attn_layer="se"),
    "seresnet34": replace(_34, attn_layer="se"),
    "seresnet50": replace(_50, attn_layer="se"),
    "seresnet50t": replace(_50, attn_layer="se", **_T),
    "seresnet101": replace(_101, attn_layer="se"),
    "seresnet152": replace(_152, attn_layer="se"),
    "seresnet152d": replace(_152, attn_layer="se", **_D),
    "seresnet200d": replace(_200, attn_layer="se", **_D),
    "seresnet269d": replace(_269, attn_layer="se", **_D),
    "seresnext26d_32x4d": replace(_26, attn_layer="se", **_X4, **_D),
    "seresnext26t_32x4d": replace(_26, attn_layer="se", **_X4, **_T),
    "seresnext50_32x4d": replace(_50, attn_layer="se", **_X4),
    "seresnext101_32x4d": replace(_101, attn_layer="se", **_X4),
    "seresnext101_32x8d": replace(_101, attn_layer="se", **_X8),
    "seresnext101_64x4d": replace(_101, attn_layer="se", groups=64, width_per_group=4),
    "seresnext101d_32x8d": replace(_101, attn_layer="se", **_X8, **_D),
    "senet154": replace(
        _152,
        attn_layer="se",
        groups=64,
        width_per_group=4,
        down_kernel_size=3,
        block_reduce_first=2,
        **_S,
    ),
    "ecaresnet26t": replace(_26, attn_layer="eca", **_T),
    "ecaresnet50d": replace(_50, attn_layer="eca", **_D),
    "ecaresnet50t": replace(_50, attn_layer="eca", **_T),
    "ecaresnet101d": replace(_101, attn_layer="eca", **_D),
    "ecaresnet200d": replace(_200, attn_layer="eca", **_D),
    "ecaresnet269d": replace(_269, attn_layer="eca", **_D),
    "ecaresnetlight": ResNetConfig(
        "bottleneck", (1, 1, 11, 3), stem_width=32, avg_down=True, attn_layer="eca"
    ),
    "ecaresnext26t_32x4d": replace(_26, attn_layer="eca", **_X4, **_T),
    "ecaresnext50t_32x4d": replace(_50, attn_layer="eca", **_X4, **_T),
    "resnetrs50": replace(_50, **_RS),
    "resnetrs101": replace(_101, **_RS),
    "resnetrs152": replace(_152, **_RS),
    "resnetrs200": replace(_200, **_RS),
    "resnetrs270": ResNetConfig("bottleneck", (4, 29, 53, 4), **_RS),
    "resnetrs350": ResNetConfig("bottleneck", (4, 36, 72, 4), **_RS),
    "resnetrs420": ResNetConfig("bottleneck", (4, 44, 87, 4), **_RS),
    "resnetaa34d": replace(_34, aa_layer="avg", **_D),
    "resnetaa50": replace(_50, aa_layer="avg"),
    "resnetaa50d": replace(_50, aa_layer="avg", **_D),
    "resnetaa101d": replace(_101, aa_layer="avg", **_D),
    "seresnetaa50d": replace(_50, aa_layer="avg", attn_layer="se", **_D),
    "seresnextaa101d_32x8d": replace(_101, aa_layer="avg", attn_layer="se", **_X8, **_D),
    "seresnextaa201d_32x8d": ResNetConfig(
        *("bottleneck", (3, 24, 36, 4)),
        aa_layer="avg",
        attn_layer="se",
        avg_down=True,
        **_X8,
        **_S,
    ),
    "resnetblur18": replace(_18, aa_layer="blur"),
    "resnetblur50": replace(_50, aa_layer="blur"),
    "resnetblur50d": replace(_50, aa_layer="blur", **_D),
    "resnetblur101d": replace(_101, aa_layer="blur", **_D),
    "wide_resnet50_2": replace(_50, width_per_group=128),
    "wide_resnet101_2": replace(_101, width_per_group=128),
}
