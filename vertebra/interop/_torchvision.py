"""Recipes for torchvision's modules: the same sums, in as few ops as there can be."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar, cast

import torch
import torch.fx
from torch import Tensor, nn

from ..kernels import drop_path_add
from ..nn import (
    ConvNorms,
    Excitation,
    LayerNorm2d,
    Unit,
    conv_norm_act,
    ends_in_pool,
    run_into_pool,
)
from ..nn._act import has_hooks
from ..nn.back_to_back import End, InParts, end_of
from ..nn.fused import is_fused
from ..nn.fused_blocks import Recorded
from ..nn.mlp import MlpNames, mlp_add, takes_add
from ..nn.norm_act import FrozenBatchNorm2d
from ..nn.squeeze_excite import excite
from ._children import collect
from ._layered import Layered, in_row, unit_of
from ._swap import Repeats, accelerates

torch.fx.wrap("drop_path_add")  # a leaf: it looks at shapes, which a proxy does not have


@accelerates("torchvision.models.resnet.BasicBlock", forward="35a42b79c8d5")
class _BasicBlock:
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"), ("conv2", "bn2"))
    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    downsample: nn.Module | None

    def last_unit(self) -> Unit:
        return Unit(self.conv2, self.bn2, self.relu)

    def forward(self, x: Tensor, pool: nn.Module | None = None) -> Tensor:
        y = conv_norm_act(self.conv1, self.bn1, x, self.relu)
        shortcut = x if self.downsample is None else self.downsample(x)
        return conv_norm_act(self.conv2, self.bn2, y, self.relu, shortcut, pool)


@accelerates("torchvision.models.resnet.Bottleneck", forward="64f3768ca1e8")
class _Bottleneck(InParts):
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    conv1: nn.Module
    bn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    conv3: nn.Module
    bn3: nn.Module
    relu: nn.Module
    downsample: nn.Module | None

    def last_unit(self) -> Unit:
        return Unit(self.conv3, self.bn3, self.relu)

    def narrow_end(self) -> End | None:
        return end_of(self.conv1, self.bn1, self.relu)

    def widen_end(self) -> End | None:
        return end_of(*self.last_unit())

    def work_end(self) -> End | None:
        return end_of(self.conv2, self.bn2, self.relu, side=3)

    def narrow(self, x: Tensor) -> Tensor:
        return conv_norm_act(self.conv1, self.bn1, x, self.relu)

    def work(self, y: Tensor) -> Tensor:
        return conv_norm_act(self.conv2, self.bn2, y, self.relu)

    def shortcut_of(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def widen(self, y: Tensor, shortcut: Tensor, pool: nn.Module | None = None) -> Tensor:
        return conv_norm_act(self.conv3, self.bn3, y, self.relu, shortcut, pool)


@accelerates(
    "torchvision.models.resnet.ResNet", _forward_impl="c9c75ff63451", forward="73d007729d3c"
)
class _ResNet(Recorded):
    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"),)
    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module
    fc: nn.Module

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = conv_norm_act(self.conv1, self.bn1, x, self.relu, pool=self.maxpool)
        x = self.layer3(self.layer2(self.layer1(x)))
        if ends_in_pool(self.layer4, self.avgpool, x):
            x = run_into_pool(self.layer4, self.avgpool, x)
        else:
            x = self.avgpool(self.layer4(x))
        return self.fc(torch.flatten(x, 1))


@accelerates("torchvision.models._utils.IntermediateLayerGetter", forward="f35b64dca034")
class _IntermediateLayerGetter(nn.ModuleDict):
    """What torchvision's detectors and segmenters make of their backbones."""

    CONV_NORMS: ClassVar[ConvNorms] = (("conv1", "bn1"),)
    return_layers: dict[str, str]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return collect(self.items(), self.return_layers, x)


def _is_conv_norm_act(module: Any) -> str | None:
    if len(module) in (2, 3) and isinstance(module[0], nn.Conv2d):
        return None
    return "it is not a convolution, a norm and perhaps an activation"


@accelerates("torchvision.models.regnet.SimpleStemIN", _is_conv_norm_act, forward="ba082ab0b258")
@accelerates("torchvision.ops.misc.Conv2dNormActivation", _is_conv_norm_act, forward="ba082ab0b258")
class _Conv2dNormActivation(nn.Sequential):
    CONV_NORMS: ClassVar[ConvNorms] = (("0", "1"),)

    def unit(self) -> Unit:
        return Unit(*self)

    def forward(self, input: Tensor) -> Tensor:
        conv, norm, *act = self
        return conv_norm_act(conv, norm, input, act[0] if act else None)


@accelerates("torchvision.models.regnet.ResBottleneckBlock", forward="1f053948ac54")
class _ResBottleneckBlock(Layered):
    proj: nn.Module | None
    f: nn.Module
    activation: nn.Module

    def layers(self) -> list[nn.Module]:
        return in_row(self.f)

    def last_unit(self) -> Unit | None:
        *_, last = self.layers() or [None]
        unit = unit_of(last) if isinstance(last, _Conv2dNormActivation) else None
        return None if unit is None or unit.act is not None else unit._replace(act=self.activation)

    def shortcut_of(self, x: Tensor) -> Tensor:
        return x if self.proj is None else self.proj(x)


class _RegNetIntoPool(nn.Module):
    """A module as `Recorded` is: else the library's class would come before it."""

    stem: nn.Module
    trunk_output: nn.Module
    avgpool: nn.Module
    fc: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        *others, last = in_row(self.trunk_output) or [None]
        if last is not None and ends_in_pool(last, self.avgpool, x):
            for stage in others:
                x = cast("nn.Module", stage)(x)
            x = run_into_pool(last, self.avgpool, x)
        else:
            x = self.avgpool(self.trunk_output(x))
        return self.fc(x.flatten(start_dim=1))


@accelerates("torchvision.models.regnet.RegNet", for_fused=True, forward="63fd38b79d8e")
class _RegNet(Recorded, _RegNetIntoPool):
    pass


@accelerates(
    "torchvision.ops.misc.SqueezeExcitation", forward="989036e31adb", _scale="e7e5839d2f2c"
)
class _SqueezeExcitation:
    avgpool: nn.Module
    fc1: nn.Module
    activation: nn.Module
    fc2: nn.Module
    scale_activation: nn.Module

    def excitation(self) -> Excitation:
        return Excitation(self.fc1, self.activation, self.fc2, self.scale_activation)

    def forward(self, input: Tensor) -> Tensor:
        return excite(input, *self.excitation())


@accelerates("torchvision.ops.misc.FrozenBatchNorm2d", forward="8ccaf36f3872")
class _FrozenBatchNorm2d:
    forward = FrozenBatchNorm2d.forward


@accelerates("torchvision.models.convnext.LayerNorm2d", forward="4b83c3a9c0e0")
class _LayerNorm2d:
    data_format = "channels_first"
    forward = LayerNorm2d.forward


@accelerates("torchvision.ops.misc.Permute", for_fused=True, forward="47d2b1f08a3d")
class _Permute(Repeats):
    pass


def _is_of_rows(module: Any) -> str | None:
    return None if module.mode == "row" else f"mode {module.mode!r} drops whole batches"


@accelerates(
    "torchvision.ops.stochastic_depth.StochasticDepth", _is_of_rows, forward="a1bbda5b1d67"
)
class _StochasticDepth:
    p: float
    training: bool

    def forward(self, input: Tensor) -> Tensor:
        return drop_path_add(input, drop_prob=self.p) if self.training and self.p else input


def _ends_in_rows(module: Any) -> str | None:
    return _is_of_rows(module.stochastic_depth)


def _has_other_layers(block: Any) -> str | None:
    is_known = len(block.block) == 7 and type(block.block) is nn.Sequential
    return None if is_known else "its MLP is not the one this version was written for"


@accelerates(
    "torchvision.models.convnext.ConvNeXt",
    for_fused=True,
    _forward_impl="8e6fc37f2f79",
    forward="73d007729d3c",
)
class _ConvNeXt(Recorded):
    pass


@accelerates("torchvision.models.convnext.CNBlock", _ends_in_rows, forward="db7f6ca5fe75")
class _CNBlock:
    MLP: ClassVar[MlpNames] = MlpNames("block.3", "block.5", "layer_scale", _has_other_layers)
    block: nn.Sequential
    layer_scale: Tensor
    stochastic_depth: Any

    def forward(self, input: Tensor) -> Tensor:
        drop = self.stochastic_depth
        is_idle = not ((drop.training and drop.p) or has_hooks(drop))
        is_ours = is_fused(self.block[-2])
        if is_ours and is_idle and takes_add(self.block, self.layer_scale, None):
            conv, permute, norm, fc1, act, fc2, back = self.block
            y = norm(permute(conv(input)))
            return back(mlp_add(y, permute(input), fc1, act, None, fc2))
        y = self.block(input)
        if has_hooks(drop):
            return drop(self.layer_scale * y) + input
        drop_prob = drop.p if drop.training else 0.0
        return drop_path_add(y, input, self.layer_scale.flatten(), drop_prob=drop_prob)
