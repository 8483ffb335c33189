"""Charts: plain data, and how it is drawn.

Its PNGs carry a digest of the data and of this file: a chart is in step where that is equal,
whatever fonts and versions have made of its pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

_KEY = "vertebra:data"
_HOW = Path(__file__).read_text()


@dataclass(frozen=True)
class Mark:
    """What a row has on the axis: a value and what it ranges over, of a series."""

    series: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of a panel; more than one mark of a series makes a cloud."""

    label: str
    marks: Sequence[Mark]


@dataclass(frozen=True)
class Panel:
    """An axis and its rows. `lines` are drawn across, as goals are."""

    title: str
    unit: str
    rows: Sequence[Row]
    lines: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Chart:
    """Panels of bars, or of dots where a row has marks of several series.

    Attributes:
        columns: panels beside each other.
        one_scale: whether those have the same axis.
    """

    alt: str
    panels: Sequence[Panel]
    bars: bool = False
    columns: int = 1
    one_scale: bool = False

    @property
    def digest(self) -> str:
        """A digest of all that is shown, numbers to six digits, and of how."""
        content = json.dumps(_rounded(asdict(self)), sort_keys=True) + _HOW
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class _Theme:
    """Colours; of series, ours first."""

    suffix: str
    background: str
    text: str
    faint: str
    ours: str
    peer: str
    line: str


_THEMES = (
    _Theme("", "#ffffff", "#1f2328", "#d8dee4", "#0969da", "#8c959f", "#9a6700"),
    _Theme("-dark", "#0d1117", "#e6edf3", "#30363d", "#4493f8", "#8b949e", "#d29922"),
)
_OURS = "vertebra"
"""How the names of our series begin."""

_WIDTH, _ROW, _HEAD = 8.0, 0.22, 0.85  # inches
_MARKERS = (("o", 9.0), ("s", 6.0), ("D", 6.0), ("^", 6.0), ("v", 6.0))  # the last on top


def paths(folder: Path, name: str) -> list[Path]:
    """Return the files of a chart."""
    return [folder / f"{name}{theme.suffix}.png" for theme in _THEMES]


def digest_of(path: Path) -> str | None:
    """Return the digest that a PNG carries."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(_KEY)


def draw(chart: Chart, folder: Path, name: str) -> None:
    """Write a chart, for light pages and for dark ones."""
    folder.mkdir(parents=True, exist_ok=True)
    about = PngInfo()
    about.add_text(_KEY, chart.digest)
    for theme, path in zip(_THEMES, paths(folder, name), strict=True):
        drawn = BytesIO()
        _figure(chart, theme).savefig(drawn, dpi=144, facecolor=theme.background)
        few = Image.open(drawn).convert("RGB").quantize(64)  # colours: a third of the bytes
        few.save(path, optimize=True, pnginfo=about)


def _figure(chart: Chart, theme: _Theme) -> Any:
    from matplotlib.figure import Figure

    grid = [chart.panels[i : i + chart.columns] for i in range(0, len(chart.panels), chart.columns)]
    heights = [_HEAD + _ROW * max(len(panel.rows) for panel in row) for row in grid]
    figure: Any = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(
        *(len(grid), chart.columns),
        squeeze=False,
        height_ratios=heights,
    )
    for row, panels in zip(axes, grid, strict=True):
        largest = max(_end(panel) for panel in panels)
        for axis, panel in zip(row, panels, strict=False):
            end = largest if chart.one_scale else _end(panel)
            _panel(axis, panel, end, chart.bars, theme)
        for axis in row[len(panels) :]:
            axis.remove()
    if not chart.bars:
        handles, labels = axes[0][0].get_legend_handles_labels()
        found = dict(zip(labels, handles, strict=True))
        figure.legend(
            found.values(),
            found.keys(),
            loc="outside upper right",
            ncols=len(found),
            frameon=False,
            labelcolor=theme.text,
            fontsize=9,
        )
    return figure


def _end(panel: Panel) -> float:
    """Return the largest value of a panel."""
    values = [mark.high or mark.value for row in panel.rows for mark in row.marks]
    return max([*values, *panel.lines.values()])


def _panel(axis: Any, panel: Panel, end: float, bars: bool, theme: _Theme) -> None:
    places = range(len(panel.rows))
    axis.set_facecolor(theme.background)
    axis.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=theme.text)
    axis.set_xlabel(panel.unit, fontsize=9, color=theme.text)
    axis.set_yticks(places, [row.label for row in panel.rows])
    axis.tick_params(colors=theme.text, labelsize=9, length=0)
    axis.spines[:].set_visible(False)
    axis.grid(axis="x", color=theme.faint, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_ylim(len(panel.rows) - 0.4, -0.6)
    (_draw_bars if bars else _draw_dots)(axis, panel, theme)
    axis.set_xlim(0, end * (1.14 if bars else 1.04))
    if end >= 1000:
        axis.xaxis.set_major_formatter("{x:,.0f}")
    for name, value in panel.lines.items():
        axis.axvline(value, color=theme.line, linestyle="--", linewidth=1.2)
        axis.annotate(
            name,
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 1),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=theme.line,
        )


def _colour(series: str, theme: _Theme) -> str:
    return theme.ours if series.startswith(_OURS) else theme.peer


def _draw_bars(axis: Any, panel: Panel, theme: _Theme) -> None:
    end = _end(panel)
    for place, row in enumerate(panel.rows):
        (mark,) = row.marks
        low, high = mark.low or mark.value, mark.high or mark.value
        axis.barh(place, mark.value, height=0.68, color=_colour(mark.series, theme))
        axis.plot([low, high], [place, place], color=theme.text, linewidth=1.2)
        text = f"{mark.value:,.3g}" if mark.value < 1000 else f"{mark.value:,.0f}"
        box = {"facecolor": theme.background, "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        style: dict[str, Any] = {"color": theme.text, "fontsize": 8.5, "va": "center"}
        axis.text(high + end / 60, place, text, zorder=3, bbox=box, **style)


def _draw_dots(axis: Any, panel: Panel, theme: _Theme) -> None:
    series = list(dict.fromkeys(mark.series for row in panel.rows for mark in row.marks))
    for place, row in enumerate(panel.rows):
        values = [mark.value for mark in row.marks]
        axis.plot([min(values), max(values)], [place, place], color=theme.faint, linewidth=2.5)
    for name, (marker, size) in zip(series, _MARKERS, strict=False):
        points = [
            (mark.value, place)
            for place, row in enumerate(panel.rows)
            for mark in row.marks
            if mark.series == name
        ]
        axis.plot(
            *zip(*points, strict=True),
            linestyle="",
            marker=marker,
            markersize=size,
            color=_colour(name, theme),
            label=name,
        )
