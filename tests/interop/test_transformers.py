"""Models of transformers on our ops: the same numbers, objects, keys and hooks, and back."""

import copy
import importlib
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.interop import _swap
from vertebra.interop._swap import Swapped
from vertebra.interop.accelerate import accelerate, restore

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("transformers")]

_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [2, 1]}
_RESNET: dict[str, Any] = {"embedding_size": 8, **_STAGES}
_REGNET: dict[str, Any] = {"embedding_size": 8, "groups_width": 4, **_STAGES}
_CONVNEXT: dict[str, Any] = {"num_stages": 2, "layer_scale_init_value": 0.5, **_STAGES}

# per family: class, config and its options
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resnet-basic": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"layer_type": "basic", **_RESNET},
    ),
    "resnet-bottleneck": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"layer_type": "bottleneck", "downsample_in_bottleneck": True, **_RESNET},
    ),
    "resnet-gelu": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"layer_type": "basic", "hidden_act": "gelu", **_RESNET},
    ),
    "rt-detr-resnet": (
        "RTDetrResNetBackbone",
        "RTDetrResNetConfig",
        {"layer_type": "basic", "out_indices": [1, 2], **_RESNET},
    ),
    "regnet-x": ("RegNetForImageClassification", "RegNetConfig", {"layer_type": "x", **_REGNET}),
    "regnet-y": ("RegNetForImageClassification", "RegNetConfig", {"layer_type": "y", **_REGNET}),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", _CONVNEXT),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", _CONVNEXT),
    "convnext-backbone": ("ConvNextBackbone", "ConvNextConfig", {"out_indices": [1, 2], **_CONVNEXT}),
    "dinov3-convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", _STAGES | {"layer_scale_init_value": 0.5}),
}
BIT_EQUAL = ("resnet-basic", "resnet-bottleneck", "resnet-gelu", "rt-detr-resnet", "regnet-x")

SWAPPED: dict[str, dict[str, int]] = {
    "resnet-basic": {
        "ResNetEmbeddings": 1,
        "ResNetConvLayer": 7,
        "ResNetShortCut": 1,
        "ResNetBasicLayer": 3,
    },
}
OPS: dict[str, dict[str, int]] = {}

families = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    for name, t in module.state_dict().items():
        if not t.is_floating_point():
            t.fill_(7)
        elif t.dim() > 1:
            t.normal_(0, (2 / t[0].numel()) ** 0.5)
        else:
            t.copy_(torch.rand_like(t) + 0.5 if "var" in name else torch.randn_like(t))
    return module


def build(family: str) -> nn.Module:
    import transformers

    name, config, options = FAMILIES[family]
    return randomised(getattr(transformers, name)(getattr(transformers, config)(**options)))


def pair(family: str) -> tuple[nn.Module, nn.Module]:
    """Return a model as it is, and its twin on our ops."""
    own = build(family)
    return own, accelerate(copy.deepcopy(own))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=dtype)


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output, however nested."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [t for part in parts if part is not None for t in tensors(part)]


def swapped(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Swapped)]


def part(path: str) -> Any:
    """Return a class of transformers' models."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)
