"""Recipes for timm's modules: the same sums, in as few ops as there can be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, TypeGuard, cast

import torch
import torch.fx
from torch import Tensor, nn

from ..nn import (
    BatchNormAct2d,
    ConvNorms,
    DropBlock2d,
    DropPath,
    FrozenBatchNormAct2d,
    GlobalResponseNorm,
    LayerNorm2d,
    LayerScale2d,
    SqueezeExcite,
    Unit,
    conv_attn_act,
    conv_norm_act,
    ends_in_pool,
    run_into_pool,
    takes_pool,
)
from ..nn._act import fusible_act, has_hooks
from ..nn._drop import drop_add, is_idle
from ..nn.back_to_back import End, InParts, end_of
from ..nn.fused import Folded, is_fused
from ..nn.fused_blocks import Recorded
from ..nn.mlp import MlpNames, mlp_add, takes_add
from ..nn.norm_act import normalise
from ._children import collect, in_steps
from ._layered import Layered, unit_of
from ._swap import Repeats, accelerates, path_of

# layers: those that are ours under another name take our forward, by which our blocks know them


@accelerates("timm.layers.activations.Sigmoid", forward="1a4dacdf4d73")
class _Sigmoid:
    forward = nn.Sigmoid.forward


@accelerates("timm.layers.activations.GELU", forward="307d1e2db5a5")
class _GELU:
    approximate = "none"
    forward = nn.GELU.forward


@accelerates("timm.layers.norm_act.BatchNormAct2d", forward="e5416605abb8")
@accelerates("timm.layers.norm_act.FrozenBatchNormAct2d", forward="81d075486315")
class _NormAct:
    ENDS_IN_ACT = True
    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self, x, self.act, drop=self.drop)


@accelerates("timm.layers.drop.DropPath", forward="64def6f7ab6a")
class _DropPath:
    forward = DropPath.forward


@accelerates("timm.layers.drop.DropBlock2d", forward="77c4a67bbcc0")
class _DropBlock2d:
    forward = DropBlock2d.forward


@accelerates("timm.layers.layer_scale.LayerScale2d", forward="9db5098283c0")
class _LayerScale2d:
    forward = LayerScale2d.forward


@accelerates("timm.layers.squeeze_excite.SEModule", forward="3ecee0e9535d")
class _SEModule:
    forward = SqueezeExcite.forward
    excitation = SqueezeExcite.excitation


def _is_fast(module: Any) -> str | None:
    if getattr(module, "_fast_norm", False):
        return "timm's fast norm gives the dtype of autocast"
    return None


@accelerates("timm.layers.norm.LayerNorm2d", _is_fast, forward="39645cb64dce")
@accelerates("timm.layers.norm.LayerNorm2dFp32", forward="a4698192d5d7")
class _LayerNorm2d:
    data_format = "channels_first"
    forward = LayerNorm2d.forward


@accelerates("timm.layers.grn.GlobalResponseNorm", forward="288156d71701")
class _GlobalResponseNorm:
    channel_dim: int
    forward = GlobalResponseNorm.forward

    @property
    def channels_last(self) -> bool:
        return self.channel_dim != 1


def _is_bare(norm: Any) -> bool:
    """Return whether a norm that may end in an activation ends in none, and nobody watches it."""
    return (
        not has_hooks(norm)
        and isinstance(norm, _NormAct)
        and fusible_act(norm.act) == "none"
        and is_idle(norm.drop)
    )


@accelerates("timm.layers.conv_bn_act.ConvNormAct", forward="73d74540bb1c")
class _ConvNormAct:
    """Also takes what a block ends in: `act(drop(conv_norm(x)) + residual)`."""

    CONV_NORMS: ClassVar[ConvNorms] = (("conv", "bn"),)
    conv: nn.Module
    bn: nn.Module

    def unit(self) -> Unit | None:
        return None if getattr(self, "aa", None) is not None else Unit(self.conv, self.bn)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        act: nn.Module | None = None,
        drop: nn.Module | None = None,
    ) -> Tensor:
        aa = getattr(self, "aa", None)
        ends = isinstance(act, nn.Module)  # left out, it is None or the proxy of an argument
        if ends and aa is None and not isinstance(x, torch.fx.Proxy):
            if type(self.bn) is Folded:
                return conv_norm_act(self.conv, self.bn, x, act, residual, drop=drop)
            if _is_bare(self.bn):
                return normalise(self.bn, self.conv(x), act, residual, drop=drop)
        y = conv_norm_act(self.conv, self.bn, x)
        y = y if aa is None else aa(y)
        return act(drop_add(drop, y, residual)) if ends else y


# models


def _has_other_norms(module: Any) -> str | None:
    """Refuse norms of ours, which would keep the activation to themselves in any other block."""
    for name, child in module.named_modules():
        if isinstance(child, BatchNormAct2d | FrozenBatchNormAct2d):
            return f"its {name} already ends in an activation of its own"
    return None


def _end(x: Tensor, unit: Unit, se: nn.Module | None, shortcut: Tensor, pool: Any) -> Tensor:
    """Return what a block of a ResNet makes of the input of its last convolution."""
    conv, norm, act, drop = unit
    if se is None:
        return conv_norm_act(conv, norm, x, act, shortcut, pool, drop)
    assert act is not None
    return conv_attn_act(conv, norm, x, se, act, shortcut, drop)


@accelerates("timm.models.resnet.BasicBlock", _has_other_norms, forward="4651704b6f10")
class _BasicBlock:
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"), ("conv2", "bn2"))
    conv1: nn.Module
    bn1: nn.Module
    drop_block: nn.Module
    act1: nn.Module
    aa: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    act2: nn.Module
    se: nn.Module | None
    drop_path: nn.Module | None
    downsample: nn.Module | None

    def last_unit(self) -> Unit | None:
        return None if self.se is not None else self._unit()

    def _unit(self) -> Unit:
        return Unit(self.conv2, self.bn2, self.act2, self.drop_path)

    def forward(self, x: Tensor, pool: nn.Module | None = None) -> Tensor:
        y = conv_norm_act(self.conv1, self.bn1, x, self.act1, drop=self.drop_block)
        shortcut = x if self.downsample is None else self.downsample(x)
        return _end(self.aa(y), self._unit(), self.se, shortcut, pool)


@accelerates("timm.models.resnet.Bottleneck", _has_other_norms, forward="e8955400bbd3")
class _Bottleneck(InParts):
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    conv1: nn.Module
    bn1: nn.Module
    act1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    drop_block: nn.Module
    act2: nn.Module
    aa: nn.Module
    conv3: nn.Module
    bn3: nn.Module
    act3: nn.Module
    se: nn.Module | None
    drop_path: nn.Module | None
    downsample: nn.Module | None

    def narrow(self, x: Tensor) -> Tensor:
        return conv_norm_act(self.conv1, self.bn1, x, self.act1)

    def work(self, y: Tensor) -> Tensor:
        return self.aa(conv_norm_act(self.conv2, self.bn2, y, self.act2, drop=self.drop_block))

    def shortcut_of(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def widen(self, y: Tensor, shortcut: Tensor, pool: nn.Module | None = None) -> Tensor:
        return _end(y, self._unit(), self.se, shortcut, pool)

    def last_unit(self) -> Unit | None:
        return None if self.se is not None else self._unit()

    def _unit(self) -> Unit:
        return Unit(self.conv3, self.bn3, self.act3, self.drop_path)

    def narrow_end(self) -> End | None:
        return end_of(self.conv1, self.bn1, self.act1)

    def widen_end(self) -> End | None:
        unit = self.last_unit()
        return None if unit is None else end_of(*unit)

    def work_end(self) -> End | None:
        if not is_idle(self.aa):
            return None
        return end_of(self.conv2, self.bn2, self.act2, self.drop_block, side=3)


def _in_pairs(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Run the part of a stem that is a sequence, each norm of it with the activation behind."""
    for _, run in in_steps(((str(i), module) for i, module in enumerate(modules)), ()):
        x = run(x)
    return x


def _is_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity and not has_hooks(module)


def _is_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return type(module) is nn.Sequential and not has_hooks(module)


class _ResNetIntoPool(nn.Module):
    """A module as `Recorded` is: else the library's class would come before it."""

    conv1: nn.Module
    bn1: nn.Module
    act1: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    global_pool: nn.Module
    grad_checkpointing: bool
    forward_head: Any

    def forward(self, x: Tensor) -> Tensor:
        pool = _pool_of(self.global_pool)
        if pool is None or self.grad_checkpointing or not ends_in_pool(self.layer4, pool, x):
            return self.forward_head(self.forward_features(x))
        x = self.layer3(self.layer2(self.layer1(self._run_stem(x))))
        return self.forward_head(run_into_pool(self.layer4, pool, x))

    def _run_stem(self, x: Tensor) -> Tensor:
        conv, pool = self.conv1, self.maxpool
        if _is_sequence(conv):
            *others, conv = conv
            x = _in_pairs(others, x)
        if _is_sequence(pool):
            return _in_pairs(pool, conv_norm_act(conv, self.bn1, x, self.act1))
        return conv_norm_act(conv, self.bn1, x, self.act1, pool=pool)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self._run_stem(x)
        stages: Any = (self.layer1, self.layer2, self.layer3, self.layer4)
        if self.grad_checkpointing:
            from timm.models import checkpoint_seq

            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x


@accelerates(
    "timm.models.resnet.ResNet",
    _has_other_norms,
    forward="eff6df9c6f1b",
    forward_features="fc18b940d027",
    forward_head="055da7df2e26",
)
class _ResNet(Recorded, _ResNetIntoPool):
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"),)


@accelerates("timm.models.regnet.Bottleneck", forward="3f0bd82ca388")
class _RegNetBottleneck(Layered):
    conv1: nn.Module
    conv2: nn.Module
    se: nn.Module
    conv3: nn.Module
    act3: nn.Module
    downsample: nn.Module | None
    drop_path: nn.Module

    def layers(self) -> list[nn.Module]:
        layers = [self.conv1, self.conv2, self.se, self.conv3]
        return [layer for layer in layers if not (layer is self.se and _is_nothing(layer))]

    def last_unit(self) -> Unit | None:
        unit = unit_of(self.conv3) if isinstance(self.conv3, _ConvNormAct) else None
        if unit is None or type(unit.norm) is not Folded:
            return None
        drop = None if self.downsample is None else self.drop_path
        return unit._replace(act=self.act3, drop=drop)

    def shortcut_of(self, x: Tensor) -> Tensor | None:
        return None if self.downsample is None else self.downsample(x)

    def run_apart(self, x: Tensor) -> Tensor:
        y = self.se(self.conv2(self.conv1(x)))
        shortcut = self.shortcut_of(x)
        if shortcut is None:
            return self.act3(self.conv3(y))
        if isinstance(self.conv3, _ConvNormAct) and not has_hooks(self.conv3):
            return self.conv3(y, shortcut, self.act3, self.drop_path)
        return self.act3(drop_add(self.drop_path, self.conv3(y), shortcut))


@accelerates("timm.models.regnet.PreBottleneck", for_fused=True, forward="3289cce44952")
class _RegNetPreBottleneck:
    """RegNetV's: of its three norms the second comes right behind a convolution."""

    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "norm2"),)
    norm1: nn.Module
    conv1: nn.Module
    norm2: nn.Module
    conv2: nn.Module
    se: nn.Module
    norm3: nn.Module
    conv3: nn.Module
    downsample: nn.Module | None
    drop_path: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        y = self.se(self.conv2(conv_norm_act(self.conv1, self.norm2, x)))
        y = self.conv3(self.norm3(y))
        return y if self.downsample is None else drop_add(self.drop_path, y, self.downsample(x))


@accelerates("timm.models.regnet.RegStage", for_fused=True, forward="c51d3ecf6124")
class _RegStage:
    """Calls its blocks one after the other, as a sequence, which a fused one becomes."""

    RUNS_IN_ROW = True


class _RegNetIntoPool(nn.Module):
    """A module as `Recorded` is: else the library's class would come before it."""

    stem: nn.Module
    s1: nn.Module
    s2: nn.Module
    s3: nn.Module
    s4: nn.Module
    final_conv: nn.Module
    head: nn.Module
    forward_features: Any
    forward_head: Any

    def forward(self, x: Tensor) -> Tensor:
        pool, neck = _pool_of(self.head), self.final_conv
        unit = unit_of(neck) if isinstance(neck, _ConvNormAct) else None
        if pool is not None and takes_pool(unit, pool, x):
            conv, norm, act, _ = cast("Unit", unit)
            x = self.s4(self.s3(self.s2(self.s1(self.stem(x)))))
            x = conv_norm_act(conv, norm, x, act, pool=pool)
        elif pool is not None and _is_nothing(neck) and ends_in_pool(self.s4, pool, x):
            x = run_into_pool(self.s4, pool, self.s3(self.s2(self.s1(self.stem(x)))))
        else:
            x = self.forward_features(x)
        return self.forward_head(x)


@accelerates(
    "timm.models.regnet.RegNet",
    for_fused=True,
    forward="eff6df9c6f1b",
    forward_features="b0f71b7442ee",
    forward_head="936f8dc3d0b2",
)
class _RegNet(Recorded, _RegNetIntoPool):
    pass


@accelerates(
    "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d", for_fused=True, forward="dca49f3c5957"
)
@accelerates("timm.layers.classifier.ClassifierHead", for_fused=True, forward="a8032c8d0974")
class _StartsWithPool(Repeats):
    """Runs its pool before anything else, and on a map of one pixel to no effect if it is a mean.

    So who has the means already may pass them on.
    """


def _pool_of(head: Any) -> nn.Module | None:
    """Return the pool that a head begins with, None if that is not known, or watched."""
    while isinstance(head, _StartsWithPool) and not has_hooks(cast("Any", head)):
        if not hasattr(head, "global_pool"):
            return cast("Any", head).pool
        head = cast("Any", head).global_pool
    return None


@accelerates("timm.layers.mlp.Mlp", for_fused=True, forward="e2668f685526")
@accelerates("timm.layers.mlp.GlobalResponseNormMlp", for_fused=True, forward="74a5b22a03e2")
class _Mlp(Repeats):
    drop1: nn.Dropout
    drop2: nn.Dropout


@accelerates("timm.layers.eca.EcaModule", for_fused=True, forward="c4404a7369b9")
@accelerates("timm.layers.norm.LayerNorm", for_fused=True, forward="9ad967238c23")
@accelerates("timm.models.convnext.ConvNeXtStage", for_fused=True, forward="d1ed268ef75b")
@accelerates("timm.layers.classifier.NormMlpClassifierHead", for_fused=True, forward="cd0e547d22ee")
class _Plain(Repeats):
    pass


@accelerates(
    "timm.models.convnext.ConvNeXt",
    for_fused=True,
    forward="eff6df9c6f1b",
    forward_features="1c24745bef2e",
    forward_head="5f147f9988c4",
)
class _ConvNeXt(Recorded):
    pass


def _has_other_mlp(block: Any) -> str | None:
    if not isinstance(block.mlp, _Mlp):
        return f"its MLP, a {path_of(type(block.mlp))}, is not one this version was written for"
    return "its MLP has dropout" if block.mlp.drop1.p or block.mlp.drop2.p else None


@accelerates("timm.models.convnext.ConvNeXtBlock", forward="9054df84e1b4")
class _ConvNeXtBlock:
    MLP: ClassVar[MlpNames] = MlpNames("mlp.fc1", "mlp.fc2", "gamma", _has_other_mlp)
    conv_dw: nn.Module
    norm: nn.Module
    mlp: Any
    gamma: Tensor | None
    shortcut: nn.Module
    drop_path: Any
    use_conv_mlp: bool

    def forward(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        if is_fused(mlp.fc2) and takes_add(mlp, self.gamma, self.drop_path):
            between = mlp.grn if hasattr(mlp, "grn") else mlp.norm
            shortcut = self.shortcut(x)
            shortcut = shortcut if self.use_conv_mlp else shortcut.permute(0, 2, 3, 1)
            # without a name here, what is normalised is freed as soon as fc1 has read it
            y = mlp_add(self._normed(x), shortcut, mlp.fc1, mlp.act, between, mlp.fc2)
            return y if self.use_conv_mlp else y.permute(0, 3, 1, 2)
        y = mlp(self._normed(x))
        y = y if self.use_conv_mlp else y.permute(0, 3, 1, 2)
        return drop_add(self.drop_path, y, self.shortcut(x), self.gamma)

    def _normed(self, x: Tensor) -> Tensor:
        """Return what the MLP reads, (N, H, W, C) if it has linear layers."""
        y = self.conv_dw(x)
        return self.norm(y if self.use_conv_mlp else y.permute(0, 2, 3, 1))


@accelerates("timm.models._features.FeatureDictNet", _collect="3ff52ed095a0 dbc473fa0061")
@accelerates("timm.models._features.FeatureListNet", _collect="3ff52ed095a0 dbc473fa0061")
class _FeatureNet:
    """What `features_only` makes of a network; before 1.0.31 it checkpoints other children."""

    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"),)
    return_layers: dict[str, str]
    concat: bool
    grad_checkpointing: bool
    items: Any

    def _collect(self, x: Tensor) -> dict[str, Any]:
        if self.grad_checkpointing:
            timms: Any = super()
            return timms._collect(x)
        features = collect(self.items(), self.return_layers, x)
        for name, y in features.items():
            if isinstance(y, tuple | list):
                features[name] = torch.cat(y, 1) if self.concat else y[0]
        return features
