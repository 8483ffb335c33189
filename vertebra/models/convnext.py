"""ConvNeXt and ConvNeXt V2, with the options of torchvision, timm and transformers.

    stem (stride 4) -> four stages of residual blocks, stride 2 before all but the first
        -> mean -> norm -> fc

    block   x + drop_path(gamma * fc2(grn(gelu(fc1(norm(conv_dw(x)))))))

V2 has the GRN in its MLPs, V1 the gamma. Keys, order of construction, initialisation and arithmetic
are timm's: a checkpoint gives the same numbers here and there, a seed the same weights. The norms,
the GRN, the end of a block and the pooling with its norm run as one op each.

Liu et al. 2022 (arXiv:2201.03545); V2: Woo et al. 2023 (arXiv:2301.00808).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import (
    CheckpointSequential,
    DropPathAdd,
    GlobalAvgPool2d,
    GlobalResponseNorm,
    LayerNorm2d,
    MlpNames,
    RmsNorm2d,
    SimpleNorm2d,
    create_act,
    create_conv2d,
    create_global_pool,
    is_fused,
    mlp_add,
    pooled_channels,
    takes_add,
)
from ..nn.fused_blocks import Recorded
from ._convnext_config import CONFIGS, SYNONYMS, ConvNeXtConfig, Stage
from ._features import feature
from ._network import Network
from ._param_groups import WITH_PREVIOUS, Matcher
from ._registry import list_models, override, register_model
from ._weights import Source, load_weights

_NORMS: dict[str, type[nn.Module]] = {
    "layernorm": LayerNorm2d,
    "rmsnorm": RmsNorm2d,
    "simplenorm": SimpleNorm2d,
}


def _norm(
    config: ConvNeXtConfig,
    channels: int,
    eps: float | None = None,
    data_format: str = "channels_first",
) -> nn.Module:
    layer = config.norm_layer or "layernorm2d"
    if not isinstance(layer, str):
        return layer(channels)
    name = layer.lower().removesuffix("2d")
    if name not in _NORMS:
        raise ValueError(
            f"norm_layer must be one of {', '.join(f'{name}2d' for name in _NORMS)}, or a class or "
            f"factory, and conv_mlp=True beside it; got {layer!r}"
        )
    return _NORMS[name](channels, eps or config.norm_eps or 1e-6, data_format=data_format)


class Mlp(nn.Module):
    """`fc2(grn(act(fc1(x))))` of every pixel; V2's GRN, which V1 lacks, looks at all of them."""

    def __init__(self, config: ConvNeXtConfig, channels: int) -> None:
        super().__init__()
        hidden = int(config.mlp_ratio * channels)
        layer = partial(nn.Conv2d, kernel_size=1) if config.conv_mlp else nn.Linear
        self.fc1 = layer(channels, hidden)
        self.act = create_act(config.act_layer)
        self.grn = (
            GlobalResponseNorm(hidden, channels_last=not config.conv_mlp)
            if config.use_grn
            else nn.Identity()
        )
        self.fc2 = layer(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(self.act(self.fc1(x))))


class ConvNeXtBlock(nn.Module):
    """`x + drop_path(gamma * mlp(norm(conv_dw(x))))`, where gamma is left out if it is None.

    What linear layers return is channels_last in memory, and so then is what leaves the block.
    """

    MLP: ClassVar[MlpNames] = MlpNames("mlp.fc1", "mlp.fc2", "gamma")
    gamma: Tensor | None

    def __init__(
        self,
        config: ConvNeXtConfig,
        channels: int,
        kernel_size: int = 7,
        dilation: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv_mlp = config.conv_mlp
        self.conv_dw = create_conv2d(
            *(channels, channels, kernel_size),
            dilation=dilation,
            groups=channels,
            bias=config.conv_bias,
        )
        order = "channels_first" if config.conv_mlp else "channels_last"
        self.norm = _norm(config, channels, data_format=order)
        self.mlp = Mlp(config, channels)
        if config.ls_init_value is None:
            self.register_parameter("gamma", None)
        else:
            self.gamma = nn.Parameter(torch.full((channels,), float(config.ls_init_value)))
        self.drop_path = DropPathAdd(drop_prob=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if type(mlp) is Mlp and is_fused(mlp.fc2) and takes_add(mlp, self.gamma, self.drop_path):
            residual = x if self.conv_mlp else x.permute(0, 2, 3, 1)
            # without a name here, what is normalised is freed as soon as fc1 has read it
            y = mlp_add(self._normed(x), residual, mlp.fc1, mlp.act, mlp.grn, mlp.fc2)
            return y if self.conv_mlp else y.permute(0, 3, 1, 2)
        y = mlp(self._normed(x))
        return self.drop_path(y if self.conv_mlp else y.permute(0, 3, 1, 2), x, self.gamma)

    def _normed(self, x: Tensor) -> Tensor:
        """Return what the MLP reads, (N, H, W, C) if it has linear layers."""
        y = self.conv_dw(x)
        return self.norm(y if self.conv_mlp else y.permute(0, 2, 3, 1))


def _check_size(x: Tensor, stride: int, reduction: int) -> None:
    if min(x.shape[2:]) < stride:
        raise ValueError(
            f"this ConvNeXt takes images of {reduction} x {reduction} pixels and more; of a lesser "
            f"one a convolution of stride {stride} gets {x.shape[2]} x {x.shape[3]}; enlarge it"
        )


torch.fx.wrap("_check_size")  # a leaf: it looks at a shape, which a proxy does not have


class ConvNeXtStage(nn.Module):
    """A norm and a convolution that downsamples, where there is need of them, and the blocks."""

    def __init__(self, config: ConvNeXtConfig, stage: Stage) -> None:
        super().__init__()
        self.stride = stage.stride
        self.reduction = stage.reduction
        self.downsample = (
            nn.Sequential(
                _norm(config, stage.in_channels),
                create_conv2d(
                    *(stage.in_channels, stage.out_channels, 2 if stage.resamples else 1),
                    stride=stage.stride,
                    padding="same" if stage.dilation > 1 else "valid",
                    dilation=stage.first_dilation,
                    bias=config.conv_bias,
                ),
            )
            if stage.downsamples
            else nn.Identity()
        )
        self.blocks = CheckpointSequential(
            *(
                ConvNeXtBlock(config, stage.out_channels, stage.kernel_size, stage.dilation, rate)
                for rate in stage.drop_path_rates
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.stride, self.reduction)
        return self.blocks(self.downsample(x))


def _make_stem(config: ConvNeXtConfig) -> nn.Sequential:
    channels, bias = config.dims[0], config.conv_bias
    if config.stem_type == "patch":
        size = config.patch_size
        conv = create_conv2d(
            config.in_chans, channels, size, stride=size, padding="valid", bias=bias
        )
        return nn.Sequential(conv, _norm(config, channels))
    inner = config.tiered_channels if config.stem_type == "overlap_tiered" else channels
    layers: list[nn.Module] = [
        create_conv2d(config.in_chans, inner, 3, stride=2, bias=bias),
        create_conv2d(inner, channels, 3, stride=2, bias=bias),
        _norm(config, channels),
    ]
    if config.stem_type == "overlap_act":
        layers.insert(1, create_act(config.act_layer))
    return nn.Sequential(*layers)


class NormMlpClassifierHead(nn.Module):
    """`fc(dropout(pre_logits(norm(pool(x)))))`, under timm's keys.

    Args:
        config: of the network.
        norm: of what was pooled, or an identity.
    """

    def __init__(self, config: ConvNeXtConfig, norm: nn.Module) -> None:
        super().__init__()
        self.drop_rate = config.drop_rate
        self.norm = norm
        self.pre_logits: nn.Module = nn.Identity()
        if config.head_hidden_size is not None:
            fc = nn.Linear(config.dims[-1], config.head_hidden_size)
            self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=nn.GELU()))
        self.reset(config, config.dims[-1])

    def reset(self, config: ConvNeXtConfig, channels: int) -> None:
        """Put a new pooling and a new classifier in place of the present ones."""
        self.global_pool = create_global_pool(config.global_pool)
        self.pools = config.global_pool != ""
        pooled = pooled_channels(config.global_pool, channels)
        self.num_features = config.head_hidden_size or pooled
        has_classifier = config.num_classes > 0
        self.fc = (
            nn.Linear(self.num_features, config.num_classes) if has_classifier else nn.Identity()
        )

    def pool(self, x: Tensor) -> Tensor:
        """Return what is pooled and normalised, (N, C); without a pooling, (N, C, H, W)."""
        if isinstance(self.global_pool, GlobalAvgPool2d):
            x = self.global_pool(x, self.norm)
        else:
            x = self.norm(self.global_pool(x))
        return x.flatten(1) if self.pools else x

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pre_logits(self.pool(x))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)


class ConvNeXt(Recorded, Network):
    """The network that a `ConvNeXtConfig` describes.

    >>> model = ConvNeXt(ConvNeXtConfig(depths=(1, 1), dims=(8, 16), num_classes=5))
    >>> model(torch.randn(2, 3, 33, 47)).shape
    torch.Size([2, 5])
    """

    family = "convnext"
    stem_is_feature = False

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__(config)
        stages = config.stages()
        self.stem = _make_stem(config)
        self.stages = nn.Sequential(*(ConvNeXtStage(config, stage) for stage in stages))
        self.stage_names = tuple(f"stages.{i}" for i in range(len(stages)))
        self.feature_info = [
            feature(stage.out_channels, stage.reduction, name)
            for stage, name in zip(stages, self.stage_names, strict=True)
        ]
        norm, identity = _norm(config, self.num_features, config.head_norm_eps), nn.Identity()
        self.norm_pre = norm if config.head_norm_first else identity
        self.head = NormMlpClassifierHead(config, identity if config.head_norm_first else norm)
        self.head_hidden_size = self.head.num_features
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Draw from N(0, 0.02^2) cut off at 2, by the inverse of its distribution: timm's bits."""
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            weight = module.weight
            if not weight.is_meta:
                weight.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
            if name.startswith("head."):
                weight.mul_(self.config.head_init_scale)
            if module.bias is not None:
                module.bias.zero_()

    @property
    def stem_conv(self) -> nn.Module:
        return self.stem[0]

    def group_matcher(self, coarse: bool = False) -> Matcher:
        stage = r"^stages\.(\d+)"
        if coarse:
            return {"stem": r"^stem", "blocks": stage}
        return {
            "stem": r"^stem",
            "blocks": [
                (stage + r"\.downsample", (0,)),
                (stage + r"\.blocks\.(\d+)", None),
                (r"^norm_pre", WITH_PREVIOUS),
            ],
        }

    def forward_stem(self, x: Tensor) -> Tensor:
        if self.config.stem_type == "patch":
            _check_size(x, self.config.patch_size, self.feature_info[0]["reduction"])
        return self.stem(x)

    def forward_neck(self, x: Tensor) -> Tensor:
        return self.norm_pre(x)

    def make_feature_norm(self, channels: int) -> nn.Module:
        return _norm(self.config, channels)

    def drop_neck(self) -> None:
        self.norm_pre = nn.Identity()

    def forward_pool(self, x: Tensor) -> Tensor:
        """Return a feature map pooled and normalised, (N, C): transformers' pooler output."""
        return self.head.pool(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a feature map, or with `pre_logits` what the classifier reads."""
        return self.head(x, pre_logits)

    def drop_head(self) -> None:
        self.reset_classifier(0, "", reset_other=True)

    def get_classifier(self) -> nn.Module:
        """Return the classifier, `nn.Identity` where there is none."""
        return self.head.fc

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        """Put a new classifier in place of the present one; 0 for none.

        Args:
            num_classes: its outputs.
            global_pool: as in `ConvNeXtConfig`; None for what it is now.
            reset_other: drop the head's norm and its hidden layer as well.
        """
        config = replace(
            self.config,
            num_classes=num_classes,
            global_pool=self.config.global_pool if global_pool is None else global_pool,
            head_hidden_size=None if reset_other else self.config.head_hidden_size,
        )
        self.head.reset(config, self.num_features)
        if reset_other:
            self.head.norm, self.head.pre_logits = nn.Identity(), nn.Identity()
        self.config, self.num_classes = config, num_classes
        self.head_hidden_size = self.head.num_features
        like = next(self.parameters())
        self.head.to(like.device, like.dtype).train(self.training)


def _build(name: str, *, weights: Source | None = None, **overrides: Any) -> ConvNeXt:
    model = ConvNeXt(override(CONFIGS[name], overrides, SYNONYMS))
    if weights is not None:
        load_weights(model, weights)
    return model


@register_model
def convnext_tiny(*, weights: Source | None = None, **overrides: Any) -> ConvNeXt:
    """Build ConvNeXt-T; `overrides` are fields of `ConvNeXtConfig`."""
    return _build("convnext_tiny", weights=weights, **overrides)


@register_model
def convnext_small(*, weights: Source | None = None, **overrides: Any) -> ConvNeXt:
    """Build ConvNeXt-S; `overrides` are fields of `ConvNeXtConfig`."""
    return _build("convnext_small", weights=weights, **overrides)


@register_model
def convnext_base(*, weights: Source | None = None, **overrides: Any) -> ConvNeXt:
    """Build ConvNeXt-B; `overrides` are fields of `ConvNeXtConfig`."""
    return _build("convnext_base", weights=weights, **overrides)


@register_model
def convnext_large(*, weights: Source | None = None, **overrides: Any) -> ConvNeXt:
    """Build ConvNeXt-L; `overrides` are fields of `ConvNeXtConfig`."""
    return _build("convnext_large", weights=weights, **overrides)


for _name in CONFIGS.keys() - list_models():  # timm's, which have no function of their own
    register_model(partial(_build, _name), name=_name)
