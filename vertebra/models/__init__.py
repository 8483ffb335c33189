"""The models, the registry that builds them by name, and the loading of their weights."""

from ._param_groups import param_groups_layer_decay, param_groups_weight_decay
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
from .regnet import (
    RegNet,
    RegNetConfig,
    regnet_x_1_6gf,
    regnet_x_3_2gf,
    regnet_x_8gf,
    regnet_x_16gf,
    regnet_x_32gf,
    regnet_x_400mf,
    regnet_x_800mf,
    regnet_y_1_6gf,
    regnet_y_3_2gf,
    regnet_y_8gf,
    regnet_y_16gf,
    regnet_y_32gf,
    regnet_y_128gf,
    regnet_y_400mf,
    regnet_y_800mf,
)
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
    "RegNet",
    "RegNetConfig",
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
    "param_groups_layer_decay",
    "param_groups_weight_decay",
    "register_model",
    "regnet_x_1_6gf",
    "regnet_x_3_2gf",
    "regnet_x_8gf",
    "regnet_x_16gf",
    "regnet_x_32gf",
    "regnet_x_400mf",
    "regnet_x_800mf",
    "regnet_y_1_6gf",
    "regnet_y_3_2gf",
    "regnet_y_8gf",
    "regnet_y_16gf",
    "regnet_y_32gf",
    "regnet_y_128gf",
    "regnet_y_400mf",
    "regnet_y_800mf",
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
