"""What the charts show."""

from __future__ import annotations

from .. import goals
from ..results import Comparison
from .figures import Chart, Mark, Panel, Row
from .markdown import picture
from .measures import copy_share, eager_and_ours, spread, stem, whole_networks
from .sources import KINDS, Result, Sources


def every(sources: Sources) -> dict[str, Chart]:
    """Return the charts that there is something to show in, by name."""
    charts = {stem(run): chart_of(run) for run in sources.of(*KINDS)}
    found = {name: chart for name, chart in charts.items() if chart is not None}
    return {"traffic": traffic(sources), **found}


def chart_of(run: Result) -> Chart | None:
    """Return the chart of a run, if it has what one shows."""
    if run.report.kind == "overhead":
        return _overhead(run)
    return _kernels(run) if run.report.kind == "kernels" else _models(run)


def shown(run: Result) -> str:
    """Return what shows the chart of a run on a page, if there is one."""
    chart = chart_of(run)
    return "" if chart is None else picture(stem(run), chart.alt)


_NO_MAPS = {"affine", "stats", "bias", "conv", "rare"}
"""Options that are about vectors, or about what other cases have."""


def traffic(sources: Sources) -> Chart:
    """Return the bytes that every op moves, and what eager PyTorch has to move."""
    panels: list[Panel] = []
    for i, way in enumerate(("forward", "backward")):
        rows = [
            Row(
                " ".join((line.op, *_of_maps(line.options))) if i == 0 else "",
                [
                    Mark("eager PyTorch, at least", line.eager[i]),
                    Mark("vertebra", line.ours[i]),
                ],
            )
            for line in sources.traffic
        ]
        panels.append(Panel(way, "maps read and written", rows))
    alt = "Maps that every op reads and writes, forward and backward, beside eager PyTorch"
    return Chart(alt, panels, columns=2, one_scale=True)


def _of_maps(options: str) -> list[str]:
    return [option for option in options.split() if option not in _NO_MAPS]


def traffic_chart(sources: Sources) -> str:
    """Return what shows that chart on a page."""
    return picture("traffic", traffic(sources).alt)


def _models(run: Result) -> Chart | None:
    panels = [_rates(run, c) for c in whole_networks(run) if c.timed]
    alt = f"Images per second of every provider on {run.report.environment['device']}"
    return Chart(alt, panels, bars=True) if panels else None


def _rates(run: Result, comparison: Comparison) -> Panel:
    rows: list[Row] = []
    for row in comparison.timed:
        low, middle, high = spread(comparison, row)
        series = "eager PyTorch and others" if row.peer else "vertebra"
        rows.append(Row(row.provider, [Mark(series, middle, low, high)]))
    goal = goals.of(run.report, comparison)
    lines = {} if goal is None else {"goal": goal.rate, "stretch": goal.stretch}
    return Panel(comparison.name, "images per second", rows, lines)


def _kernels(run: Result) -> Chart | None:
    """Return our bandwidth as a share of a copy's, a row per op and direction."""
    found: dict[str, list[float]] = {}
    for comparison in run.report.comparisons:
        share = copy_share(run, comparison)
        if share is not None:
            facts = comparison.facts
            found.setdefault(f"{facts['op']} {facts['direction']}", []).append(share)
    if not found:
        return None
    rows = [Row(name, [Mark("vertebra", s) for s in shares]) for name, shares in found.items()]
    title = f"Bandwidth on {run.report.environment['device']}, a dot per case"
    panel = Panel(title, "share of a copy's", rows, {"goal": goals.COPY_SHARE, "copy": 1.0})
    return Chart(title, [panel])


def _overhead(run: Result) -> Chart:
    panels: dict[str, list[Row]] = {}
    for comparison in run.report.comparisons:
        eager, ours = eager_and_ours(comparison)
        facts = comparison.facts
        marks = [Mark("eager PyTorch", 1e3 * eager.median_ms)]
        marks.append(Mark("vertebra", 1e3 * ours.median_ms))
        label = facts["op"] if facts["mode"] == run.report.comparisons[0].facts["mode"] else ""
        panels.setdefault(facts["mode"], []).append(Row(label, marks))
    alt = f"Microseconds of host time per call of every op; {run.report.settings['launches']}"
    found = [Panel(mode, "µs per call", rows) for mode, rows in panels.items()]
    return Chart(alt, found, columns=len(found))
