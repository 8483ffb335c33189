"""Functional ops: one torch-only contract per module; their Triton kernels live in `_triton`.

>>> from vertebra.kernels import batch_norm_act, scale_bias_act
"""

from ._op import Op, Traffic, backend, current_backend
from .batch_norm_act import batch_norm_act
from .batch_norm_act_pool import batch_norm_act_pool
from .scale_bias_act import scale_bias_act

__all__ = [
    "Op",
    "Traffic",
    "backend",
    "batch_norm_act",
    "batch_norm_act_pool",
    "current_backend",
    "scale_bias_act",
]
