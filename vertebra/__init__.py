"""The fastest, most trustworthy CNN backbones in PyTorch."""

from . import kernels, models, nn
from ._explain import explain
from .kernels import backend
from .models import create_model, get_weight, list_models, register_model

__all__ = [
    "__version__",
    "backend",
    "create_model",
    "explain",
    "get_weight",
    "kernels",
    "list_models",
    "models",
    "nn",
    "register_model",
]

__version__ = "0.1.0"
