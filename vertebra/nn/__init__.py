"""Modules over the ops: timm's signatures and `state_dict` keys; norms subclass torch's."""

from ._act import ActLayer, create_act
from ._attn import AttnLayer, conv_attn_act, create_attn
from .blur_pool import AaLayer, BlurPool2d, create_aa, create_aa_max_pool
from .checkpoint import CheckpointSequential
from .conv_norm_act import (
    ConvNormAct,
    ConvNormActs,
    ConvNorms,
    conv_norm_act,
    create_conv2d,
)
from .drop_block import DropBlock2d
from .drop_path import DropPath, DropPathAdd, LayerScale, LayerScale2d
from .eca import EcaModule
from .freeze import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from .fused import FusedConv2d, FusedLinear, is_fused
from .gated import Excitation, Unit, ends_in_pool, excited, run_into_pool, takes_pool
from .global_avg_pool import GlobalAvgPool2d
from .global_pool import GlobalPool2d, create_global_pool, pooled_channels
from .global_response_norm import GlobalResponseNorm
from .layer_norm import LayerNorm2d
from .mlp import MlpNames, mlp_add, takes_add
from .norm_act import (
    BatchNormAct2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    NormLayer,
    create_norm_act,
    norm_act,
)
from .rms_norm import RmsNorm2d, SimpleNorm2d
from .squeeze_excite import SqueezeExcite
from .sync import SyncBatchNormAct2d, convert_sync_batchnorm

__all__ = [
    "AaLayer",
    "ActLayer",
    "AttnLayer",
    "BatchNormAct2d",
    "BlurPool2d",
    "CheckpointSequential",
    "ConvNormAct",
    "ConvNormActs",
    "ConvNorms",
    "DropBlock2d",
    "DropPath",
    "DropPathAdd",
    "EcaModule",
    "Excitation",
    "FrozenBatchNorm2d",
    "FrozenBatchNormAct2d",
    "FusedConv2d",
    "FusedLinear",
    "GlobalAvgPool2d",
    "GlobalPool2d",
    "GlobalResponseNorm",
    "LayerNorm2d",
    "LayerScale",
    "LayerScale2d",
    "MlpNames",
    "NormLayer",
    "RmsNorm2d",
    "SimpleNorm2d",
    "SqueezeExcite",
    "SyncBatchNormAct2d",
    "Unit",
    "conv_attn_act",
    "conv_norm_act",
    "convert_sync_batchnorm",
    "create_aa",
    "create_aa_max_pool",
    "create_act",
    "create_attn",
    "create_conv2d",
    "create_global_pool",
    "create_norm_act",
    "ends_in_pool",
    "excited",
    "freeze_batch_norm_2d",
    "is_fused",
    "mlp_add",
    "norm_act",
    "pooled_channels",
    "run_into_pool",
    "takes_add",
    "takes_pool",
    "unfreeze_batch_norm_2d",
]
