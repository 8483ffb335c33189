"""Modules over the ops: timm's signatures and `state_dict` keys; norms subclass torch's."""

from .conv_norm_act import ConvNormAct
from .norm_act import BatchNormAct2d, FrozenBatchNormAct2d, create_norm_act, norm_act

__all__ = [
    "BatchNormAct2d",
    "ConvNormAct",
    "FrozenBatchNormAct2d",
    "create_norm_act",
    "norm_act",
]
