"""Results as pictures: bars of models, curves of a sweep, bandwidths of kernels."""

from __future__ import annotations

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
        copy = 0.0 if report.ceilings is None else report.ceilings.copy_bytes_per_s / 1e9
        if 0 < copy < 10 * axis.get_ylim()[1]:  # or all there is would lie on the floor
            axis.axhline(copy, color="black", linestyle=":")
            axis.annotate("copy", (0, copy), va="bottom")
        axis.set_ylim(bottom=0)
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
        at = [comparison.facts["batch"] for comparison, _ in found]
        _line(axis, at, [rates(*pair)["img/s"] for pair in found], name, found[0][1].peer, "-")
    _legend(axis)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    batches = [comparison.facts["batch"] for comparison in group]
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.yaxis.set_major_formatter("{x:,.4g}")
    axis.yaxis.set_minor_formatter("{x:,.4g}")
    axis.set_xlabel(label)
    axis.set_ylabel("img/s")
    axis.set_title(group[0].name.partition(",")[0], loc="left")


def _points(axis: Any, group: Sequence[Comparison]) -> None:
    places = {comparison.name: i for i, comparison in enumerate(group)}
    for name, found in _by_provider(group).items():
        at = [places[comparison.name] for comparison, _ in found]
        _line(axis, at, [rates(*pair)["GB/s"] for pair in found], name, found[0][1].peer, "")
    _legend(axis)
    labels = ["x".join(map(str, c.facts["shape"])) + f" {c.facts['layout']}" for c in group]
    axis.set_xticks(range(len(group)), labels, rotation=60, ha="right", fontsize="x-small")
    axis.set_ylabel("GB/s")


def _by_provider(group: Sequence[Comparison]) -> dict[str, list[tuple[Comparison, Row]]]:
    found: dict[str, list[tuple[Comparison, Row]]] = {}
    for comparison in group:
        for row in comparison.timed:
            found.setdefault(row.provider, []).append((comparison, row))
    return found


def _line(
    axis: Any, at: Sequence[float], values: Sequence[float], name: str, peer: bool, style: str
) -> None:
    """Draw what one provider does: its marker tells it apart, its colour whose it is."""
    marker = _MARKERS[len(axis.lines) % len(_MARKERS)]
    color = _PEERS if peer else _OURS
    axis.plot(at, values, label=name, linestyle=style, marker=marker, color=color)


def _legend(axis: Any) -> None:
    """Name the lines of an axis, above it, where none is in the way."""
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    axis.legend(fontsize="small", ncols=min(5, len(axis.lines)), frameon=False, **place)
