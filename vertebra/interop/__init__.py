"""Adapters to other libraries of models, each of which is imported when it is needed."""

from .timm_backbone import TimmBackbone

__all__ = ["TimmBackbone"]
