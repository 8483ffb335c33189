"""Functional ops: one torch-only contract per module; their Triton kernels live in `_triton`.

>>> from vertebra.kernels import batch_norm_act, layer_norm_2d, scale_bias_act
"""

from ._op import Op, Traffic, backend, current_backend
from .batch_norm_act import batch_norm_act
from .batch_norm_act_pool import batch_norm_act_pool
from .conv2d_act import conv2d_act
from .conv2d_act_pool import conv2d_act_pool
from .conv2d_b2b import conv2d_b2b
from .drop_path_add import drop_path_add
from .global_avg_pool import global_avg_pool
from .global_response_norm import global_response_norm
from .layer_norm_2d import layer_norm_2d
from .scale_bias_act import scale_bias_act
from .squeeze_excite import squeeze_excite
from .squeeze_gate import squeeze_gate

__all__ = [
    "Op",
    "Traffic",
    "backend",
    "batch_norm_act",
    "batch_norm_act_pool",
    "conv2d_act",
    "conv2d_act_pool",
    "conv2d_b2b",
    "current_backend",
    "drop_path_add",
    "global_avg_pool",
    "global_response_norm",
    "layer_norm_2d",
    "scale_bias_act",
    "squeeze_excite",
    "squeeze_gate",
]
