"""The findings as a picture: how long a start takes, and when what it cost has been earned back."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..charts import new_figure, save
from ..results import Comparison, Report, Row
from .verdicts import Payoff, cases, payoffs

_COLOURS = {
    "eager": "#7f7f7f",
    "compile": "#ff7f0e",
    "vertebra": "#1f77b4",
    "vertebra-compile": "#17becf",
    "accelerated": "#2ca02c",
    "accelerated-compile": "#bcbd22",
}
_PARTS = {
    "imports": "#e8e8e8",
    "build": "#c4c4c4",
    "tracing": "#9ecae1",
    "autograd": "#6baed6",
    "code": "#3182bd",
    "kernels": "#08519c",
    "the rest": "#fd8d3c",
}


def draw(report: Report, path: Path) -> None:
    """Draw, for every case and mode with both, starts as bars and time over images as lines.

    A dot is where compiling has paid.
    """
    paid = list(payoffs(report))
    pairs = [
        (case.title, mode, starts, case.comparisons["steady", mode])
        for case in cases(report)
        for mode, starts in case.of("starts")
        if starts.timed and ("steady", mode) in case.comparisons
    ]
    if not pairs:
        return
    figure, axes = new_figure(report, [3.6] * len(pairs), columns=2)
    for i, (title, mode, starts, steady) in enumerate(pairs):
        left, right = axes[2 * i], axes[2 * i + 1]
        left.set_title(f"{title}, {mode}", loc="left")
        _bars(left, starts)
        _lines(right, starts, steady, [p for p in paid if (p.case.title, p.mode) == (title, mode)])
    save(figure, path)


def _bars(axis: Any, starts: Comparison) -> None:
    """Stack what a process does until its first answer, the last to come on top."""
    rows = starts.timed[::-1]
    parts = [_parts(row) for row in rows]
    left = [0.0] * len(rows)
    for name, colour in _PARTS.items():
        widths = [part[name] for part in parts]
        axis.barh([row.provider for row in rows], widths, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_xlabel("seconds from the start of the process")
    axis.legend(fontsize="x-small", ncols=2)


def _parts(row: Row) -> dict[str, float]:
    starts = row.facts["starts"]
    found = {
        "imports": statistics.median(sum(start["imports_s"].values()) for start in starts),
        "build": statistics.median(start["device_s"] + start["build_s"] for start in starts),
    }
    for phase in ("tracing", "autograd", "code", "kernels"):
        found[phase] = statistics.median(start["compiling_s"].get(phase, 0.0) for start in starts)
    compiling = sum(found[phase] for phase in ("tracing", "autograd", "code", "kernels"))
    found["the rest"] = max(0.0, row.median_ms / 1e3 - compiling)
    return found


def _lines(axis: Any, starts: Comparison, steady: Comparison, paid: Sequence[Payoff]) -> None:
    """Draw the time that so many images have taken, from the first call on."""
    batch = steady.work["images"]
    first = {row.provider: row.median_ms / 1e3 for row in starts.timed}
    each = {row.provider: row.median_ms / 1e3 for row in steady.timed if row.provider in first}
    if not each:
        return
    longest = 30 * max(first[name] / each[name] for name in each)
    longest = max([longest, *(2 * (p.cold or 0.0) / batch for p in paid)])
    calls = [longest ** (i / 200) for i in range(201)]
    for name in each:
        seconds = [first[name] + (n - 1) * each[name] for n in calls]
        style = "--" if name.endswith("compile") else "-"
        images = [batch * n for n in calls]
        axis.plot(images, seconds, style, color=_COLOURS[name], label=name)
    for payoff in paid:
        if payoff.cold is not None:
            name, n = payoff.provider, payoff.cold / batch
            seconds = first[name] + (n - 1) * each[name]
            axis.plot(payoff.cold, seconds, "o", color=_COLOURS[name])
            axis.annotate(f"{payoff.cold:,.0f}", (payoff.cold, seconds), fontsize="x-small")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("images")
    axis.set_ylabel("seconds, from the first call on")
    axis.legend(fontsize="x-small")
