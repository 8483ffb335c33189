"""The ops: their times beside eager's, what their calls cost the host, the bytes they move."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .. import report
from ..goals import COPY_SHARE
from ..results import Comparison, Row
from .charts import shown
from .markdown import bullets, code, folded, paragraphs, table
from .measures import copy_share, eager_and_ours, outcome, times_eager
from .runs import NO_GPU_RUN, failures, provenance
from .sources import Result, Sources


def kernels(sources: Sources) -> str:
    """Return every run of the ops, a table for each op."""
    found = sources.of("kernels")
    parts = [] if any(run.on_gpu for run in found) else [_no_run("vertebra bench kernels")]
    for run in found:
        environment = run.report.environment
        parts.append(f"### Ops: {environment['device']}, torch {environment['torch']}")
        sentences = [*report.tally(run.report), *_below_goal(run), *failures(run.report)]
        parts += [shown(run), bullets([*sentences, *run.report.notes]), provenance(run)]
        by_op: dict[str, list[Comparison]] = {}
        for comparison in run.report.comparisons:
            by_op.setdefault(comparison.facts["op"], []).append(comparison)
        parts += [folded(op, _op(run, comparisons)) for op, comparisons in by_op.items()]
    return paragraphs(*parts)


def _no_run(command: str) -> str:
    return NO_GPU_RUN.format(code(command))


def _op(run: Result, comparisons: Sequence[Comparison]) -> str:
    providers = list(dict.fromkeys(row.provider for c in comparisons for row in c.rows))
    headings = ["map", "options", "pass", "path"]
    headings += [*(f"{name}, ms" for name in providers), "GB/s", "of copy", "x peer", ""]
    lines: list[list[str]] = []
    for comparison in comparisons:
        facts = comparison.facts
        rows = {row.provider: row for row in comparison.rows}
        shape = " x ".join(map(str, facts["shape"]))
        line = [f"{shape} {facts['layout']}", facts["options"], facts["direction"], facts["path"]]
        line += [_ms(comparison, rows.get(name)) for name in providers]
        ours, verdict = comparison.best(peer=False), report.verdict(comparison)
        cells = {} if ours is None else report.columns(comparison, ours, None)
        share = copy_share(run, comparison)
        line += [cells.get("GB/s", ""), "" if share is None else f"{share:.0%}"]
        line += [cells.get("x peer", ""), "" if verdict is None else outcome(verdict)]
        lines.append(line)
    return table(headings, lines, left=4)


def _ms(comparison: Comparison, row: Row | None) -> str:
    return "" if row is None else report.columns(comparison, row, None)["ms"]


def _below_goal(run: Result) -> list[str]:
    """Say how many reach the share of a copy's bandwidth that they should."""
    shares = [s for c in run.report.comparisons if (s := copy_share(run, c)) is not None]
    if not shares:
        return []
    reached = sum(share >= COPY_SHARE for share in shares)
    return [
        f"Goal: {COPY_SHARE:.0%} of the bandwidth of a copy. {reached} of {len(shares)} reach it; "
        f"the median is {statistics.median(shares):.0%}."
    ]


def overhead(sources: Sources) -> str:
    """Return what calls cost the host."""
    found = sources.of("overhead")
    parts = [] if any(run.on_gpu for run in found) else [_no_run("vertebra bench overhead")]
    for run in found:
        launches = run.report.settings["launches"]
        parts += [
            f"Microseconds per call, median [least]; launches: {launches}.",
            _overhead(run),
            shown(run),
            paragraphs(bullets(_slower(run)), provenance(run)),
        ]
    return paragraphs(*parts)


def _overhead(run: Result) -> str:
    modes = list(dict.fromkeys(c.facts["mode"] for c in run.report.comparisons))
    by_op: dict[str, dict[str, list[str]]] = {}
    for comparison in run.report.comparisons:
        eager, ours = eager_and_ours(comparison)
        cells = [_us(eager), _us(ours), f"{times_eager(comparison):.2f}"]
        by_op.setdefault(comparison.facts["op"], {})[comparison.facts["mode"]] = cells
    headings = [cell for mode in modes for cell in (f"{mode}: eager", "vertebra", "x eager")]
    lines = [
        [code(op), *(cell for mode in modes for cell in cells.get(mode, ["", "", ""]))]
        for op, cells in by_op.items()
    ]
    return table(["op", *headings], lines)


def _us(row: Row) -> str:
    return f"{1e3 * row.median_ms:.1f} [{1e3 * min(row.samples_ms):.1f}]"


def _slower(run: Result) -> list[str]:
    """Name the calls that cost more than eager's."""
    found = [(c, times_eager(c)) for c in run.report.comparisons]
    losses = [f"{code(c.facts['op'])} {c.facts['mode']} {times:.2f}x" for c, times in found]
    losses = [loss for loss, (_, times) in zip(losses, found, strict=True) if times > 1]
    if not losses:
        return []
    return [f"A loss: {len(losses)} of {len(found)} cost more than eager's: {', '.join(losses)}."]


def traffic(sources: Sources) -> str:
    """Return the bytes that ops move, in maps of x, beside what eager PyTorch has to move."""
    headings = ["op", "options", "forward", "eager", "ratio", "backward", "eager", "ratio"]
    lines: list[list[str]] = []
    for op, options, ours, eager in sources.traffic:
        line = [code(op), options]
        for mine, theirs in zip(ours, eager, strict=True):
            ratio = f"{theirs / mine:.2f}" if mine else ""  # an op without a backward pass
            line += [f"{mine:.4g}", f"{theirs:.4g}", ratio]
        lines.append(line)
    return table(headings, lines, left=2)
