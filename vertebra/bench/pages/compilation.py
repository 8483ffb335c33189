"""Runs of `bench compile`: graphs, first answers, speed afterwards, and shapes that change."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from .. import report
from ..compile.verdicts import payoffs, tally, verdicts
from ..results import Comparison, Row
from .charts import shown
from .markdown import bullets, folded, paragraphs, table
from .measures import outcome
from .runs import NO_GPU_RUN, failures, provenance, where
from .sources import Sources


def compilation(sources: Sources) -> str:
    """Return every run of the comparison with torch.compile."""
    found = sources.of("compile")
    parts = [] if any(run.on_gpu for run in found) else [NO_GPU_RUN.format("`bench compile`")]
    for run in found:
        aspects: dict[str, list[Comparison]] = {}
        for comparison in run.report.comparisons:
            aspects.setdefault(comparison.facts["aspect"], []).append(comparison)
        tables = [
            folded(title, draw(aspects[aspect]))
            for aspect, (title, draw) in _ASPECTS.items()
            if aspect in aspects
        ]
        paid = (f"{payoff}." for payoff in payoffs(run.report))
        sentences = [*tally(verdicts(run.report)), *paid, *failures(run.report), *run.report.notes]
        parts += [f"### torch.compile: {where(run.report)}", shown(run)]
        parts += [bullets(sentences), *tables, provenance(run)]
    return paragraphs(*parts)


def _subject(comparison: Comparison) -> str:
    facts = comparison.facts
    return " ".join(filter(None, (facts["model"], facts["block"])))


def _graphs(comparisons: Sequence[Comparison]) -> str:
    """Return, for every provider that is compiled, what the compiler sees."""
    lines: list[list[str]] = []
    for comparison in comparisons:
        for row in comparison.rows:
            line = [_subject(comparison), comparison.facts["direction"], row.provider]
            if row.status != "ok":
                lines.append([*line, row.status, "", "", "", ""])
                continue
            here = row.facts["here"]["operations"]
            ours = row.facts.get("on_triton", {}).get("opaque", {})
            line += [str(row.facts["graphs"]), str(row.facts["breaks"])]
            line += [str(here["forward"]), str(here["backward"]), str(sum(ours.values()))]
            lines.append(line)
    headings = ["of", "direction", "provider", "graphs", "breaks", "operations forward"]
    return table([*headings, "backward", "ours, opaque, with kernels"], lines, left=3)


def _starts(comparisons: Sequence[Comparison]) -> str:
    """Return the seconds to a first answer in a fresh process; behind it, with what is cached."""

    def cell(_: Comparison, row: Row) -> str:
        again = [s["restart_s"] for s in row.facts.get("starts", []) if s["restart_s"] is not None]
        cached = f", {statistics.median(again):.1f} cached" if again else ""
        return f"{row.median_ms / 1e3:.1f}{cached}"

    return _by_provider(comparisons, "mode", cell)


def _steady(comparisons: Sequence[Comparison]) -> str:
    """Return images per second."""

    def cell(comparison: Comparison, row: Row) -> str:
        rate = report.columns(comparison, row, None)["img/s"]
        verdict = report.verdict(comparison)
        if verdict is None or row is not verdict.ours:
            return rate
        return f"{rate}, {verdict.speedup[1]:.2f}x, {outcome(verdict)}"

    return _by_provider(comparisons, "mode", cell)


def _shapes(comparisons: Sequence[Comparison]) -> str:
    """Return how often shapes were compiled anew, and the seconds that took."""

    def cell(_: Comparison, row: Row) -> str:
        return f"{row.facts['recompiled']}, {row.facts['stalled_s']:.1f} s"

    return _by_provider(comparisons, "policy", cell)


def _by_provider(
    comparisons: Sequence[Comparison], by: str, cell: Callable[[Comparison, Row], str]
) -> str:
    """Return a line per comparison with a cell per provider, its status where it has no result."""
    providers = list(dict.fromkeys(row.provider for c in comparisons for row in c.rows))
    lines: list[list[str]] = []
    for comparison in comparisons:
        rows = {row.provider: row for row in comparison.rows}
        line = [_subject(comparison), comparison.facts["direction"], comparison.facts[by]]
        for name in providers:
            row = rows.get(name)
            has = row is not None and row.status == "ok" and bool(row.samples_ms or row.facts)
            line.append(cell(comparison, row) if row and has else row.status if row else "")
        lines.append(line)
    return table(["of", "direction", by, *providers], lines, left=3)


_ASPECTS: Mapping[str, tuple[str, Callable[[Sequence[Comparison]], str]]] = {
    "graphs": ("Graphs: what the compiler sees", _graphs),
    "starts": ("Cold starts: seconds to the first answer of a fresh process", _starts),
    "steady": ("Afterwards: images per second", _steady),
    "shapes": ("Shapes that change: graphs compiled anew, and the time it took", _shapes),
}
