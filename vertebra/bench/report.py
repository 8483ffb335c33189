"""Results for people: a table per comparison, or a line, and a sentence on who won."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .ceilings import Ceilings
from .results import Comparison, Report, Row, quartiles

_ENOUGH = 3  # rounds, of which quartiles say something


def show(report: Report, console: Console) -> None:
    """Print every comparison, then the verdicts and the notes."""
    for comparison in report.comparisons:
        show_steady(comparison, report.ceilings, console)
        for row in comparison.rows:
            if row.detail:
                text = f"{row.provider}: {row.status}, {row.detail}"
                console.print(text, markup=False, highlight=False)
    conclude(report, sentences(report), console)


def conclude(report: Report, sentences: Iterable[str], console: Console) -> None:
    """Print sentences, the notes, and what went wrong."""
    if report.ceilings is not None:
        sentences = (*sentences, *_measured(report.ceilings, report))
    for sentence in (*sentences, *report.notes):
        console.print(f"- {sentence}", markup=False, highlight=False)
    for failure in report.failures:
        console.print(f"FAILED: {failure}", style="red", markup=False, highlight=False)
    if report.interrupted:
        console.print("Interrupted: what was done until then is kept.", style="yellow")


def _measured(ceilings: Ceilings, report: Report) -> Iterator[str]:
    rates = (f"{n} {_tera(rate)}" for n, rate in ceilings.matmul_flops_per_s.items())
    yield (
        f"Here a copy moves {ceilings.copy_bytes_per_s / 1e9:,.0f} GB/s, and matrix products do "
        f"{', '.join(rates)} TFLOP/s."
    )
    if report.kind == "kernels":
        yield "The floor is what the op has to move, at the copy's rate."
    elif any("floor_ms" in comparison.facts for comparison in report.comparisons):
        yield (
            "The floor is one kernel per convolution, all else part of those, at these rates; "
            "--floor shows it part by part, and others."
        )


class Verdict(NamedTuple):
    """How our best row of a comparison does beside the fastest peer, in quartiles of speed."""

    comparison: Comparison
    ours: Row
    peer: Row
    outcome: Literal["faster than", "a loss: slower than", "not told apart from"]
    speedup: tuple[float, float, float]


def verdict(comparison: Comparison) -> Verdict | None:
    """Return the verdict on a comparison, if it has a row of ours and one of a peer."""
    ours = comparison.best(peer=False)
    peer = comparison.best(peer=True)
    if ours is None or peer is None:
        return None
    speedups = comparison.speedups(ours)
    low, middle, high = quartiles(speedups)
    if len(speedups) < _ENOUGH or low <= 1 <= high:
        outcome = "not told apart from"
    else:
        outcome = "faster than" if middle > 1 else "a loss: slower than"
    return Verdict(comparison, ours, peer, outcome, (low, middle, high))


def verdicts(report: Report) -> Iterator[Verdict]:
    """Yield the verdict on every comparison that has both."""
    found = map(verdict, report.comparisons)
    yield from (each for each in found if each is not None)


def sentences(report: Report) -> Iterator[str]:
    """Say of every comparison whether our best row beats the fastest peer, loses, or neither."""
    for comparison, ours, peer, outcome, (low, middle, high) in verdicts(report):
        yield (
            f"{comparison.name}: {ours.provider} is {outcome} the fastest peer ({peer.provider} in "
            f"the median), {middle:.2f}x its speed [quartiles {low:.2f} to {high:.2f}]"
            f"{'' if len(ours.samples_ms) >= _ENOUGH else ', in too few rounds to tell'}."
        )


def tally(report: Report) -> Iterator[str]:
    """Say how many comparisons we win, and name those we lose."""
    found = list(verdicts(report))
    count = {outcome: 0 for outcome in ("faster than", "not told apart from")}
    for verdict in found:
        count[verdict.outcome] = count.get(verdict.outcome, 0) + 1
    parts = [f"{number} {outcome}" for outcome, number in count.items()]
    yield f"Of {len(found)} comparisons, ours are {', '.join(parts)} the fastest peer."
    for comparison, ours, peer, outcome, (_, middle, _) in found:
        if outcome.startswith("a loss"):
            yield f"a loss: {comparison.name}, {ours.provider} {middle:.2f}x {peer.provider}"


def show_steady(comparison: Comparison, ceilings: Ceilings | None, console: Console) -> None:
    """Print the table of a comparison: times, rates, errors, memory."""
    if not comparison.rows:  # it was begun, and no more
        return
    lines = {row.provider: columns(comparison, row, ceilings) for row in comparison.rows}
    headings = list(dict.fromkeys(heading for cells in lines.values() for heading in cells))
    table = plain_table(comparison.name, "provider")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        style = "red" if row.refused else "" if row.peer else "bold"
        cells = [lines[row.provider].get(heading, "") for heading in headings]
        table.add_row(row.provider, *cells, style=style)
    print_table(console, table, "of budget", "top-1", "TFLOP/s", "first", "±", "of floor")


def plain_table(title: str, first: str) -> Table:
    """Return an empty table in the house's form, with its first column."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    table.add_column(first, no_wrap=True)
    return table


def print_table(console: Console, table: Table, *least: str) -> None:
    """Print a table; of columns that do not fit, leave out `least`, the first ones first."""
    unbounded = console.options.update(width=10_000)  # a measurement is within its options' width
    for column in table.columns:
        if column.no_wrap:  # which alone does not keep rich from cutting it off
            column.min_width = max(
                Measurement.get(console, unbounded, cell).maximum
                for cell in (column.header, *column.cells)
            )
    left_out: list[str] = []
    for heading in least:
        if Measurement.get(console, unbounded, table).minimum <= console.width:
            break
        kept = [column for column in table.columns if column.header != heading]
        left_out += [heading] * (len(kept) < len(table.columns))
        table.columns[:] = kept
        for i, column in enumerate(kept):
            column._index = i  # pyright: ignore[reportPrivateUsage]
    if left_out:
        names = ", ".join(" ".join(heading.split()) for heading in left_out)
        table.caption = f"a wider terminal also shows {names}"
        table.caption_justify = "left"
    console.print(table)


def columns(comparison: Comparison, row: Row, ceilings: Ceilings | None) -> dict[str, str]:
    """Return what there is to say about a row, by heading."""
    cells: dict[str, str] = {"ms": row.status}
    if row.status == "ok" and not row.samples_ms:
        cells["ms"] = "not timed"
    elif row.status == "ok":
        cells = _times(comparison, row, ceilings)
    used = {group: error / row.allowed[group] for group, error in row.errors.items()}
    if group := max(used, key=used.__getitem__, default=""):
        cells |= {"error": f"{row.errors[group]:.1e}", "of budget": f"{used[group]:.0%}"}
    if row.top1 is not None:
        cells["top-1"] = f"{row.top1:.0%}"
    if row.first_call_s is not None:
        cells["first"] = _seconds(row.first_call_s)
    for heading, size in (("peak", row.peak_bytes), ("saved", row.saved_bytes)):
        if size is not None:
            cells[heading] = _bytes(size)
    return cells


def _times(comparison: Comparison, row: Row, ceilings: Ceilings | None) -> dict[str, str]:
    """Show the median, half the distance between the quartiles, the rates and the speedup."""
    low, middle, high = quartiles(row.samples_ms)
    cells = {"ms": f"{middle:.4g}", "±": f"{(high - low) / 2 / middle:.0%}"}
    for unit, amount in rates(comparison, row).items():
        cells[unit] = f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"
    if (floor := comparison.floor_ms(ceilings)) is not None:
        cells["of floor"] = f"{floor / middle:.0%}"
    if speedups := comparison.speedups(row):
        cells["x peer"] = f"{statistics.median(speedups):.2f}"
    return cells


def rates(comparison: Comparison, row: Row) -> dict[str, float]:
    """Return what a row does in a second, by unit, from its median."""
    units = {"images": ("img/s", 1.0), "bytes": ("GB/s", 1e9), "flops": ("TFLOP/s", 1e12)}
    return {
        unit: comparison.work[kind] / one / (row.median_ms / 1e3)
        for kind, (unit, one) in units.items()
        if kind in comparison.work
    }


def _seconds(time: float) -> str:
    return f"{time:.1f} s" if time >= 0.1 else f"{1e3 * time:.0f} ms"


def _bytes(size: int) -> str:
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def show_kernels(report: Report, console: Console) -> None:
    """Print a table per way to call an op, a line per case and pass: how long everybody takes."""
    calls: dict[str, list[Comparison]] = {}
    for comparison in report.comparisons:
        facts = comparison.facts
        options = f" ({facts['options']})" if facts["options"] else ""
        title = f"{facts['op']}{options}, {facts['dtype']}, on {facts['path']}: ms per call"
        calls.setdefault(title, []).append(comparison)
    for title, comparisons in calls.items():
        table = _kernels_table(title, comparisons, report.ceilings)
        print_table(console, table, "saved", "GB/s", "±", "of\nfloor", "x\npeer")
        for comparison in comparisons:
            for row in comparison.rows:
                if row.detail and row.status != "absent":
                    text = f"{comparison.name}, {row.provider}: {row.status}, {row.detail}"
                    console.print(text, markup=False, highlight=False)
    console.print(
        "Medians. ±: half the distance between the quartiles; ±, GB/s, of floor, x peer and saved "
        "are of our fastest; saved: what it keeps for the backward pass, of what eager keeps."
    )
    conclude(report, tally(report), console)


def _kernels_table(
    title: str, comparisons: Sequence[Comparison], ceilings: Ceilings | None
) -> Table:
    rows = [row for comparison in comparisons for row in comparison.rows]
    providers = list(dict.fromkeys(row.provider for row in rows if row.status != "absent"))
    table = plain_table(title, "case")
    table.add_column("pass", no_wrap=True)
    for heading in (*providers, "±", "GB/s", "of floor", "x peer", "saved"):
        words = heading.replace("-", "-\n").replace(" ", "\n")
        table.add_column(words, justify="right", no_wrap=True)
    for comparison in comparisons:
        facts = comparison.facts
        by_name = {row.provider: row for row in comparison.rows}
        ours = comparison.best(peer=False)
        best = {} if ours is None else columns(comparison, ours, ceilings)
        shape = "x".join(map(str, facts["shape"]))
        cells = [f"{shape} {facts['layout']} {facts['numbers']}", facts["direction"]]
        for name in providers:
            row = by_name.get(name)
            here = row if row is not None and row.status != "absent" else None
            cells.append("-" if here is None else columns(comparison, here, ceilings)["ms"])
        cells += [best.get(heading, "") for heading in ("±", "GB/s", "of floor", "x peer")]
        refused = any(row.refused for row in comparison.rows)
        table.add_row(*cells, _saved(comparison.rows, ours), style="red" if refused else "")
    return table


def _saved(rows: Iterable[Row], ours: Row | None) -> str:
    """Return what ours keeps for the backward pass as a share of what eager keeps."""
    eager = next((row.saved_bytes for row in rows if row.provider == "eager"), None)
    if not eager or ours is None or ours.saved_bytes is None:
        return ""
    return f"{ours.saved_bytes / eager:.2f}"


def show_ceilings(ceilings: Ceilings, console: Console) -> None:
    """Print the rates of a machine."""
    table = plain_table("Ceilings measured here", "what")
    table.add_column("rate", justify="right", no_wrap=True)
    table.add_row("copy, read and written", f"{ceilings.copy_bytes_per_s / 1e9:,.0f} GB/s")
    for name, rate in ceilings.matmul_flops_per_s.items():
        table.add_row(f"matrix product, {name}", f"{_tera(rate)} TFLOP/s")
    fma = f"{_tera(ceilings.fma_flops_per_s)} TFLOP/s"
    table.add_row("multiply-adds outside of tensor cores, fp32", fma)
    console.print(table)


def _tera(rate: float) -> str:
    return f"{rate / 1e12:,.0f}" if rate >= 1e14 else f"{rate / 1e12:.3g}"
