"""Results for people: a table per comparison, a sentence on who won, a chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .ceilings import Ceilings
from .results import Comparison, Report, Row, quartiles

_OURS, _PEERS = "#1f77b4", "#a6a6a6"


def show(report: Report, console: Console) -> None:
    """Print every comparison, then the verdicts and the notes."""
    for comparison in report.comparisons:
        console.print(_table(comparison))
        for row in comparison.rows:
            if row.detail:
                text = f"{row.provider}: {row.status}, {row.detail}"
                console.print(text, markup=False, highlight=False)
    for sentence in (*verdicts(report), *report.notes):
        console.print(f"- {sentence}", markup=False, highlight=False)


def verdicts(report: Report) -> Iterator[str]:
    """Say of every comparison whether our best row beats the fastest peer, loses, or neither."""
    for comparison in report.comparisons:
        ours = comparison.best(peer=False)
        peer = comparison.best(peer=True)
        if ours is None or peer is None:
            continue
        speedups = comparison.speedups(ours)
        low, middle, high = quartiles(speedups)
        if len(speedups) < 3 or low <= 1 <= high:
            outcome = "not told apart from"
        else:
            outcome = "faster than" if middle > 1 else "a loss: slower than"
        yield (
            f"{comparison.name}: {ours.provider} is {outcome} the fastest peer ({peer.provider} in "
            f"the median), {middle:.2f}x its speed [quartiles {low:.2f} to {high:.2f}]."
        )


def _table(comparison: Comparison) -> Table:
    rate, unit = _rate(comparison)
    table = plain_table(comparison.name, "provider")
    for heading in ("ms", "±", unit, "x peer", "error", "budget", "top-1", "first"):
        table.add_column(heading, justify="right", no_wrap=True)
    weighed = any(row.peak_bytes is not None for row in comparison.rows)
    for heading in ("peak GB", "saved GB") if weighed else ():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        style = "red" if row.failed else "" if row.peer else "bold"
        cells = [row.provider, *_times(comparison, row, rate), *_checks(row)]
        if weighed:
            cells += [_gigabytes(row.peak_bytes), _gigabytes(row.saved_bytes)]
        table.add_row(*cells, style=style)
    return table


def plain_table(title: str, first: str) -> Table:
    """Return an empty table in the house's form, with its first column."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    table.add_column(first, no_wrap=True)
    return table


def _times(comparison: Comparison, row: Row, rate: float) -> list[str]:
    """Show the median, half the distance between the quartiles, the rate and the speedup."""
    if row.status != "ok" or not row.samples_ms:
        return [row.status, "", "", ""]
    low, middle, high = quartiles(row.samples_ms)
    speedups = comparison.speedups(row)
    return [
        f"{middle:.4g}",
        f"{(high - low) / 2 / middle:.0%}",
        f"{rate / middle:,.0f}" if rate / middle >= 10 else f"{rate / middle:.2f}",
        f"{statistics.median(speedups):.2f}" if speedups else "",
    ]


def _checks(row: Row) -> list[str]:
    """Show the group that comes closest to what it is allowed, and the share of that it uses."""
    used = {group: error / row.allowed[group] for group, error in row.errors.items()}
    group = max(used, key=used.__getitem__, default="")
    return [
        f"{row.errors[group]:.1e}" if group else "",
        f"{used[group]:.0%}" if group else "",
        "" if row.top1 is None else f"{row.top1:.0%}",
        "" if row.first_call_s is None else f"{row.first_call_s:.1f} s",
    ]


def _rate(comparison: Comparison) -> tuple[float, str]:
    """Return what, divided by milliseconds, is the rate to show, and the rate's unit."""
    if "images" in comparison.work:
        return comparison.work["images"] * 1e3, "img/s"
    return comparison.work["bytes"] / 1e6, "GB/s"


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"


def show_kernels(report: Report, console: Console) -> None:
    """Print one line per comparison: everybody's time, our bandwidth as a share of a copy's."""
    providers = list(dict.fromkeys(row.provider for c in report.comparisons for row in c.rows))
    table = plain_table("ms per call", "case")
    for heading in ("pass", "path", *providers, "GB/s", "of copy", "x peer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for comparison in report.comparisons:
        rows = {row.provider: row for row in comparison.rows}
        cells = {name: _times(comparison, row, _rate(comparison)[0]) for name, row in rows.items()}
        ours = comparison.best(peer=False)
        _, _, rate, speedup = cells[ours.provider] if ours else [""] * 4
        share = ""
        if ours is not None:
            achieved = comparison.work["bytes"] / statistics.median(ours.samples_ms) * 1e3
            share = f"{achieved / comparison.facts['copy_bytes_per_s']:.0%}"
        times = [cells[name][0] if name in cells else "" for name in providers]
        facts = [comparison.facts[key] for key in ("case", "direction", "path")]
        table.add_row(*facts, *times, rate, share, speedup)
    console.print(table)


def show_ceilings(ceilings: Ceilings, console: Console) -> None:
    """Print the rates of a machine."""
    table = plain_table("Ceilings measured here", "what")
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_row("copy, read and written", f"{ceilings.copy_bytes_per_s / 1e9:,.0f} GB/s")
    for name, rate in ceilings.matmul_flops_per_s.items():
        table.add_row(f"matrix product, {name}", f"{rate / 1e12:,.3g} TFLOP/s")
    fma = f"{ceilings.fma_flops_per_s / 1e12:,.3g} TFLOP/s"
    table.add_row("multiply-adds outside of tensor cores, fp32", fma)
    console.print(table)


def plot(report: Report, path: Path) -> None:
    """Draw every comparison's rates as bars, with the quartiles, into one image."""
    from matplotlib.figure import Figure

    comparisons = [comparison for comparison in report.comparisons if comparison.timed]
    if not comparisons:
        return
    figure = Figure(figsize=(10, 0.8 + 2.6 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), 1, squeeze=False)[:, 0]
    for axis, comparison in zip(axes, comparisons, strict=True):
        rate, unit = _rate(comparison)
        rows = comparison.timed[::-1]
        spread = [[rate / ms for ms in quartiles(row.samples_ms)] for row in rows]
        bars = axis.barh(
            [row.provider for row in rows],
            [middle for _, middle, _ in spread],
            xerr=[[m - h for _, m, h in spread], [lo - m for lo, m, _ in spread]],
            color=[_PEERS if row.peer else _OURS for row in rows],
        )
        axis.bar_label(bars, fmt="{:,.3g}", padding=8)
        axis.margins(x=0.12)
        axis.set_xlabel(unit)
        axis.set_title(comparison.name, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.environment['device']}, torch {report.environment['torch']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
