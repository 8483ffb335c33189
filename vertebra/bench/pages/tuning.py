"""Convolutions: what `vertebra tune` found to be the fastest candidate of each."""

from __future__ import annotations

from .. import tune
from .markdown import bullets, code, folded, paragraphs, table
from .runs import NO_GPU_RUN, failures, provenance
from .sources import Sources


def convolutions(sources: Sources) -> str:
    """Return every run of tuning: what it gained, and its choices in a table."""
    found = sources.of("tune")
    parts = [] if any(run.on_gpu for run in found) else [NO_GPU_RUN.format(code("vertebra tune"))]
    for run in found:
        environment = run.report.environment
        parts.append(f"### Convolutions: {environment['device']}, torch {environment['torch']}")
        parts += [bullets([*tune.totals(run.report), *failures(run.report)]), provenance(run)]
        parts.append(folded("site by site", table(tune.HEADINGS, tune.lines(run.report), left=2)))
    return paragraphs(*parts)
