"""The fastest, most trustworthy CNN backbones in PyTorch."""

from . import kernels, nn
from .kernels import backend

__all__ = ["__version__", "backend", "kernels", "nn"]

__version__ = "0.1.0"
