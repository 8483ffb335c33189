"""A roofline as a picture: time against floor, part by part, in every schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .roofline import WAYS, Roofline
from .schedules import Bound, Way

_COLOURS: dict[Bound, str] = {"memory": "#4878cf", "tensor": "#e08b3e", "fma": "#6aa56e"}
_NAMES = {"memory": "memory", "tensor": "matrix products", "fma": "other arithmetic"}


def plot(roofline: Roofline, path: Path) -> None:
    """Draw each schedule as a row of bars, a part each, by what its kernels wait for.

    What was measured is outlined around the bars of the schedule that ran.
    """
    from matplotlib.figure import Figure

    parts = [part.name for part in roofline.anatomy.parts]
    ways = list(roofline.schedules)
    width, height = max(8.0, 0.3 * len(parts) + 2), 1.7 * len(ways) + 1.6
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(ways), 1, sharex=True, sharey=True)
    for axis, way in zip(axes, ways, strict=True):
        _floors(axis, roofline, way, parts)
        axis.set_ylabel("us / image")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    axes[0].set_ylim(0, 1.08 * max(axis.get_ylim()[1] for axis in axes) / 1.05)
    axes[-1].tick_params(axis="x", labelrotation=90)
    drawn: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        drawn |= zip(labels, handles, strict=True)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, frameon=False)
    size, dtype = roofline.anatomy.image_size, str(roofline.dtype).removeprefix("torch.")
    kind = "forward and backward" if roofline.training else "inference"
    figure.suptitle(
        f"{roofline.anatomy.name}, {kind}: floors at {roofline.batch} x {size} x {size}, {dtype}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _floors(axis: Any, roofline: Roofline, way: Way, parts: list[str]) -> None:
    per_image = 1e6 / roofline.batch
    kernels = roofline.parts(way)
    waits = [roofline.waits(kernels.get(part, [])) for part in parts]
    bottom = [0.0] * len(parts)
    for bound, colour in _COLOURS.items():
        heights = [per_image * found[bound] for found in waits]
        if any(heights):
            label = f"waits for {_NAMES[bound]}"
            axis.bar(parts, heights, 0.8, bottom, color=colour, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    total = roofline.schedules[way].floor(roofline.rates)
    title = f"{WAYS[way]}: {total * per_image:,.4g} us, {roofline.batch / total:,.0f} images/s"
    if roofline.measured is not None and roofline.measured.way == way:
        times = [roofline.measured.seconds.get(part, 0.0) for part in parts]
        heights = [per_image * seconds for seconds in times]
        axis.bar(parts, heights, 0.8, fill=False, edgecolor="black", label="measured")
        title += f"; measured {per_image * sum(times):,.4g} us"
    axis.set_title(title, loc="left", fontsize=10)
