"""What distinguishes one RegNet from another, as plain data: the config and the named variants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from ..nn import ActLayer, NormLayer
from ._config import requirement


class Block(NamedTuple):
    """What one block is built from."""

    in_channels: int
    out_channels: int
    stride: int
    dilation: int  # of its 3x3
    drop_path_rate: float

    @property
    def changes_shape(self) -> bool:
        """Whether what enters cannot be added to what leaves."""
        return self.in_channels != self.out_channels or self.stride > 1


@dataclass(frozen=True)
class RegNetConfig:
    """What a RegNet is made from; the defaults make RegNetY-4.0GF, as transformers' do.

    One name per concept, torchvision's where it has one; `create_model` also takes `SYNONYMS`.

    The stages come from a rule or from lists. The rule says how wide `depth` blocks should be, and
    blocks of equal width form a stage (Radosavovic et al. 2020, equations 2 to 4):

        s_j = round(log((w_0 + w_a * j) / w_0) / log(w_m))    w_j = 8 * round(w_0 * w_m^s_j / 8)

    A stage's 3x3 then gets a whole number of groups: `group_min_ratio`. Lists are taken as given.

    Args:
        layer_type: "x", or "y" for a squeeze and excitation behind every 3x3.
        depth: blocks in all.
        w_0: width of the first block, a multiple of 8.
        w_a: how much wider each block is than the one before.
        w_m: factor between the widths of one stage and the next.
        group_width: channels per group of a 3x3, or all it has if those are fewer. timm:
            `group_size`; transformers: `groups_width`.
        group_min_ratio: 0 rounds a width of the rule to the nearest whole number of groups, halves
            to even: pycls, timm, transformers. Otherwise halves go up, and so does what would keep
            less than this part of the width: torchvision, 0.9.
        hidden_sizes: channels that leave each stage, in place of the rule.
        depths: blocks per stage; goes with hidden_sizes.
        bottleneck_multiplier: channels of a 3x3 per channel of its stage. timm: `bottle_ratio`.
        se_ratio: hidden channels of a squeeze and excitation, per channel that enters its block;
            None for 0.25 in layers "y" and none in "x".
        num_classes: outputs of the classifier; 0 for none, and pooled features come out.
        in_chans: channels of the image. transformers: `num_channels`.
        stem_width: channels that leave the stem. transformers: `embedding_size`.
        norm_layer: class, factory, "batchnorm2d", or None for batch norm.
        act_layer: class, factory, name, or None. torchvision: `activation`; transformers:
            `hidden_act`.
        se_act_layer: between the two layers of a squeeze and excitation; None for `act_layer`.
            transformers always has ReLU.
        preact: blocks that start with norm and activation and end in the add: timm's RegNetV.
        linear_out: no activation after the add of a block, one behind the last stage: timm's
            RegNetZ.
        downsample: shortcut of a block that changes the shape: "conv1x1", "avg" for a pool before
            that, or "" for no shortcut there.
        downsample_in_first_stage: stride 2 in the first stage as well.
        output_stride: 32, or 16 or 8 to trade the strides beyond it for dilation, as timm does.
        num_features: channels of a 1x1 behind the last stage; 0 for none.
        init: "torchvision", or "timm", where the weights of a 3x3 are larger by the root of the
            number of its groups and every bias is 0.
        zero_init_residual: let every residual branch start at 0, except where `preact` leaves no
            norm at its end. timm: `zero_init_last`.
        drop_path_rate: stochastic depth of the last block; the others' rises linearly from 0.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" with num_classes=0.
        drop_rate: dropout before the classifier.
    """

    layer_type: str = "y"
    depth: int = 22
    w_0: int = 96
    w_a: float = 31.41
    w_m: float = 2.24
    group_width: int = 64
    group_min_ratio: float = 0.0
    hidden_sizes: Sequence[int] | None = None
    depths: Sequence[int] | None = None
    bottleneck_multiplier: float = 1.0
    se_ratio: float | None = None
    num_classes: int = 1000
    in_chans: int = 3
    stem_width: int = 32
    norm_layer: str | NormLayer | None = None
    act_layer: ActLayer = nn.ReLU
    se_act_layer: ActLayer = None
    preact: bool = False
    linear_out: bool = False
    downsample: str = "conv1x1"
    downsample_in_first_stage: bool = True
    output_stride: int = 32
    num_features: int = 0
    init: str = "torchvision"
    zero_init_residual: bool = False
    drop_path_rate: float = 0.0
    global_pool: str = "avg"
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden_sizes", "depths"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        self._check()

    def _check(self) -> None:
        require = requirement(self)
        for name in ("in_chans", "stem_width", "group_width"):
            require(getattr(self, name) >= 1, name, f"{name} must be at least 1")
        for name in ("num_classes", "num_features"):
            require(getattr(self, name) >= 0, name, f"{name} must be 0 (none) or more")
        for name in ("drop_rate", "drop_path_rate", "group_min_ratio"):
            require(0 <= getattr(self, name) <= 1, name, f"{name} must lie in [0, 1]")
        require(self.layer_type in ("x", "y"), "layer_type", "layer_type must be 'x' or 'y'")
        require(
            (self.layer_type == "y") == (self.squeeze_ratio > 0),
            "layer_type se_ratio",
            "a layer 'y' has a squeeze and excitation with a positive se_ratio, a layer 'x' has "
            "none; change the layer_type with it",
        )
        require(
            self.depth >= 1 and self.w_0 >= 8 and self.w_0 % 8 == 0,
            "depth w_0",
            "depth must be at least 1 and w_0 a positive multiple of 8",
        )
        require(
            self.w_a >= 0 and self.w_m > 1, "w_a w_m", "w_a must be 0 or more and w_m more than 1"
        )
        require(self.bottleneck_multiplier > 0, "bottleneck_multiplier", "it must be positive")
        sizes, depths = self.hidden_sizes, self.depths
        require(
            (sizes is None) == (depths is None) and len(sizes or ()) == len(depths or ()),
            "hidden_sizes depths",
            "hidden_sizes and depths must both be given, one entry of each per stage, or neither",
        )
        require(
            sizes is None or (len(sizes) > 0 and min(*sizes, *(depths or ())) > 0),
            "hidden_sizes depths",
            "hidden_sizes and depths must hold numbers of at least 1",
        )
        widths = [self.bottleneck_width(channels) for channels in self.channels]
        require(
            min(widths) > 0 and all(width % self.groups(width) == 0 for width in widths),
            "hidden_sizes group_width bottleneck_multiplier",
            f"each stage's 3x3 has {widths} channels, which must divide into width // group_width "
            "groups; change one",
        )
        require(
            not self.squeeze_ratio
            or all(self.squeezed(block.in_channels) for stage in self.stages() for block in stage),
            "se_ratio stem_width hidden_sizes",
            "se_ratio must leave every squeeze and excitation a hidden channel",
        )
        require(
            self.downsample in ("conv1x1", "avg", ""),
            "downsample",
            "downsample must be 'conv1x1', 'avg' or ''",
        )
        require(
            self.output_stride in (8, 16, 32), "output_stride", "output_stride must be 8, 16 or 32"
        )
        require(
            self.init in ("torchvision", "timm"), "init", "init must be 'torchvision' or 'timm'"
        )

    @property
    def squeeze_ratio(self) -> float:
        """Hidden channels of a squeeze and excitation per channel of a block; 0 for none."""
        if self.se_ratio is not None:
            return self.se_ratio
        return 0.25 if self.layer_type == "y" else 0.0

    @property
    def stem_channels(self) -> int:
        """Channels that leave the stem."""
        return self.stem_width

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels that leave each stage."""
        return tuple(channels for channels, _ in self._sizes())

    def bottleneck_width(self, out_channels: int) -> int:
        """Return the channels of the 3x3 of a block."""
        return round(out_channels * self.bottleneck_multiplier)

    def groups(self, width: int) -> int:
        """Return the groups of a 3x3 of `width` channels."""
        return max(1, width // self.group_width)

    def squeezed(self, in_channels: int) -> int:
        """Return the hidden channels of the squeeze and excitation of a block these enter."""
        return round(in_channels * self.squeeze_ratio)

    def _sizes(self) -> list[tuple[int, int]]:
        """Return the channels and the number of blocks of every stage."""
        if self.hidden_sizes is not None and self.depths is not None:
            return list(zip(self.hidden_sizes, self.depths, strict=True))
        widths: Counter[int] = Counter()
        for block in range(self.depth):
            step = round(math.log(1 + block * self.w_a / self.w_0) / math.log(self.w_m))
            widths[8 * round(self.w_0 * self.w_m**step / 8)] += 1
        return [(self._whole_groups(width), depth) for width, depth in widths.items()]

    def _whole_groups(self, channels: int) -> int:
        """Return the channels nearest to these whose 3x3 has groups of equal width."""
        width = int(channels * self.bottleneck_multiplier)
        group = max(1, min(self.group_width, width))
        if self.group_min_ratio:
            whole = (2 * width + group) // (2 * group) * group
            if whole < self.group_min_ratio * width:
                whole += group
        else:
            whole = round(width / group) * group
        return int(whole / self.bottleneck_multiplier)

    def stages(self) -> list[list[Block]]:
        """Return the blocks of every stage, with every trade of stride for dilation made."""
        sizes = self._sizes()
        last, built = max(1, sum(depth for _, depth in sizes) - 1), 0
        stages: list[list[Block]] = []
        in_channels, reduction, dilation = self.stem_channels, 2, 1
        for i, (channels, depth) in enumerate(sizes):
            stride = 2 if i > 0 or self.downsample_in_first_stage else 1
            first_dilation = dilation
            if reduction >= self.output_stride:
                dilation, stride = dilation * stride, 1
            rates = [self.drop_path_rate * block / last for block in range(built, built + depth)]
            first = Block(in_channels, channels, stride, first_dilation, rates[0])
            others = [Block(channels, channels, 1, dilation, rate) for rate in rates[1:]]
            stages.append([first, *others])
            in_channels, reduction, built = channels, reduction * stride, built + depth
        return stages


SYNONYMS = {
    "w0": "w_0",
    "wa": "w_a",
    "wm": "w_m",
    "group_size": "group_width",
    "groups_width": "group_width",
    "bottle_ratio": "bottleneck_multiplier",
    "embedding_size": "stem_width",
    "activation": "act_layer",
    "hidden_act": "act_layer",
    "zero_init_last": "zero_init_residual",
}


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 16, channels)


_X = {
    "002": RegNetConfig("x", 13, 24, 36.44, 2.49, 8),
    "004": RegNetConfig("x", 22, 24, 24.48, 2.54, 16),
    "006": RegNetConfig("x", 16, 48, 36.97, 2.24, 24),
    "008": RegNetConfig("x", 16, 56, 35.73, 2.28, 16),
    "016": RegNetConfig("x", 18, 80, 34.01, 2.25, 24),
    "032": RegNetConfig("x", 25, 88, 26.31, 2.25, 48),
    "040": RegNetConfig("x", 23, 96, 38.65, 2.43, 40),
    "064": RegNetConfig("x", 17, 184, 60.83, 2.07, 56),
    "080": RegNetConfig("x", 23, 80, 49.56, 2.88, 120),
    "120": RegNetConfig("x", 19, 168, 73.36, 2.37, 112),
    "160": RegNetConfig("x", 22, 216, 55.59, 2.1, 128),
    "320": RegNetConfig("x", 23, 320, 69.86, 2.0, 168),
}
_Y = {
    "002": RegNetConfig("y", 13, 24, 36.44, 2.49, 8),
    "004": RegNetConfig("y", 16, 48, 27.89, 2.09, 8),
    "006": RegNetConfig("y", 15, 48, 32.54, 2.32, 16),
    "008": RegNetConfig("y", 14, 56, 38.84, 2.4, 16),
    "016": RegNetConfig("y", 27, 48, 20.71, 2.65, 24),
    "032": RegNetConfig("y", 21, 80, 42.63, 2.66, 24),
    "040": RegNetConfig("y", 22, 96, 31.41, 2.24, 64),
    "064": RegNetConfig("y", 25, 112, 33.22, 2.27, 72),
    "080": RegNetConfig("y", 17, 192, 76.82, 2.19, 56),
    "120": RegNetConfig("y", 19, 168, 73.36, 2.37, 112),
    "160": RegNetConfig("y", 18, 200, 106.23, 2.48, 112),
    "320": RegNetConfig("y", 20, 232, 115.89, 2.53, 232),
    "640": RegNetConfig("y", 20, 352, 147.48, 2.4, 328),
    "1280": RegNetConfig("y", 27, 456, 160.83, 2.52, 264),
    "2560": RegNetConfig("y", 27, 640, 230.83, 2.53, 373),
}
_TORCHVISION = {
    "regnet_x_400mf": _X["004"],
    "regnet_x_800mf": _X["008"],
    "regnet_x_1_6gf": _X["016"],
    "regnet_x_3_2gf": _X["032"],
    "regnet_x_8gf": _X["080"],
    "regnet_x_16gf": _X["160"],
    "regnet_x_32gf": _X["320"],
    "regnet_y_400mf": _Y["004"],
    "regnet_y_800mf": _Y["008"],
    "regnet_y_1_6gf": _Y["016"],
    "regnet_y_3_2gf": _Y["032"],
    "regnet_y_8gf": _Y["080"],
    "regnet_y_16gf": _Y["160"],
    "regnet_y_32gf": _Y["320"],
    "regnet_y_128gf": _Y["1280"],
}
_V: dict[str, Any] = {"preact": True, "act_layer": "silu"}
_Z = RegNetConfig(
    *("y", 28, 48, 14.5, 2.226, 8),
    bottleneck_multiplier=4.0,
    downsample="",
    linear_out=True,
    act_layer="silu",
)
_TIMM = {
    **{f"regnetx_{size}": config for size, config in _X.items()},
    **{f"regnety_{size}": config for size, config in _Y.items()},
    "regnetx_004_tv": replace(_X["004"], group_min_ratio=0.9),
    "regnety_008_tv": replace(_Y["008"], group_min_ratio=0.9),
    "regnety_080_tv": replace(_Y["080"], group_min_ratio=0.9),
    "regnety_040_sgn": replace(_Y["040"], norm_layer=_group_norm, act_layer="silu"),
    "regnetv_040": replace(_Y["040"], **_V),
    "regnetv_064": replace(_Y["064"], downsample="avg", **_V),
    "regnetz_005": replace(
        _Z, depth=21, w_0=16, w_a=10.7, w_m=2.51, group_width=4, num_features=1024
    ),
    "regnetz_040": _Z,
    "regnetz_040_h": replace(_Z, num_features=1536),
}

CONFIGS = {
    **{name: replace(config, group_min_ratio=0.9) for name, config in _TORCHVISION.items()},
    **{
        name: replace(config, init="timm", zero_init_residual=True)
        for name, config in _TIMM.items()
    },
}
