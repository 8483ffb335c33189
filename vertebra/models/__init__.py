"""The models, the registry that builds them by name, and the loading of their weights."""

from ._pretrained import ENUMS, Weights, get_weight
from ._registry import create_model, list_models, register_model
from ._transforms import ImageTransform
from ._weights import export_weights, load_weights
from .convnext import (
    ConvNeXt,
    ConvNeXtBlock,
    ConvNeXtConfig,
    ConvNeXtStage,
    convnext_base,
    convnext_large,
    convnext_small,
    convnext_tiny,
)
from .heads import Backbone, ForImageClassification, Model
from .resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    ResNetConfig,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

__all__ = [
    "Backbone",
    "BasicBlock",
    "Bottleneck",
    "ConvNeXt",
    "ConvNeXtBlock",
    "ConvNeXtConfig",
    "ConvNeXtStage",
    "ForImageClassification",
    "ImageTransform",
    "Model",
    "ResNet",
    "ResNetConfig",
    "Weights",
    "convnext_base",
    "convnext_large",
    "convnext_small",
    "convnext_tiny",
    "create_model",
    "export_weights",
    "get_weight",
    "list_models",
    "load_weights",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


def __getattr__(name: str) -> type[Weights]:  # ResNet50_Weights and the like
    if name in ENUMS:
        return ENUMS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
