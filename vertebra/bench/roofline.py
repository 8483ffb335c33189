"""The roofline: what a network costs at least, layer by layer, in the ways it may be scheduled."""

from __future__ import annotations

from .anatomy import macs

__all__ = ["macs"]
