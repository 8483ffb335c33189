"""Functional ops: one torch-only contract per module; their Triton kernels live in `_triton`.

>>> from vertebra.kernels import batch_norm_act, scale_bias_act
"""

from ._op import Op, Traffic, backend, current_backend
from .batch_norm_act import batch_norm_act
from .drop_path_add import drop_path_add
from .scale_bias_act import scale_bias_act

__all__ = [
    "Op",
    "Traffic",
    "backend",
    "batch_norm_act",
    "current_backend",
    "drop_path_add",
    "scale_bias_act",
]
