"""Files for results: whether they can be written is known before anything is measured."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .results import Report

_CHARTS = (".png", ".svg", ".pdf")


def check(path: Path | None) -> None:
    """Make the folder of a file that will be written.

    Raises:
        ValueError: it cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"{path} cannot be written: {path.parent} is no folder") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror}; name a place that can"
        ) from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: Permission denied; name a place that can")


def check_chart(path: Path | None) -> None:
    """Do as `check` does, for a file of one of the kinds that charts have.

    Raises:
        ValueError: it cannot be written, or is of another kind.
    """
    if path is None:
        return
    if path.suffix.lower() not in _CHARTS:
        raise ValueError(f"plot must end in {', '.join(_CHARTS)}; got {str(path)!r}")
    check(path)


def write(report: Report, path: Path | None, how: Callable[[Report, Path], None]) -> str | None:
    """Write a file that was asked for; return why there is none, where there is none.

    A report that has no times may leave nothing to write.
    """
    if path is None:
        return None
    before = _written_at(path)
    try:
        how(report, path)
    except ImportError as error:  # of matplotlib
        return f"{path} is not written: {error}; pip install 'vertebra[bench]', then --resume"
    return f"{path} is not written: nothing was timed" if _written_at(path) == before else None


def _written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None
