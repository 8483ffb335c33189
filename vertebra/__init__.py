"""The fastest, most trustworthy CNN backbones in PyTorch."""

from . import interop, kernels, models, nn
from ._explain import explain
from .interop import accelerate, fuse, restore
from .kernels import backend
from .models import create_model, get_weight, list_models, register_model

__all__ = [
    "__version__",
    "accelerate",
    "backend",
    "create_model",
    "explain",
    "fuse",
    "get_weight",
    "interop",
    "kernels",
    "list_models",
    "models",
    "nn",
    "register_model",
    "restore",
]

__version__ = "0.1.0"
