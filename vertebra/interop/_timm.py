"""Recipes for timm's modules: the same sums, in as few ops as there can be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, TypeGuard

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
    InputReaders,
    LayerNorm2d,
    LayerScale2d,
    SqueezeExcite,
    Unit,
    attn_act,
    conv_norm_act,
    excited,
)
from ..nn._act import fusible_act, has_hooks
from ..nn._drop import drop_add, is_idle
from ..nn.back_to_back import End, InParts, end_of
from ..nn.fused import Folded, is_fused
from ..nn.mlp import MlpNames, mlp_add, takes_add
from ..nn.norm_act import normalise
from ._children import collect, in_steps
from ._swap import accelerates, path_of, reading

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


def _end(
    conv: nn.Module, norm: nn.Module, x: Tensor, act: nn.Module, shortcut: Tensor, block: Any
) -> Tensor:
    """Return what a block of a ResNet makes of the input of its last convolution."""
    if block.se is None:
        return conv_norm_act(conv, norm, x, act, shortcut, drop=block.drop_path)
    x = conv_norm_act(conv, norm, x)
    return attn_act(block.se, x, act, shortcut, block.drop_path)


@accelerates("timm.models.resnet.BasicBlock", _has_other_norms, forward="4651704b6f10")
class _BasicBlock:
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"), ("conv2", "bn2"))
    INPUT_READERS: ClassVar[InputReaders] = ("conv1",)
    conv1: nn.Module
    bn1: nn.Module
    drop_block: nn.Module
    act1: nn.Module
    aa: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    act2: nn.Module
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm_act(self.conv1, self.bn1, x, self.act1, drop=self.drop_block)
        shortcut = x if self.downsample is None else self.downsample(x)
        return _end(self.conv2, self.bn2, self.aa(y), self.act2, shortcut, self)


@accelerates("timm.models.resnet.Bottleneck", _has_other_norms, forward="e8955400bbd3")
class _Bottleneck(InParts):
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    INPUT_READERS: ClassVar[InputReaders] = ("conv1",)
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

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def widen(self, y: Tensor, shortcut: Tensor) -> Tensor:
        return _end(self.conv3, self.bn3, y, self.act3, shortcut, self)

    def narrow_end(self) -> End | None:
        return end_of(self.conv1, self.bn1, self.act1)

    def widen_end(self) -> End | None:
        if self.se is not None:
            return None
        return end_of(self.conv3, self.bn3, self.act3, self.drop_path)

    def work_end(self) -> End | None:
        if not is_idle(self.aa):
            return None
        return end_of(self.conv2, self.bn2, self.act2, self.drop_block, side=3)


def _in_pairs(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Run the part of a stem that is a sequence, each norm of it with the activation behind."""
    for _, run in in_steps(((str(i), module) for i, module in enumerate(modules)), ()):
        x = run(x)
    return x


def _is_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    return type(module) is nn.Sequential and not has_hooks(module)


@accelerates("timm.models.resnet.ResNet", _has_other_norms, forward_features="fc18b940d027")
class _ResNet:
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"),)
    conv1: nn.Module
    bn1: nn.Module
    act1: nn.Module
    maxpool: nn.Module
    layer1: Iterable[nn.Module]
    layer2: Iterable[nn.Module]
    layer3: Iterable[nn.Module]
    layer4: Iterable[nn.Module]
    grad_checkpointing: bool

    def forward_features(self, x: Tensor) -> Tensor:
        conv, pool = self.conv1, self.maxpool
        if _is_sequence(conv):
            *others, conv = conv
            x = _in_pairs(others, x)
        if _is_sequence(pool):
            x = _in_pairs(pool, conv_norm_act(conv, self.bn1, x, self.act1))
        else:
            x = conv_norm_act(conv, self.bn1, x, self.act1, pool=pool)
        stages: Any = (self.layer1, self.layer2, self.layer3, self.layer4)
        if self.grad_checkpointing:
            from timm.models import checkpoint_seq

            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x


@accelerates("timm.models.regnet.Bottleneck", forward="3f0bd82ca388")
class _RegNetBottleneck:
    conv1: nn.Module
    conv2: nn.Module
    se: nn.Module
    conv3: nn.Module
    act3: nn.Module
    downsample: nn.Module | None
    drop_path: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        shortcut = None if self.downsample is None else self.downsample(x)
        drop = None if shortcut is None else self.drop_path
        ended = excited(self.conv2, self.se, self.conv3, y, shortcut, self.act3, drop)
        if ended is not None:
            return ended
        y = self.se(self.conv2(y))
        if shortcut is None:
            return self.act3(self.conv3(y))
        if isinstance(self.conv3, _ConvNormAct) and not has_hooks(self.conv3):
            return self.conv3(y, shortcut, self.act3, self.drop_path)
        return self.act3(drop_add(self.drop_path, self.conv3(y), shortcut))


_MLPS = {
    "timm.layers.mlp.Mlp": "e2668f685526",
    "timm.layers.mlp.GlobalResponseNormMlp": "74a5b22a03e2",
}


def _has_other_mlp(block: Any) -> str | None:
    own = type(block.mlp)
    if _MLPS.get(path_of(own)) != reading(own.forward):
        return f"its MLP, a {path_of(own)}, is not one this version was written for"
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
        y = self.conv_dw(x)
        if is_fused(self.mlp.fc2) and takes_add(self.mlp, self.gamma, self.drop_path):
            return self._with_add(y, self.shortcut(x))
        if self.use_conv_mlp:
            y = self.mlp(self.norm(y))
        else:
            y = self.mlp(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return drop_add(self.drop_path, y, self.shortcut(x), self.gamma)

    def _with_add(self, y: Tensor, shortcut: Tensor) -> Tensor:
        """Run the MLP's layers one by one, the last with the add."""
        mlp, in_rows = self.mlp, not self.use_conv_mlp
        if in_rows:
            y, shortcut = y.permute(0, 2, 3, 1), shortcut.permute(0, 2, 3, 1)
        between = mlp.grn if hasattr(mlp, "grn") else mlp.norm
        y = mlp_add(self.norm(y), shortcut, mlp.fc1, mlp.act, between, mlp.fc2)
        return y.permute(0, 3, 1, 2) if in_rows else y


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
