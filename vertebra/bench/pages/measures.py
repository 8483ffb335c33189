"""What tables and charts take from a comparison."""

from __future__ import annotations

import statistics
from pathlib import PurePosixPath

from .. import report
from ..ceilings import Ceilings
from ..results import Comparison, Row, quartiles
from .sources import Result


def stem(run: Result) -> str:
    """Return what the charts of a run are called."""
    return PurePosixPath(run.path).stem


def outcome(verdict: report.Verdict) -> str:
    """Return a verdict in a word or two."""
    text = verdict.outcome
    return "**loss**" if text.startswith("a loss") else text.removesuffix(" than")


def spread(comparison: Comparison, row: Row) -> tuple[float, float, float]:
    """Return a row's images per second: the lower quartile, the median, the upper quartile."""
    low, middle, high = (comparison.work["images"] * 1e3 / ms for ms in quartiles(row.samples_ms))
    return high, middle, low


def whole_networks(run: Result) -> list[Comparison]:
    """Return the comparisons of how fast networks are, not parts of them, nor what else there is.

    `bench compile` has such.
    """
    return [
        comparison
        for comparison in run.report.comparisons
        if comparison.facts.get("aspect", "steady") == "steady"
        and not comparison.facts.get("block")
    ]


def ceilings(run: Result) -> Ceilings | None:
    """Return what a machine can do at best; of a CPU, which other work slows down, none is told."""
    return run.report.ceilings if run.on_gpu else None


def copy_share(run: Result, comparison: Comparison) -> float | None:
    """Return the bandwidth of our best row as a share of that of a copy."""
    ours, limits = comparison.best(peer=False), ceilings(run)
    if ours is None or limits is None or "bytes" not in comparison.work:
        return None
    return comparison.work["bytes"] * 1e3 / ours.median_ms / limits.copy_bytes_per_s


def eager_and_ours(comparison: Comparison) -> tuple[Row, Row]:
    """Return the two rows of a comparison with eager PyTorch alone."""
    rows = {row.peer: row for row in comparison.rows}
    return rows[True], rows[False]


def times_eager(comparison: Comparison) -> float:
    """Return how many times eager's cost ours is, round by round."""
    eager, ours = (row.samples_ms for row in eager_and_ours(comparison))
    return statistics.median(mine / theirs for theirs, mine in zip(eager, ours, strict=True))
