"""Which part of a page shows what; to write them all, and to say what is out of step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from ..drop_in import HEADINGS
from . import charts, compilation, figures, marks, networks, ops, runs, tuning
from .markdown import ASSETS, table
from .sources import Sources

FOLDER = Path("docs/assets")

Part = Callable[[Sources], str]
Parts = Mapping[str, Part]


def _drop_in(sources: Sources) -> str:
    return table(HEADINGS, sources.drop_in, left=len(HEADINGS))


PARTS: Parts = {
    "headline": runs.headline,
    "main": runs.main_job,
    "models": runs.models,
    "train": runs.train,
    "compile": compilation.compilation,
    "kernels": ops.kernels,
    "tune": tuning.convolutions,
    "overhead": ops.overhead,
    "traffic": ops.traffic,
    "traffic-chart": charts.traffic_chart,
    "parity": networks.parity,
    "drop-in": _drop_in,
    **{f"{name}-variants": partial(networks.variants, family=name) for name in networks.CONFIGS},
    **{f"{name}-weights": partial(networks.weights, family=name) for name in networks.CONFIGS},
}
"""What a part holds, by its name between the marks."""


def pages(root: Path) -> list[Path]:
    """Return the pages that may have such parts: the README and the documentation."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def out_of_step(
    root: Path, sources: Sources | None = None, parts: Parts | None = None
) -> Iterator[str]:
    """Yield what is not as `write` would leave it: parts, charts, and parts that no page has."""
    sources, parts = sources or Sources(root), parts or PARTS
    missing = dict.fromkeys(parts)
    for path in pages(root):
        page = path.read_text()
        for name in _names(path, page, parts):
            missing.pop(name, None)
            if marks.part(page, name) != _content(parts[name], path, sources) + "\n":
                yield f"{path.relative_to(root)}: {name}"
    yield from (f"no page has <!-- report: {name} -->" for name in missing)
    for name, chart in charts.every(sources).items():
        for path in figures.paths(root / FOLDER, name):
            if figures.digest_of(path) != chart.digest:
                yield f"{path.relative_to(root)}: the chart"


def write(root: Path, sources: Sources | None = None, parts: Parts | None = None) -> list[Path]:
    """Write parts and charts anew where they are out of step; return the files that changed."""
    sources, parts = sources or Sources(root), parts or PARTS
    changed: list[Path] = []
    for path in pages(root):
        page = path.read_text()
        _names(path, page, parts)
        content = {name: partial(_content, part, path, sources) for name, part in parts.items()}
        new = marks.fill(page, lambda name, of=content: of[name]())
        if new != page:
            path.write_text(new)
            changed.append(path)
    for name, chart in charts.every(sources).items():
        files = figures.paths(root / FOLDER, name)
        if any(figures.digest_of(file) != chart.digest for file in files):
            figures.draw(chart, root / FOLDER, name)
            changed += files
    return changed


def _names(path: Path, page: str, parts: Parts) -> list[str]:
    """Return the parts of a page."""
    try:
        names = marks.names(page)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if unknown := [name for name in names if name not in parts]:
        raise ValueError(f"{path}: parts are {', '.join(parts)}; got {', '.join(unknown)}")
    return names


def _content(part: Part, path: Path, sources: Sources) -> str:
    """Return what a part of a page is to hold."""
    assets = os.path.relpath(sources.root / FOLDER, path.parent)
    return part(sources).strip().replace(f'"{ASSETS}', f'"{assets}/')
