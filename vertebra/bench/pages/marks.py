"""The marks between which a page holds what is generated, and what replaces it."""

from __future__ import annotations

import re
from collections.abc import Callable

_PART = re.compile(r"^(<!-- report: ([\w-]+) -->\n)(.*?)^(<!-- end -->)$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- report: .*?-->|<!-- end -->")


def names(page: str) -> list[str]:
    """Return the names of a page's parts, in order.

    Raises:
        ValueError: a mark has no counterpart, or is not alone on its line.
    """
    marks, parts = _MARK.findall(page), _PART.findall(page)
    paired = [mark for opening, *_, end in parts for mark in (opening.strip(), end)]
    if marks != paired:
        raise ValueError(
            "marks must be pairs, <!-- report: NAME --> and <!-- end -->, each on a line of its "
            f"own; got {', '.join(marks)}"
        )
    return [name for _, name, *_ in parts]


def fill(page: str, content: Callable[[str], str]) -> str:
    """Return a page with each part replaced by what `content` says of its name."""
    return _PART.sub(lambda part: f"{part[1]}{content(part[2])}\n{part[4]}", page)


def part(page: str, name: str) -> str:
    """Return what a page holds under a name."""
    return next(body for _, found, body, _ in _PART.findall(page) if found == name)
