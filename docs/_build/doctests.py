"""An extension of griffe, which reads docstrings: examples in them are code, not quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^(>>> (?:.+\n?)+)", re.MULTILINE)


class Doctests(griffe.Extension):
    """Put a fence around every paragraph that begins with a prompt."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of whatever was found."""
        if obj.docstring:
            fenced = _EXAMPLE.sub(r"```pycon\n\1\n```\n", obj.docstring.value)
            obj.docstring.value = fenced
