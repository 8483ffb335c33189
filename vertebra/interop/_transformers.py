"""Recipes for the backbones of transformers: the same sums, in as few ops as there can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..kernels import drop_path_add
from ..nn import (
    ConvNorms,
    DropPath,
    Excitation,
    GlobalResponseNorm,
    LayerNorm2d,
    Unit,
    conv_norm_act,
    ends_in_pool,
    run_into_pool,
)
from ..nn._act import fusible_act, has_hooks
from ..nn._drop import is_idle
from ..nn.fused import is_fused
from ..nn.fused_blocks import Recorded
from ..nn.mlp import MlpNames, mlp_add, takes_add
from ..nn.norm_act import FrozenBatchNorm2d
from ..nn.squeeze_excite import excite
from ._layered import Layered, in_row, unit_of
from ._swap import Refuses, Repeats, accelerates, reading

R = TypeVar("R", bound=type)


def _accelerates(
    forward: str,
    *classes: str,
    refuses: Refuses = lambda module: None,
    for_fused: bool = False,
) -> Callable[[R], R]:
    """Make a class the recipe for `classes` of transformers' models, which all read as `forward`.

    Models do not share code there: each has a copy of what it takes from another.
    """

    def register(mixin: R) -> R:
        for name in classes:
            path = f"transformers.models.{name}"
            accelerates(path, refuses, for_fused=for_fused, forward=forward)(mixin)
        return mixin

    return register


# convolution, norm and activation


class _ConvNormAct(nn.Module):
    """What both recipes for such a layer have in common: by this a block knows its layers."""

    CONV_NORMS: ClassVar[ConvNorms] = (("convolution", "normalization"),)
    convolution: nn.Module
    normalization: nn.Module
    activation: nn.Module

    def unit(self) -> Unit:
        return Unit(self.convolution, self.normalization, self.activation)


@_accelerates(
    "53a99e305dfb 918652d84890",  # the argument is called input before 5.9
    "resnet.modeling_resnet.ResNetConvLayer",
    "rt_detr.modeling_rt_detr_resnet.RTDetrResNetConvLayer",
)
class _ResNetConvLayer(_ConvNormAct):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return conv_norm_act(self.convolution, self.normalization, hidden_states, self.activation)


@_accelerates("4014b6c0d9ea", "regnet.modeling_regnet.RegNetConvLayer")
class _RegNetConvLayer(_ConvNormAct):
    def forward(self, hidden_state: Tensor) -> Tensor:
        return conv_norm_act(self.convolution, self.normalization, hidden_state, self.activation)


@_accelerates(
    "f7d896189d89",
    "resnet.modeling_resnet.ResNetShortCut",
    "rt_detr.modeling_rt_detr_resnet.RTDetrResNetShortCut",
    "regnet.modeling_regnet.RegNetShortCut",
)
class _ShortCut:
    CONV_NORMS: ClassVar[ConvNorms] = (("convolution", "normalization"),)
    convolution: nn.Module
    normalization: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return conv_norm_act(self.convolution, self.normalization, input)


def _split(layers: nn.Module) -> tuple[list[nn.Module], _ConvNormAct] | None:
    """Return all of `layers` but the last, and the last if what follows may be run with its norm.

    It may not where somebody watches the last, or all of them, which are a sequence or one alone.
    """
    others: list[nn.Module] = []
    last = layers
    if type(layers) is nn.Sequential and not has_hooks(layers):
        *others, last = layers
    return (others, last) if isinstance(last, _ConvNormAct) and not has_hooks(last) else None


@_accelerates(
    "70e202b1b682",
    "resnet.modeling_resnet.ResNetEmbeddings",
    "rt_detr.modeling_rt_detr_resnet.RTDetrResNetEmbeddings",
)
class _Stem(nn.Module):
    num_channels: int
    embedder: nn.Module
    pooler: nn.Module

    def forward(self, pixel_values: Tensor) -> Tensor:
        split = _split(self.embedder)
        is_wrong = pixel_values.shape[1] != self.num_channels  # of which transformers has an error
        if is_wrong or split is None:
            return super().forward(pixel_values)
        others, last = split
        x = pixel_values
        for module in others:
            x = module(x)
        conv, norm = last.convolution, last.normalization
        return conv_norm_act(conv, norm, x, last.activation, pool=self.pooler)


@_accelerates(
    "beb269e3f7a1",
    "resnet.modeling_resnet.ResNetBasicLayer",
    "resnet.modeling_resnet.ResNetBottleNeckLayer",
    "rt_detr.modeling_rt_detr_resnet.RTDetrResNetBasicLayer",
    "rt_detr.modeling_rt_detr_resnet.RTDetrResNetBottleNeckLayer",
    "regnet.modeling_regnet.RegNetXLayer",
    "regnet.modeling_regnet.RegNetYLayer",
)
class _ResidualLayer(Layered):
    layer: nn.Module
    shortcut: nn.Module
    activation: nn.Module

    def layers(self) -> list[nn.Module]:
        return in_row(self.layer)

    def last_unit(self) -> Unit | None:
        *_, last = self.layers() or [None]
        unit = unit_of(last) if isinstance(last, _ConvNormAct) else None
        if unit is None or unit.act is None or fusible_act(unit.act) != "none":
            return None
        return unit._replace(act=self.activation)

    def shortcut_of(self, x: Tensor) -> Tensor:
        return self.shortcut(x)

    def forward(self, hidden_state: Tensor, pool: nn.Module | None = None) -> Tensor:
        return super().forward(hidden_state, pool)


def _is_excitation(module: Any) -> str | None:
    return None if len(module.attention) == 4 else "its attention is not of four modules"


@_accelerates("7b2f174673ae", "regnet.modeling_regnet.RegNetSELayer", refuses=_is_excitation)
class _RegNetSELayer(nn.Module):
    pooler: nn.Module
    attention: nn.Sequential

    def excitation(self) -> Excitation | None:
        if has_hooks(self.pooler) or has_hooks(self.attention):
            return None
        return Excitation(*self.attention)

    def forward(self, hidden_state: Tensor) -> Tensor:
        layers = self.excitation()
        if layers is None:
            return super().forward(hidden_state)
        return excite(hidden_state, *layers)


@_accelerates(
    "727f7749cfb3 077f5a6f4d8b",
    "resnet.modeling_resnet.ResNetStage",
    "rt_detr.modeling_rt_detr_resnet.RTDetrResNetStage",
    "regnet.modeling_regnet.RegNetStage",
    for_fused=True,
)
class _Stage(nn.Module):
    """Calls its layers as one, which may run them by pairs, where transformers may call each."""

    layers: nn.Sequential

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if has_hooks(self.layers) else self.layers(input)


def _has_other_backbone(model: Any) -> str | None:
    """Refuse a backbone, or an encoder in it, whose code is not what the head's recipe skips."""
    backbone = getattr(model, model.base_model_prefix)
    models = "bcbe6aeda2dd a5cb065eb1a3 8b3f61b5e91c"
    for module, known in ((backbone, models), (backbone.encoder, "aed9edfadf1e")):
        if reading(type(module).forward) not in known.split():
            return f"its {type(module).__name__} is not the one this version was written for"
    return None


@_accelerates(
    # what differs between versions is the loss, and how the config is asked
    "014250f37a5c 451e0db8032c e13e1ad6a54e f5b2a6e0a2a3 "
    "36e388ea2568 cf4aafec67e8 b482040ad113 9bbe520d193b",
    "resnet.modeling_resnet.ResNetForImageClassification",
    "regnet.modeling_regnet.RegNetForImageClassification",
    refuses=_has_other_backbone,
    for_fused=True,
)
class _ForImageClassification(nn.Module):
    """Asks the last convolution for the means of its map, where nobody asks for the map."""

    config: Any
    base_model_prefix: str
    classifier: nn.Module

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        backbone: Any = getattr(self, self.base_model_prefix)
        *stages, last = backbone.encoder.stages
        states, as_dict = output_hidden_states, return_dict
        states = self.config.output_hidden_states if states is None else states
        as_dict = self.config.return_dict if as_dict is None else as_dict
        if (
            (pixel_values is None or labels is not None or states or not as_dict)
            or any(map(has_hooks, (backbone, backbone.encoder, last)))
            or not isinstance(last, _Stage)
            or not ends_in_pool(last.layers, backbone.pooler, pixel_values)
        ):
            own: Any = super()
            return own.forward(pixel_values, labels, output_hidden_states, return_dict, **kwargs)
        from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

        x = backbone.embedder(pixel_values)
        for stage in stages:
            x = stage(x)
        logits = self.classifier(run_into_pool(last.layers, backbone.pooler, x))

        return ImageClassifierOutputWithNoAttention(logits=logits)


@_accelerates(
    "359def3efc50",
    "conditional_detr.modeling_conditional_detr.ConditionalDetrFrozenBatchNorm2d",
    "d_fine.modeling_d_fine.DFineFrozenBatchNorm2d",
    "dab_detr.modeling_dab_detr.DabDetrFrozenBatchNorm2d",
    "deformable_detr.modeling_deformable_detr.DeformableDetrFrozenBatchNorm2d",
    "deimv2.modeling_deimv2.Deimv2FrozenBatchNorm2d",
    "detr.modeling_detr.DetrFrozenBatchNorm2d",
    "grounding_dino.modeling_grounding_dino.GroundingDinoFrozenBatchNorm2d",
    "mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoFrozenBatchNorm2d",
    "pp_doclayout_v2.modeling_pp_doclayout_v2.PPDocLayoutV2FrozenBatchNorm2d",
    "pp_doclayout_v3.modeling_pp_doclayout_v3.PPDocLayoutV3FrozenBatchNorm2d",
    "pp_doclayout_v4.modeling_pp_doclayout_v4.PPDocLayoutV4FrozenBatchNorm2d",
    "rt_detr.modeling_rt_detr.RTDetrFrozenBatchNorm2d",
    "rt_detr_v2.modeling_rt_detr_v2.RTDetrV2FrozenBatchNorm2d",
    "table_transformer.modeling_table_transformer.TableTransformerFrozenBatchNorm2d",
)
class _FrozenBatchNorm2d:
    eps = 1e-5
    forward = FrozenBatchNorm2d.forward


# ConvNeXt


def _is_over_channels(module: Any) -> str | None:
    if len(module.normalized_shape) == 1:
        return None
    return f"it normalises over {len(module.normalized_shape)} dimensions, and not the channels"


@_accelerates(
    "29d98ecac364",
    "convnext.modeling_convnext.ConvNextLayerNorm",
    "convnextv2.modeling_convnextv2.ConvNextV2LayerNorm",
    "dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextLayerNorm",
    refuses=_is_over_channels,
)
class _LayerNorm(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        own: Any = self
        return (
            LayerNorm2d.forward(own, features) if features.dim() == 4 else super().forward(features)
        )


@_accelerates(
    "b14c4ab7792c ed04dccf81b4",  # a function does it before 5.9
    "convnext.modeling_convnext.ConvNextDropPath",
    "convnextv2.modeling_convnextv2.ConvNextV2DropPath",
    "dinov3_convnext.modeling_dinov3_convnext.Dinov3ConvnextDropPath",
)
class _DropPath(nn.Module):
    drop_prob: float
    scale_by_keep = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        own: Any = self
        return DropPath.forward(own, hidden_states)


def _is_passed(drop: nn.Module) -> bool:
    """Return whether `drop` returns what it is given, and nobody watches it."""
    if isinstance(drop, _DropPath) and not has_hooks(drop):
        return not (drop.training and drop.drop_prob)
    return is_idle(drop)


@accelerates("transformers.activations.GELUActivation", for_fused=True, forward="9840a4c5ac1b")
class _GELUActivation(Repeats):
    """Transformers may still have a kernel of the hub replace it, by `forward` on the instance."""

    act: Any


_GELU = nn.GELU()


def _as_torchs(act: nn.Module) -> nn.Module:
    """Return torch's GELU in place of transformers' that computes it, if nobody watches it."""
    is_same = isinstance(act, _GELUActivation) and act.act is nn.functional.gelu
    return _GELU if is_same and not has_hooks(act) else act


def _layer(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module,
    fc1: nn.Module,
    act: nn.Module,
    grn: nn.Module | None,
    fc2: nn.Module,
    gamma: Tensor | None,
    drop: nn.Module,
) -> Tensor:
    """Return `x + drop(gamma * fc2(grn(act(fc1(norm(conv(x)))))))`; x is of (N, C, H, W)."""
    if is_fused(fc2) and _is_passed(drop) and takes_add(fc2, gamma, None):
        rows, act = x.permute(0, 2, 3, 1), _as_torchs(act)
        # without a name here, what is normalised is freed as soon as fc1 has read it
        y = mlp_add(norm(conv(x).permute(0, 2, 3, 1)), rows, fc1, act, grn, fc2)
        return y.permute(0, 3, 1, 2)
    y = act(fc1(norm(conv(x).permute(0, 2, 3, 1))))
    y = fc2(y if grn is None else grn(y)).permute(0, 3, 1, 2)
    if _is_passed(drop):
        return drop_path_add(y, x, gamma)
    if isinstance(drop, _DropPath) and not has_hooks(drop):
        return drop_path_add(y, x, gamma, drop_prob=drop.drop_prob)
    return x + drop(y if gamma is None else drop_path_add(y, gamma=gamma))


@_accelerates("8832212f4b03", "convnext.modeling_convnext.ConvNextLayer")
class _ConvNextLayer:
    MLP: ClassVar[MlpNames] = MlpNames("pwconv1", "pwconv2", "layer_scale_parameter")
    dwconv: nn.Module
    layernorm: nn.Module
    pwconv1: nn.Module
    act: nn.Module
    pwconv2: nn.Module
    layer_scale_parameter: Tensor | None
    drop_path: nn.Module

    def forward(self, features: Tensor) -> Tensor:
        layers = (self.dwconv, self.layernorm, self.pwconv1, self.act, None, self.pwconv2)
        return _layer(features, *layers, self.layer_scale_parameter, self.drop_path)


@_accelerates("85f4d7d3b45e", "dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextLayer")
class _DINOv3ConvNextLayer:
    MLP: ClassVar[MlpNames] = MlpNames("pointwise_conv1", "pointwise_conv2", "gamma")
    depthwise_conv: nn.Module
    layer_norm: nn.Module
    pointwise_conv1: nn.Module
    activation_fn: nn.Module
    pointwise_conv2: nn.Module
    gamma: Tensor
    drop_path: nn.Module

    def forward(self, features: Tensor) -> Tensor:
        mlp = (self.pointwise_conv1, self.activation_fn, None, self.pointwise_conv2)
        layers = (self.depthwise_conv, self.layer_norm, *mlp)
        return _layer(features, *layers, self.gamma, self.drop_path)


@_accelerates("7a165115968a", "convnextv2.modeling_convnextv2.ConvNextV2Layer")
class _ConvNextV2Layer:
    MLP: ClassVar[MlpNames] = MlpNames("pwconv1", "pwconv2")
    dwconv: nn.Module
    layernorm: nn.Module
    pwconv1: nn.Module
    act: nn.Module
    grn: nn.Module
    pwconv2: nn.Module
    drop_path: nn.Module

    def forward(self, features: Tensor) -> Tensor:
        layers = (self.dwconv, self.layernorm, self.pwconv1, self.act, self.grn, self.pwconv2)
        return _layer(features, *layers, None, self.drop_path)


@_accelerates(
    "000dc6217e02",
    "convnext.modeling_convnext.ConvNextStage",
    "convnextv2.modeling_convnextv2.ConvNextV2Stage",
    for_fused=True,
)
class _ConvNextStage(Recorded):
    pass


@_accelerates(
    "9d768988784f 11c4feb42407",
    "dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextStage",
    for_fused=True,
)
class _DINOv3ConvNextStage(Recorded):
    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(features)  # no layer is given more


@_accelerates("3f41201c492d", "convnextv2.modeling_convnextv2.ConvNextV2GRN")
class _GRN:
    eps, channels_last = 1e-6, True

    def forward(self, hidden_states: Tensor) -> Tensor:
        own: Any = self
        return GlobalResponseNorm.forward(own, hidden_states)
