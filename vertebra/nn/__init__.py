"""Modules over the ops: timm's signatures and `state_dict` keys; norms subclass torch's."""

from ._act import ActLayer, create_act
from .conv_norm_act import ConvNormAct, create_conv2d
from .drop_path import DropPath, DropPathAdd, LayerScale, LayerScale2d
from .norm_act import (
    BatchNormAct2d,
    FrozenBatchNormAct2d,
    NormLayer,
    create_norm_act,
    norm_act,
)

__all__ = [
    "ActLayer",
    "BatchNormAct2d",
    "ConvNormAct",
    "DropPath",
    "DropPathAdd",
    "FrozenBatchNormAct2d",
    "LayerScale",
    "LayerScale2d",
    "NormLayer",
    "create_act",
    "create_conv2d",
    "create_norm_act",
    "norm_act",
]
