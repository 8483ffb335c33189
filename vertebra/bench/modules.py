"""What the ops compute, by modules that the peers have for it, on the inputs of a case.

What no module of theirs includes, a residual or an activation, follows as in their blocks: in
place. Their modules hold their parameters in the dtype of the maps, so the fp32 ones of a case are
rounded to it on the way. A peer without such a module is `Unavailable`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..testing.cases import Case, Inputs
from . import peers
from .runner import Unavailable

Function = Callable[[Inputs], Tensor]
"""From a case's inputs to y."""

_STATISTICS = {"mean": "running_mean", "var": "running_var"}


def of(library: str) -> Callable[[Case], Function]:
    """Return what makes, of a case, its computation by a module of `library`."""
    builders = _BUILDERS[library]

    def bind(case: Case) -> Function:
        if case.op not in builders:
            raise Unavailable(f"{library} has no module for {case.op}")
        return builders[case.op](case)

    return bind


def _bound(
    module: nn.Module,
    case: Case,
    names: Mapping[str, str] | None = None,
    *,
    training: bool = True,
    rounds: bool = True,
) -> Function:
    """Return a call of `module` with a case's inputs for parameters, named as `names` says."""
    module.train(training)
    own = {name: value.shape for name, value in module.state_dict().items()}

    def call(inputs: Inputs) -> Tensor:
        x = inputs["x"]
        assert x is not None
        state: dict[str, Tensor] = {}
        for given, value in inputs.items():
            name = (names or {}).get(given, given)
            if value is not None and name in own:
                state[name] = value.to(x.dtype) if rounds else value
                state[name] = state[name].view(own[name])
        return functional_call(module, state, (x,))

    return call


def _finished(norm: Function, case: Case) -> Function:
    """Return `norm`, then the residual and the activation of a case, in place."""
    _only(case.act in ("none", "relu"), case)

    def call(inputs: Inputs) -> Tensor:
        y, residual = norm(inputs), inputs.get("residual")
        if residual is not None:
            y += residual
        return y.relu_() if case.act == "relu" else y

    return call


def _only(holds: bool, case: Case) -> None:
    if not holds:
        options = " ".join([*case.options, case.act])
        raise Unavailable(f"it has no {case.op} with {options}")


def _batch_norm(case: Case) -> nn.Module:
    return nn.BatchNorm2d(case.shape[1], momentum=0.3)


# ------------------------------------------------------------------------------------ torchvision


def _frozen(norm: nn.Module, case: Case) -> Function:
    _only({"affine", "stats"} <= {*case.options}, case)
    if case.dtype != torch.float32:
        raise Unavailable("its frozen norm rounds its statistics, and is another function then")
    return _finished(_bound(norm, case, _STATISTICS | {"scale": "weight"}), case)


def _torchvision_scale_bias_act(case: Case) -> Function:
    norm = peers.torchvision_module("ops.misc").FrozenBatchNorm2d(case.shape[1])
    return _frozen(norm, case)


def _torch_batch_norm_act(case: Case) -> Function:
    _only({"affine", "stats"} <= {*case.options}, case)
    return _finished(_bound(_batch_norm(case), case, _STATISTICS, rounds=False), case)


def _torch_stem(case: Case) -> Function:
    _only({"affine", "stats"} <= {*case.options} and case.act == "relu", case)
    stem = nn.Sequential(_batch_norm(case), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    names = {"weight": "0.weight", "bias": "0.bias"}
    names |= {given: f"0.{name}" for given, name in _STATISTICS.items()}
    return _bound(stem, case, names, training="eval" not in case.options, rounds=False)


def _torchvision_layer_norm(case: Case) -> Function:
    _only("affine" in case.options, case)
    layer = peers.torchvision_module("models.convnext").LayerNorm2d(case.shape[1], eps=1e-6)
    return _bound(layer, case)


def _torchvision_global_avg_pool(case: Case) -> Function:
    return _head(peers.torchvision_module("models.convnext").LayerNorm2d, case)


def _head(norm: Any, case: Case) -> Function:
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(1)]
    if "norm" in case.options:
        _only("affine" in case.options, case)
        layers.append(norm(case.shape[1], eps=1e-6))
    names = {"weight": "1.weight", "bias": "1.bias"}
    return _bound(nn.Sequential(*layers, nn.Flatten()), case, names)


def _torchvision_squeeze_excite(case: Case) -> Function:
    _only({"bias", "conv"} <= {*case.options} and not _has_more(case), case)
    build = peers.torchvision_module("ops.misc").SqueezeExcitation
    return _bound(build(case.shape[1], _hidden(case)), case, _FCS)


_FCS = {f"fc{i}_{name}": f"fc{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}


def _hidden(case: Case) -> int:
    return next((int(o[2:]) for o in case.options if o.startswith("r=")), case.shape[1] // 4)


def _has_more(case: Case) -> bool:
    """Return whether a squeeze_excite does anything but what every library's does."""
    plain = {"bias", "conv", "residual", "relu", f"r={_hidden(case)}"}
    return "residual" in case.options or case.act != "none" or not {*case.options} <= plain


# ------------------------------------------------------------------------------------------- timm


def _timm_layer(name: str, *args: Any, module: str = "", **options: Any) -> nn.Module:
    peers.timm()
    return getattr(importlib.import_module(f"timm.layers{module}"), name)(*args, **options)


def _timm_scale_bias_act(case: Case) -> Function:
    return _frozen(_timm_layer("FrozenBatchNormAct2d", case.shape[1], apply_act=False), case)


def _timm_batch_norm_act(case: Case) -> Function:
    _only({"affine", "stats"} <= {*case.options}, case)
    fused = case.act == "relu" and "residual" not in case.options
    norm = _timm_layer("BatchNormAct2d", case.shape[1], momentum=0.3, apply_act=fused)
    bound = _bound(norm, case, _STATISTICS, rounds=False)
    return bound if fused else _finished(bound, case)


def _timm_layer_norm(case: Case) -> Function:
    _only("affine" in case.options, case)
    return _bound(_timm_layer("LayerNorm2d", case.shape[1], eps=1e-6), case)


def _timm_response_norm(case: Case) -> Function:
    norm = _timm_layer("GlobalResponseNorm", case.shape[1], channels_last=False, module=".grn")
    return _bound(norm, case)


def _timm_global_avg_pool(case: Case) -> Function:
    return _head(partial(_timm_layer, "LayerNorm2d"), case)


def _timm_squeeze_excite(case: Case) -> Function:
    _only({"bias", "conv"} <= {*case.options} and not _has_more(case), case)
    layer = _timm_layer("SEModule", case.shape[1], rd_channels=_hidden(case))
    return _bound(layer, case, _FCS)


# ----------------------------------------------------------------------------------- transformers


def _transformers_layer(model: str, name: str, *args: Any, **options: Any) -> nn.Module:
    peers.transformers()
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, name)(*args, **options)


def _transformers_layer_norm(case: Case) -> Function:
    _only("affine" in case.options, case)
    options = {"eps": 1e-6, "data_format": "channels_first"}
    layer = _transformers_layer("convnext", "ConvNextLayerNorm", case.shape[1], **options)
    return _bound(layer, case)


def _transformers_response_norm(case: Case) -> Function:
    norm = _transformers_layer("convnextv2", "ConvNextV2GRN", case.shape[1])
    return _bound(_ChannelsLast(norm), case, {"weight": "layer.weight", "bias": "layer.bias"})


class _ChannelsLast(nn.Module):
    """A layer of (N, H, W, C) maps, for (N, C, H, W) ones."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the map, permuted there and back."""
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _transformers_squeeze_excite(case: Case) -> Function:
    _only({"bias", "conv"} <= {*case.options} and not _has_more(case), case)
    layer = _transformers_layer("regnet", "RegNetSELayer", case.shape[1], _hidden(case))
    places = {"fc1": "attention.0", "fc2": "attention.2"}
    names = {given: name.replace(name[:3], places[name[:3]]) for given, name in _FCS.items()}
    return _bound(layer, case, names)


# ------------------------------------------------------------------------------------------- apex


def _apex_batch_norm_act(case: Case) -> Function:
    """Return NVIDIA's persistent batch norm, of which apex has one type and one layout."""
    module: Any = importlib.import_module("apex.contrib.groupbn.batch_norm")
    residual = "residual" in case.options
    _only({"affine", "stats"} <= {*case.options} and case.act in ("none", "relu"), case)
    _only(not (residual and case.act == "none") and case.shape[1] % 4 == 0, case)
    if (case.dtype, case.layout) != (torch.float16, "nhwc"):
        raise Unavailable("apex has it in fp16 and channels_last alone")
    norm = module.BatchNorm2d_NHWC(case.shape[1], fuse_relu=case.act == "relu").cuda()

    def call(inputs: Inputs) -> Tensor:
        given = (inputs[name] for name in ("x", "residual"))
        maps = tuple(m.permute(0, 2, 3, 1) for m in given if m is not None)
        names = _STATISTICS | {"weight": "weight", "bias": "bias"}
        found = {name: inputs[given] for given, name in names.items()}
        state = {name: value for name, value in found.items() if value is not None}
        return functional_call(norm, state, maps).permute(0, 3, 1, 2)

    return call


_BUILDERS: dict[str, dict[str, Callable[[Case], Function]]] = {
    "torchvision": {
        "scale_bias_act": _torchvision_scale_bias_act,
        "batch_norm_act": _torch_batch_norm_act,
        "batch_norm_act_pool": _torch_stem,
        "layer_norm_2d": _torchvision_layer_norm,
        "global_avg_pool": _torchvision_global_avg_pool,
        "squeeze_excite": _torchvision_squeeze_excite,
    },
    "timm": {
        "scale_bias_act": _timm_scale_bias_act,
        "batch_norm_act": _timm_batch_norm_act,
        "layer_norm_2d": _timm_layer_norm,
        "global_response_norm": _timm_response_norm,
        "global_avg_pool": _timm_global_avg_pool,
        "squeeze_excite": _timm_squeeze_excite,
    },
    "transformers": {
        "layer_norm_2d": _transformers_layer_norm,
        "global_response_norm": _transformers_response_norm,
        "squeeze_excite": _transformers_squeeze_excite,
    },
    "apex": {"batch_norm_act": _apex_batch_norm_act},
}
LIBRARIES = tuple(_BUILDERS)


def offers(library: str, op: str) -> bool:
    """Return whether a library is here, which is not imported, and has modules for an op."""
    return op in _BUILDERS[library] and importlib.util.find_spec(library) is not None
