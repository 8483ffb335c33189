"""Results as pictures: bars of models, curves of a sweep, bandwidths of kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import rates
from .results import Comparison, Report, Row, quartiles

_OURS, _PEERS = "#1f77b4", "#a6a6a6"
_MARKERS = "osD^vP*X"


def models(report: Report, path: Path) -> None:
    """Draw a comparison's rates as bars; where a model has several batches, curves over them."""
    by_model = _timed_by(report, "{model} {mode}")
    if not by_model:
        return
    heights = [2.0 + 0.25 * max(len(c.timed) for c in group) for group in by_model.values()]
    figure, axes = new_figure(report, heights)
    for axis, group in zip(axes, by_model.values(), strict=True):
        if len(group) > 1:
            _curves(axis, sorted(group, key=lambda c: c.facts["batch"]), "images per call")
        else:
            _bars(axis, group[0])
    save(figure, path)


def kernels(report: Report, path: Path) -> None:
    """Draw, op by op, the bandwidth of every provider on every case, below that of a copy."""
    by_op = _timed_by(report, "{op}, {direction}")
    if not by_op:
        return
    figure, axes = new_figure(report, [3.2] * len(by_op))
    for axis, (title, group) in zip(axes, by_op.items(), strict=True):
        _points(axis, group)
        if report.ceilings is not None:
            axis.axhline(report.ceilings.copy_bytes_per_s / 1e9, color="black", linestyle=":")
            axis.annotate("copy", (0, report.ceilings.copy_bytes_per_s / 1e9), va="bottom")
        axis.set_title(title, loc="left")
    save(figure, path)


def _timed_by(report: Report, title: str) -> dict[str, list[Comparison]]:
    """Return the comparisons that have times, by a title made of their facts."""
    found: dict[str, list[Comparison]] = {}
    for comparison in report.comparisons:
        if comparison.timed:
            found.setdefault(title.format(**comparison.facts), []).append(comparison)
    return found


def new_figure(report: Report, heights: Sequence[float], columns: int = 1) -> tuple[Any, list[Any]]:
    """Return an empty figure of so many rows, and its axes, row by row."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(10, 0.8 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.environment['device']}, torch {report.environment['torch']}")
    return figure, list(axes)


def save(figure: Any, path: Path) -> None:
    """Write a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _bars(axis: Any, comparison: Comparison) -> None:
    rows = comparison.timed[::-1]
    rate = comparison.work["images"] * 1e3
    spread = [[rate / ms for ms in quartiles(row.samples_ms)] for row in rows]
    bars = axis.barh(
        [row.provider for row in rows],
        [middle for _, middle, _ in spread],
        xerr=[[m - h for _, m, h in spread], [lo - m for lo, m, _ in spread]],
        color=[_PEERS if row.peer else _OURS for row in rows],
    )
    axis.bar_label(bars, fmt="{:,.4g}", padding=8)
    axis.margins(x=0.12)
    axis.set_xlabel("img/s")
    axis.set_title(comparison.name, loc="left")


def _curves(axis: Any, group: Sequence[Comparison], label: str) -> None:
    for name, found in _by_provider(group).items():
        batches = [comparison.facts["batch"] for comparison, _ in found]
        axis.plot(batches, [rates(*pair)["img/s"] for pair in found], label=name)
    _style(axis)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(label)
    axis.set_ylabel("img/s")
    axis.set_title(group[0].name.partition(",")[0], loc="left")


def _points(axis: Any, group: Sequence[Comparison]) -> None:
    places = {comparison.name: i for i, comparison in enumerate(group)}
    for name, found in _by_provider(group).items():
        at = [places[comparison.name] for comparison, _ in found]
        axis.plot(at, [rates(*pair)["GB/s"] for pair in found], label=name, linestyle="")
    _style(axis)
    labels = ["x".join(map(str, c.facts["shape"])) + f" {c.facts['layout']}" for c in group]
    axis.set_xticks(range(len(group)), labels, rotation=60, ha="right", fontsize="x-small")
    axis.set_ylabel("GB/s")
    axis.set_ylim(bottom=0)


def _by_provider(group: Sequence[Comparison]) -> dict[str, list[tuple[Comparison, Row]]]:
    found: dict[str, list[tuple[Comparison, Row]]] = {}
    for comparison in group:
        for row in comparison.timed:
            found.setdefault(row.provider, []).append((comparison, row))
    return found


def _style(axis: Any) -> None:
    """Tell the lines of an axis apart, ours by their colour, and name them."""
    for line, marker in zip(axis.lines, itertools.cycle(_MARKERS)):
        line.set(marker=marker, color=_OURS if line.get_label().startswith("vertebra") else _PEERS)
    axis.legend(fontsize="small", ncols=3)
