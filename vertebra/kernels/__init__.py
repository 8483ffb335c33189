"""Functional ops: one torch-only contract per module; their Triton kernels live in `_triton`.

>>> from vertebra.kernels import batch_norm_act, scale_bias_act
"""

from ._op import Op, Traffic, backend, current_backend
from .batch_norm_act import batch_norm_act
from .scale_bias_act import scale_bias_act
from .squeeze_excite import squeeze_excite

__all__ = [
    "Op",
    "Traffic",
    "backend",
    "batch_norm_act",
    "current_backend",
    "scale_bias_act",
    "squeeze_excite",
]
