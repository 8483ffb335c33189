"""Runs of whole models: the main job, inference, training, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .. import goals, report
from ..results import Comparison, Report, Row
from .charts import shown, traffic_chart
from .markdown import bullets, code, folded, paragraphs, table
from .measures import ceilings, outcome
from .sources import Result, Sources

NO_GPU_RUN = "No GPU run of {} has been committed yet."


def about(run: Result) -> str:
    """Return what a reader of a run's tables must know."""
    found = run.report
    sentences = [*report.sentences(found), *failures(found), *found.notes]
    return paragraphs(bullets([*sentences, *noise(run)]), provenance(run))


def noise(run: Result) -> Iterator[str]:
    """Say of a run without a GPU that its times are noisy."""
    if not run.on_gpu:
        yield (
            f"A CPU with {run.report.environment['cores']} cores that other work shares: the times "
            "are noisy, and small differences mean nothing."
        )


def failures(found: Report) -> Iterator[str]:
    """Say of every row without an answer why it has none."""
    for comparison in found.comparisons:
        for row in comparison.rows:
            if row.detail:
                detail = " ".join(row.detail.split())
                yield f"{comparison.name}, {row.provider}: {row.status}, {detail}"


def provenance(run: Result) -> str:
    """Return where numbers come from: machine, versions, source, file."""
    environment = run.report.environment
    versions = [
        f"{name} {environment[name]}"
        for name in ("torch", "triton", "python", "driver")
        if environment.get(name)
    ]
    commit = str(environment["commit"] or "unknown")
    dirty = " with changes" if commit.endswith("-dirty") else ""
    return (
        f"{environment['device']}, {', '.join(versions)}; commit {code(commit[:10])}{dirty}; "
        f"{code(run.path)}."
    )


def where(found: Report) -> str:
    """Return the title of a run."""
    return f"{found.environment['device']}, torch {found.environment['torch']}"


# a line per provider, the comparisons beside each other


def _side_by_side(run: Result) -> str:
    found = run.report
    providers = list(dict.fromkeys(row.provider for c in found.comparisons for row in c.rows))
    headings = [""]
    for comparison in found.comparisons:
        headings += [f"{_short(comparison)}, img/s", "x fastest peer"]
    lines = [
        [_emphasised(name, found), *(cell for c in found.comparisons for cell in _pair(c, name))]
        for name in providers
    ]
    return table(headings, lines)


def _short(comparison: Comparison) -> str:
    """Return the name of a comparison up to its sizes, which are all the same."""
    return comparison.name.partition(", ")[0]


def _emphasised(provider: str, found: Report) -> str:
    """Return a provider in bold where it is ours."""
    rows = (row for c in found.comparisons for row in c.rows if row.provider == provider)
    return provider if next(rows).peer else f"**{provider}**"


def _pair(comparison: Comparison, provider: str) -> tuple[str, str]:
    row = next((row for row in comparison.rows if row.provider == provider), None)
    if row is None:
        return "", ""
    cells = report.columns(comparison, row, None)
    return cells.get("img/s", cells["ms"]), cells.get("x peer", "")


# a line per comparison, the goals beside it


def overview(run: Result) -> str:
    """Return a table with a line per comparison: our best, the fastest peer, the goal."""
    found = run.report
    headings = ["model", "images", "ours, img/s", "fastest peer, img/s", "x peer", "", "of floor"]
    headings += ["goal", "of goal", "stretch", "saved, of eager's", "goal"]
    lines: list[list[str]] = []
    for comparison in found.comparisons:
        line = [comparison.facts["model"], str(comparison.facts["batch"])]
        verdict = report.verdict(comparison)
        if verdict is None:
            ours, peer = comparison.best(peer=False), comparison.best(peer=True)
            line += [_rate(comparison, ours), _rate(comparison, peer), "", "", ""]
        else:
            low, middle, high = verdict.speedup
            line += [_rate(comparison, verdict.ours), _rate(comparison, verdict.peer)]
            line += [f"{middle:.2f} [{low:.2f} to {high:.2f}]", outcome(verdict)]
            line += [report.columns(comparison, verdict.ours, ceilings(run)).get("of floor", "")]
        lines.append([*line, *_against_goal(found, comparison), *_saved(comparison)])
    kept = [i for i in range(len(headings)) if i < 6 or any(line[i] for line in lines)]
    return table([headings[i] for i in kept], [[line[i] for i in kept] for line in lines])


def _rate(comparison: Comparison, row: Row | None) -> str:
    if row is None:
        return "none"
    return f"{report.rates(comparison, row)['img/s']:,.0f} ({row.provider})"


def _against_goal(found: Report, comparison: Comparison) -> Sequence[str]:
    goal = goals.of(found, comparison)
    if goal is None:
        return "", "", ""
    ours = comparison.best(peer=False)
    reached = 0.0 if ours is None else report.rates(comparison, ours)["img/s"]
    missed = "" if reached >= goal.rate else ", missed"
    return f"{goal.rate:,.0f}", f"{reached / goal.rate:.0%}{missed}", f"{goal.stretch:,.0f}"


def _saved(comparison: Comparison) -> tuple[str, str]:
    """Return what ours keeps for the backward pass as a share of what eager keeps, and the goal."""
    ours = comparison.best(peer=False)
    eager = next((r.saved_bytes for r in comparison.rows if r.provider == "eager-nhwc"), None)
    if ours is None or not ours.saved_bytes or not eager:
        return "", ""
    goal = goals.SAVED_SHARE.get(comparison.facts["model"])
    share = ours.saved_bytes / eager
    missed = ", missed" if goal is not None and share > goal else ""
    return f"{share:.2f}{missed}", "" if goal is None else f"{goal:.2f}"


# a line per provider, one comparison in full


def _in_full(comparison: Comparison, run: Result) -> str:
    lines = {
        row.provider: report.columns(comparison, row, ceilings(run)) for row in comparison.rows
    }
    headings = list(dict.fromkeys(heading for cells in lines.values() for heading in cells))
    content = [
        [_emphasised(provider, run.report), *(cells.get(h, "") for h in headings)]
        for provider, cells in lines.items()
    ]
    return table(["", *headings], content)


# what pages show


def headline(sources: Sources) -> str:
    """Return the README's table and chart: what GPUs reach, or the main job and what is counted."""
    on_gpu = [run for run in sources.of("models", "train") if run.on_gpu]
    if on_gpu:
        tables = (part for run in on_gpu for part in (overview(run), provenance(run)))
        return paragraphs(*tables, shown(on_gpu[0]))
    parts: list[str] = []
    for run in sources.of("main")[:1]:
        sentences = " ".join((*report.sentences(run.report), *noise(run)))
        parts = [_side_by_side(run), f"{sentences} {provenance(run)}"]
    counted = (
        "No GPU run has been committed yet. What GPU kernels save can be counted: maps of the size "
        "of its input that a call reads and writes, in fp32, beside eager PyTorch's operations."
    )
    return paragraphs(*parts, counted, traffic_chart(sources))


def main_job(sources: Sources) -> str:
    """Return every main job: its providers side by side, then each mode in full."""
    return _all(sources, "main", "vertebra bench", _side_by_side)


def models(sources: Sources) -> str:
    """Return every run of inference."""
    return _all(sources, "models", "vertebra bench models")


def train(sources: Sources) -> str:
    """Return every run of training."""
    return _all(sources, "train", "vertebra bench train")


def _all(
    sources: Sources, kind: str, command: str, first: Callable[[Result], str] = overview
) -> str:
    found = sources.of(kind)
    parts = [] if any(run.on_gpu for run in found) else [NO_GPU_RUN.format(code(command))]
    for run in found:
        dtypes = dict.fromkeys(str(c.facts["dtype"]) for c in run.report.comparisons)
        title = ", ".join([where(run.report), *dtypes])
        parts += [f"### {title}", first(run), shown(run), about(run)]
        parts += [folded(c.name, _in_full(c, run)) for c in run.report.comparisons]
    return paragraphs(*parts)
