"""What the generated parts are made from, each read or counted when it is first asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from .. import drop_in, parity, traffic
from ..results import Report

KINDS = ("main", "models", "train", "compile", "kernels", "overhead", "tune")
"""What `Report.kind` may be; `bench/results` also holds the rows of `vertebra parity`."""


class Result(NamedTuple):
    """A committed run, and the file that holds it, relative to the root."""

    path: str
    report: Report

    @property
    def on_gpu(self) -> bool:
        """Whether it ran on a GPU."""
        return "driver" in self.report.environment


class Sources:
    """The files below `root`, and what the installed package counts."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def of(self, *kinds: str) -> list[Result]:
        """Return the runs of some kinds, those on GPUs first."""
        return [result for result in self._results if result.report.kind in kinds]

    @cached_property
    def _results(self) -> list[Result]:
        found = list(self._load())
        found.sort(key=lambda result: (not result.on_gpu, result.path))
        return found

    def _load(self) -> Iterator[Result]:
        for path in sorted((self.root / "bench/results").glob("*.json")):
            content = json.loads(path.read_text())
            if isinstance(content, list):
                continue  # of parity
            if content.get("kind") not in KINDS:
                raise ValueError(
                    f"{path} must be a run of the kind {', '.join(KINDS)}, or the rows of "
                    f"`vertebra parity`; got {content.get('kind')!r}"
                )
            yield Result(path.relative_to(self.root).as_posix(), Report.load(path))

    @cached_property
    def parity(self) -> list[parity.Row]:
        """The comparisons with the peers' models."""
        path = self.root / "bench/results/parity.json"
        return parity.load(path) if path.exists() else []

    @cached_property
    def traffic(self) -> list[traffic.Line]:
        """What ops move beside eager PyTorch, counted now."""
        return list(traffic.lines())

    @cached_property
    def drop_in(self) -> list[tuple[str, str, str, str]]:
        """The table of recipes, seen now; the peers have to be installed."""
        return drop_in.lines(self.root / "docs/drop-in.json")
