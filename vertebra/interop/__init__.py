"""Adapters to other libraries of models, each of which is imported when it is needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..nn.fused import is_fused_model
from . import timm
from .accelerate import Site, accelerate, report, restore
from .fuse import fuse, unfused
from .timm_backbone import TimmBackbone

__all__ = [
    "Site",
    "TimmBackbone",
    "accelerate",
    "fuse",
    "is_fused_model",
    "report",
    "restore",
    "timm",
    "unfused",
]


def __getattr__(name: str) -> ModuleType:  # what derives from a library's classes imports it
    if name == "transformers":
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
