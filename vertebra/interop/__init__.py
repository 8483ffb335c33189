"""Adapters to other libraries of models, each of which is imported when it is needed."""

from . import timm
from .accelerate import Site, accelerate, report, restore
from .timm_backbone import TimmBackbone

__all__ = ["Site", "TimmBackbone", "accelerate", "report", "restore", "timm"]
