"""The findings as tables: one per question, then who wins where."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..report import conclude, plain_table, show_steady
from ..results import Comparison, Report, Row
from .plan import Visit
from .verdicts import amount, duration, median_of, payoffs, tally, verdicts

_STYLES = {"win": "green", "tie": "", "loss": "red"}
_PHASES = ("tracing", "autograd", "code", "kernels")


def show(report: Report, console: Console) -> None:
    """Print every comparison, who wins where, when compiling pays, and the notes."""
    for comparison in report.comparisons:
        if comparison.facts["aspect"] == "steady":
            show_steady(comparison, report.ceilings, console)
        else:
            console.print(_TABLES[comparison.facts["aspect"]](comparison))
        for row in comparison.rows:
            for text in _remarks(row):
                console.print(f"{row.provider}: {text}", markup=False, highlight=False)
    found = verdicts(report)
    table = plain_table("Who wins where", "case")
    for heading in ("question", "ours", "the peer's", "numbers", "x", "outcome"):
        table.add_column(heading, no_wrap=heading != "numbers")
    for verdict in found:
        ratio = "" if verdict.ratio is None else f"{verdict.ratio[1]:.2f}"
        cells = (verdict.case.title, verdict.question, verdict.ours, verdict.peer, verdict.numbers)
        table.add_row(*cells, ratio, verdict.outcome, style=_STYLES[verdict.outcome])
    console.print(table)
    conclude(report, (*tally(found), *(f"{payoff}." for payoff in payoffs(report))), console)


def _remarks(row: Row) -> Iterator[str]:
    if row.detail:
        yield f"{row.status}, {row.detail}"
    reasons = [*row.facts.get("reasons", ())]
    reasons += [reason for visit in row.facts.get("visits", ()) for reason in visit["reasons"]]
    yield from dict.fromkeys(reasons)


def _lines(
    comparison: Comparison,
    headings: Sequence[str],
    cells: Callable[[Row], Sequence[str]],
    last: str,
) -> Table:
    """Return a table, in which rows that were cut off before the fact `last` say so."""
    table = plain_table(comparison.name, "provider")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        style = "red" if row.refused else "" if row.peer else "bold"
        complete = row.status == "ok" and last in row.facts
        found = cells(row) if complete else ["cut off" if row.status == "ok" else row.status]
        table.add_row(row.provider, *found, style=style)
    return table


def _graphs(comparison: Comparison) -> Table:
    def cells(row: Row) -> list[str]:
        here, there = row.facts["here"], row.facts.get("on_triton")
        found = [str(row.facts[name]) for name in ("graphs", "breaks")]
        for trace in (here, there):
            found += ["", ""] if trace is None else [_operations(trace), _opaque(trace)]
        return found

    headings = ("graphs", "breaks", "operations", "ours in it", "with kernels", "ours in it")
    return _lines(comparison, headings, cells, "here")


def _operations(trace: dict[str, Any]) -> str:
    return " + ".join(str(count) for count in trace["operations"].values() if count)


def _opaque(trace: dict[str, Any]) -> str:
    return str(sum(trace["opaque"].values()))


def _starts(comparison: Comparison) -> Table:
    def cells(row: Row) -> list[str]:
        starts = row.facts["starts"]

        def middle(of: Callable[[dict[str, Any]], float]) -> float:
            return statistics.median(of(start) for start in starts)

        def phase(name: str) -> float:
            return middle(lambda start: start["compiling_s"].get(name, 0.0))

        compiled = any(start["compiling_s"] for start in starts)
        restart = median_of(row, "restart_s")
        last = starts[-1]
        return [
            duration(row.median_ms),
            *(duration(phase(name) * 1e3) if compiled else "" for name in _PHASES),
            duration(middle(lambda start: start["again_ms"][0])),
            "" if restart is None else duration(restart * 1e3),
            duration(middle(lambda start: sum(start["imports_s"].values())) * 1e3),
            duration(middle(lambda start: start["device_s"] + start["build_s"]) * 1e3),
            f"{last['kernels']} + {last['library_calls']}" if compiled else "",
            amount(middle(lambda start: start["host_bytes"])),
            _used(row),
        ]

    headings = ("first answer", *_PHASES, "second", "restart", "imports", "build")
    return _lines(comparison, (*headings, "kernels + calls", "host", "of budget"), cells, "starts")


def _shapes(comparison: Comparison) -> Table:
    visits = next((r.facts["visits"] for r in comparison.rows if "visits" in r.facts), [])

    def cells(row: Row) -> list[str]:
        found = [
            duration(visit["first_s"] * 1e3) + " *" * visit["graphs"]
            for visit in row.facts["visits"]
        ]
        base = statistics.median(row.facts["visits"][-1]["again_ms"])
        stalled = duration(row.facts["stalled_s"] * 1e3)
        return [*found, str(row.facts["recompiled"]), stalled, duration(base), _used(row)]

    headings = [str(Visit(visit["batch"], visit["size"])) for visit in visits]
    headings += ["recompiled", "stalled", "then", "of budget"]
    return _lines(comparison, headings, cells, "stalled_s")


def _used(row: Row) -> str:
    shares = [error / row.allowed[group] for group, error in row.errors.items()]
    return f"{max(shares):.0%}" if shares else ""


_TABLES: dict[str, Callable[[Comparison], Table]] = {
    "graphs": _graphs,
    "starts": _starts,
    "shapes": _shapes,
}


def write(report: Report, path: Path) -> None:
    """Write a line per row of every comparison as CSV."""
    names = ("model", "block", "direction", "aspect", "mode", "policy", "batch", "image_size")
    counts = ("graphs", "breaks", "recompiled", "stalled_s")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        more = ("ms", "restart_s", "peak_bytes", "saved_bytes", *counts, "of_budget", "detail")
        writer = csv.DictWriter(file, [*names, "dtype", "device", "provider", "status", *more])
        writer.writeheader()
        for comparison in report.comparisons:
            shared = {name: comparison.facts[name] for name in (*names, "dtype", "device")}
            for row in comparison.rows:
                writer.writerow(
                    {
                        **shared,
                        "provider": row.provider,
                        "status": row.status,
                        "ms": row.median_ms if row.samples_ms else None,
                        "restart_s": median_of(row, "restart_s"),
                        "peak_bytes": row.peak_bytes,
                        "saved_bytes": row.saved_bytes,
                        **{name: row.facts.get(name) for name in counts},
                        "of_budget": _used(row),
                        "detail": row.detail,
                    }
                )
