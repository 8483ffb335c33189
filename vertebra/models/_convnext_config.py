"""What distinguishes one ConvNeXt from another, as plain data: the config and the variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..nn import ActLayer, NormLayer
from ._config import requirement


class Stage(NamedTuple):
    """What the blocks of one stage, and the downsampling before them, are built from."""

    in_channels: int
    out_channels: int
    depth: int
    kernel_size: int
    stride: int
    first_dilation: int  # of the downsampling
    dilation: int
    reduction: int  # of the image, where the stage ends
    drop_path_rates: tuple[float, ...]

    @property
    def downsamples(self) -> bool:
        """Whether the stage begins with a norm and a convolution."""
        return self.resamples or self.in_channels != self.out_channels

    @property
    def resamples(self) -> bool:
        """Whether that convolution has a stride, or the dilation that stands for one."""
        return self.stride > 1 or self.first_dilation != self.dilation


@dataclass(frozen=True)
class ConvNeXtConfig:
    """What a ConvNeXt is made from; the defaults make timm's and torchvision's ConvNeXt-T.

    One name per concept, timm's where it has one; `create_model` also takes `SYNONYMS`.

    Args:
        depths: blocks per stage.
        dims: channels of each stage. transformers: `hidden_sizes`.
        num_classes: outputs of the classifier; 0 for none, and normalised pooled features come out.
        in_chans: channels of the image. transformers: `num_channels`.
        kernel_sizes: of the depthwise convolutions, one number or one per stage; odd.
        mlp_ratio: channels inside a block's MLP, relative to those of the block.
        use_grn: a GlobalResponseNorm inside each MLP: ConvNeXt V2.
        ls_init_value: what each block's layer scale starts from; None for no layer scale.
            transformers: `layer_scale_init_value`, whose 0 means None; torchvision: `layer_scale`.
        stem_type: "patch" (one convolution, as large as its stride), "overlap" (two 3x3 of stride
            2), "overlap_tiered" (the first of them narrower) or "overlap_act" (with an activation).
        patch_size: kernel and stride of a patch stem.
        conv_mlp: 1x1 convolutions in an MLP, on (N, C, H, W), in place of linear layers on
            (N, H, W, C): the same function of the same weights, whose shapes differ.
        conv_bias: biases in the convolutions of stem, downsampling and blocks; MLPs have theirs.
        act_layer: class, factory, name, or None, in MLPs and "overlap_act". transformers:
            `hidden_act`.
        norm_layer: "layernorm2d", "rmsnorm2d", "simplenorm2d", None for the first of them, or a
            class or factory of norms on (N, C, H, W), which needs `conv_mlp`.
        norm_eps: of the norms that have a name; None for their default, 1e-6.
        head_norm_first: normalise the last feature map and then pool it, not the reverse.
        head_norm_eps: of the last norm; None for norm_eps. transformers: `layer_norm_eps`, 1e-12.
        head_hidden_size: channels of a hidden layer with GELU before the classifier; None for none.
        head_init_scale: factor on the initial weights of the head.
        output_stride: 32 and more, or 16 or 8 to trade the strides beyond it for dilation, as timm.
        downsample_in_first_stage: stride 2 in the first stage as well; None for that where the
            stem's stride is 2, as timm. transformers: False.
        global_pool: "avg", "max", "avgmax", "catavgmax" with head_norm_first, or "" with
            num_classes=0.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
            torchvision: `stochastic_depth_prob`, with a default of its own for each variant.
    """

    depths: Sequence[int] = (3, 3, 9, 3)
    dims: Sequence[int] = (96, 192, 384, 768)
    num_classes: int = 1000
    in_chans: int = 3
    kernel_sizes: int | Sequence[int] = 7
    mlp_ratio: float = 4
    use_grn: bool = False
    ls_init_value: float | None = 1e-6
    stem_type: str = "patch"
    patch_size: int = 4
    conv_mlp: bool = False
    conv_bias: bool = True
    act_layer: ActLayer = "gelu"
    norm_layer: str | NormLayer | None = None
    norm_eps: float | None = None
    head_norm_first: bool = False
    head_norm_eps: float | None = None
    head_hidden_size: int | None = None
    head_init_scale: float = 1.0
    output_stride: int = 32
    downsample_in_first_stage: bool | None = None
    global_pool: str = "avg"
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("depths", "dims", "kernel_sizes"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, int) else tuple(value))
        self._check()

    def _check(self) -> None:
        require = requirement(self)
        for name in ("in_chans", "patch_size"):
            require(getattr(self, name) >= 1, name, f"{name} must be at least 1")
        require(self.num_classes >= 0, "num_classes", "num_classes must be 0 (none) or more")
        for name in ("drop_rate", "drop_path_rate"):
            require(0 <= getattr(self, name) <= 1, name, f"{name} must lie in [0, 1]")
        for name in ("norm_eps", "head_norm_eps"):
            eps = getattr(self, name)
            require(eps is None or eps > 0, name, f"{name} must be positive, or None")
        require(
            len(self.depths) > 0 and min(self.depths) > 0,
            "depths",
            "depths must hold the number of blocks of each stage, all at least 1",
        )
        require(
            len(self.dims) == len(self.depths),
            "dims depths",
            "dims must have one entry per stage in depths",
        )
        require(
            isinstance(self.kernel_sizes, int) or len(self.kernel_sizes) == len(self.depths),
            "kernel_sizes depths",
            "kernel_sizes must be one number, or have one entry per stage in depths",
        )
        require(
            all(size % 2 == 1 for size in self._kernel_sizes),
            "kernel_sizes",
            "kernel_sizes must be odd",
        )
        require(
            min(self.dims) >= 1 and int(self.mlp_ratio * min(self.dims)) >= 1,
            "dims mlp_ratio",
            "dims, and mlp_ratio times dims, must be at least 1",
        )
        require(
            self.stem_type in ("patch", "overlap", "overlap_tiered", "overlap_act"),
            "stem_type",
            "stem_type must be 'patch', 'overlap', 'overlap_tiered' or 'overlap_act'",
        )
        named = self.norm_layer is None or isinstance(self.norm_layer, str)
        require(
            named or self.conv_mlp,
            "norm_layer conv_mlp",
            "a norm_layer without a name normalises (N, C, H, W); set conv_mlp=True",
        )
        require(
            named or (self.norm_eps is None and self.head_norm_eps is None),
            "norm_layer norm_eps head_norm_eps",
            "a norm_layer without a name has its own eps, as in functools.partial(norm, eps=1e-5)",
        )
        require(
            self.head_hidden_size is None or self.head_hidden_size >= 1,
            "head_hidden_size",
            "head_hidden_size must be at least 1, or None",
        )
        require(
            self.head_hidden_size is None or not self.head_norm_first,
            "head_hidden_size head_norm_first",
            "a head has head_hidden_size or head_norm_first, not both; give one of them",
        )
        require(
            self.global_pool != "" or (self.num_classes == 0 and self.head_hidden_size is None),
            "global_pool num_classes head_hidden_size",
            "a classifier reads pooled features; give a global_pool, or num_classes=0 and no "
            "head_hidden_size",
        )
        require(
            self.head_norm_first or not self.global_pool.endswith("catavgmax"),
            "global_pool head_norm_first",
            "catavgmax doubles the channels that the last norm reads; set head_norm_first=True, or "
            "choose another global_pool",
        )
        require(
            self.output_stride >= 8 and self.output_stride.bit_count() == 1,
            "output_stride",
            "output_stride must be a power of two, 8 or more",
        )

    @property
    def stem_channels(self) -> int:
        """Channels that leave the stem."""
        return self.dims[0]

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels that leave each stage."""
        return tuple(self.dims)

    @property
    def _kernel_sizes(self) -> tuple[int, ...]:
        if isinstance(self.kernel_sizes, int):
            return (self.kernel_sizes,) * len(self.depths)
        return tuple(self.kernel_sizes)

    @property
    def stem_stride(self) -> int:
        """Pixels of the image from one pixel of the stem's output to the next."""
        return self.patch_size if self.stem_type == "patch" else 4

    @property
    def tiered_channels(self) -> int:
        """Channels inside a tiered stem: half of those that leave it, near a multiple of 8."""
        half = self.dims[0] // 2
        channels = max(8, (half + 4) // 8 * 8)
        return channels if channels >= 0.9 * half else channels + 8

    def stages(self) -> list[Stage]:
        """Return the stages, with every trade of stride for dilation made."""
        rates = iter(_linspace(self.drop_path_rate, sum(self.depths)))
        first = self.downsample_in_first_stage
        if first is None:
            first = self.stem_stride == 2
        stages: list[Stage] = []
        in_channels, reduction, dilation = self.dims[0], self.stem_stride, 1
        each = zip(self.depths, self.dims, self._kernel_sizes, strict=True)
        for i, (depth, out_channels, kernel_size) in enumerate(each):
            stride = 2 if i > 0 or first else 1
            if stride > 1 and reduction >= self.output_stride:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            stages.append(
                Stage(
                    *(in_channels, out_channels, depth, kernel_size, stride),
                    first_dilation=1 if dilation <= 2 else 2,  # as in timm, at most 2
                    dilation=dilation,
                    reduction=reduction,
                    drop_path_rates=tuple(next(rates) for _ in range(depth)),
                )
            )
            in_channels = out_channels
        return stages


def _linspace(last: float, count: int) -> list[float]:
    return [last * (i / max(count - 1, 1)) for i in range(count)]


SYNONYMS = {
    "hidden_sizes": "dims",
    "hidden_act": "act_layer",
    "layer_norm_eps": "head_norm_eps",
    "layer_scale_init_value": "ls_init_value",
    "layer_scale": "ls_init_value",
    "stochastic_depth_prob": "drop_path_rate",
}


def _config(dim: int, depths: tuple[int, ...], **options: Any) -> ConvNeXtConfig:
    return ConvNeXtConfig(depths, tuple(dim << i for i in range(len(depths))), **options)


# timm's small models, whose MLPs are convolutions, and the sizes of the papers
_zepto = _config(32, (2, 2, 4, 2), conv_mlp=True, norm_layer="simplenorm2d")
_atto = _config(40, (2, 2, 6, 2), conv_mlp=True)
_femto = _config(48, (2, 2, 6, 2), conv_mlp=True)
_pico = _config(64, (2, 2, 6, 2), conv_mlp=True)
_nano = _config(80, (2, 2, 8, 2), conv_mlp=True)
_tiny = _config(96, (3, 3, 9, 3))
_small = _config(96, (3, 3, 27, 3))
_base = _config(128, (3, 3, 27, 3))
_large = _config(192, (3, 3, 27, 3))
_xlarge = _config(256, (3, 3, 27, 3))
_xxlarge = _config(384, (3, 4, 30, 3), norm_eps=1e-5)
_huge = _config(352, (3, 3, 27, 3))
_V2: dict[str, Any] = {"use_grn": True, "ls_init_value": None}

CONFIGS = {
    "convnext_zepto_rms": _zepto,
    "convnext_zepto_rms_ols": replace(_zepto, stem_type="overlap_act"),
    "convnext_atto": _atto,
    "convnext_atto_ols": replace(_atto, stem_type="overlap_tiered"),
    "convnext_atto_rms": replace(_atto, norm_layer="rmsnorm2d"),
    "convnext_femto": _femto,
    "convnext_femto_ols": replace(_femto, stem_type="overlap_tiered"),
    "convnext_pico": _pico,
    "convnext_pico_ols": replace(_pico, stem_type="overlap_tiered"),
    "convnext_nano": _nano,
    "convnext_nano_ols": replace(_nano, stem_type="overlap"),
    "convnext_tiny": _tiny,
    "convnext_tiny_hnf": replace(_tiny, head_norm_first=True, conv_mlp=True),
    "convnext_small": _small,
    "convnext_base": _base,
    "convnext_large": _large,
    "convnext_large_mlp": replace(_large, head_hidden_size=1536),
    "convnext_xlarge": _xlarge,
    "convnext_xxlarge": _xxlarge,
    "convnextv2_atto": replace(_atto, **_V2),
    "convnextv2_femto": replace(_femto, **_V2),
    "convnextv2_pico": replace(_pico, **_V2),
    "convnextv2_nano": replace(_nano, **_V2),
    "convnextv2_tiny": replace(_tiny, **_V2),
    "convnextv2_small": replace(_small, **_V2),
    "convnextv2_base": replace(_base, **_V2),
    "convnextv2_large": replace(_large, **_V2),
    "convnextv2_huge": replace(_huge, **_V2),
}
