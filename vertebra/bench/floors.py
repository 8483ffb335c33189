"""`bench models --floor`: rooflines as tables, charts and JSON, and measured times beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import create_model
from . import ceilings, environment
from .ceilings import DTYPES
from .report import plain_table
from .roofline import PRESETS, WAYS, Roofline, bound_of, draw, measure_parts, rates_of
from .runner import settle_threads
from .schedules import Rates
from .settings import Settings


def run(
    names: Sequence[str],
    settings: Settings,
    *,
    training: bool,
    machine: str | None = None,
    rates: dict[str, float | None],
    console: Console,
    say: Callable[[str], None],
    plots: Path | None = None,
    data: Path | None = None,
) -> None:
    """Show the roofline of every model and batch; with the rates of this machine, times as well.

    Args:
        names: models of this library.
        settings: device, dtype, batches, image size, rounds.
        training: forward and backward instead of inference.
        machine: one of `PRESETS`, whose rates to use; None for those measured here.
        rates: by the fields of `Rates`; what is not None goes before the machine's.
        console: where the tables go.
        say: told what comes next.
        plots: where to draw; with several rooflines, each to a file of its own beside it.
        data: where to write all of it as JSON.
    """
    chosen = _rates(settings, machine, rates, say)
    here = machine is None and not any(rates.values())
    found: list[tuple[Roofline, dict[str, float] | None]] = []
    for name in names:
        for batch in settings.batches:
            say(f"{name}, batch {batch}")
            roofline = draw(
                name,
                chosen,
                training=training,
                batch=batch,
                image_size=settings.image_size,
                dtype=DTYPES[settings.dtype],
            )
            measured = _measured(roofline, settings) if here and not training else None
            show(roofline, console)
            show_parts(roofline, console, measured)
            found.append((roofline, measured))
    if plots is not None:
        for roofline, measured in found:
            path = plots
            if len(found) > 1:
                path = plots.with_stem(f"{plots.stem}-{roofline.anatomy.name}-{roofline.batch}")
            plot(roofline, path, measured)
            say(f"written: {path}")
    if data is not None:
        _write(data, settings, found)
        say(f"written: {data}")


def _rates(
    settings: Settings,
    machine: str | None,
    given: dict[str, float | None],
    say: Callable[[str], None],
) -> Rates:
    named = {name: rate for name, rate in given.items() if rate is not None}
    if any(rate <= 0 for rate in named.values()):
        raise ValueError("rates must be positive")
    if len(named) == len(Rates._fields):
        return Rates(**named)
    if machine is not None:
        if machine not in PRESETS:
            raise ValueError(f"machines are {', '.join(PRESETS)}; got {machine!r}")
        return PRESETS[machine]._replace(**named)
    device = torch.device(settings.device)
    if device.type == "cpu":
        settle_threads()
    measured = ceilings.measure(device, (settings.dtype,), tiny=settings.tiny, say=say)
    return rates_of(measured, DTYPES[settings.dtype])._replace(**named)


def _measured(roofline: Roofline, settings: Settings) -> dict[str, float]:
    """Return the seconds of each part, on random numbers: what they are costs nothing."""
    device, size = torch.device(settings.device), settings.image_size
    model: Any = create_model(roofline.anatomy.name).eval().to(device, roofline.dtype)
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(roofline.batch, 3, size, size, device=device, dtype=roofline.dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    return measure_parts(model, images, roofline.anatomy, settings.rounds)


def _write(
    path: Path, settings: Settings, found: Sequence[tuple[Roofline, dict[str, float] | None]]
) -> None:
    content = {
        "kind": "floors",
        "environment": environment.describe(torch.device(settings.device)),
        "rooflines": [{**r.to_dict(), "measured_s": measured} for r, measured in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def show(roofline: Roofline, console: Console) -> None:
    """Print one line per schedule."""
    found = roofline
    kind = "forward and backward" if found.training else "inference"
    size, dtype = found.anatomy.image_size, str(found.dtype).removeprefix("torch.")
    title = (
        f"{found.anatomy.name}: {kind}, {found.batch} x {size} x {size}, {dtype}; "
        f"{found.anatomy.macs / 1e9:.2f} GMACs, {found.anatomy.params / 1e6:.2f} M parameters"
    )
    table = plain_table(title, "schedule")
    headings = ["kernels", "MB/img", "GFLOP/img", "floor us/img", "img/s", "x eager", "in memory"]
    headings += ["saved MB/img"] if found.training else ["batch us, launched"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    eager = found.schedules["eager"].floor(found.rates)
    for way, s in found.schedules.items():
        floor = s.floor(found.rates)
        waits = sum(k.floor(found.rates) for k in s.kernels if bound_of(k, found.rates) == "memory")
        saved = f"{s.saved_bytes / found.batch / 1e6:.1f}" if s.saved_bytes and way != "ops" else ""
        table.add_row(
            WAYS[way],
            str(len(s.kernels)),
            f"{s.bytes / found.batch / 1e6:.1f}",
            f"{s.flops / found.batch / 1e9:.1f}",
            _us(floor / found.batch),
            f"{found.batch / floor:,.0f}",
            f"{eager / floor:.2f}",
            f"{waits / floor:.0%}",
            saved if found.training else f"{found.latency(way) * 1e6:,.0f}",
        )
    console.print(table)
    rates = found.rates
    console.print(
        f"ceilings: {rates.bytes / 1e9:,.0f} GB/s, {rates.tensor / 1e12:,.3g} TFLOP/s in matrix "
        f"products, {rates.fma / 1e12:,.3g} TFLOP/s elsewhere",
        highlight=False,
    )


def show_parts(
    roofline: Roofline, console: Console, measured: dict[str, float] | None = None
) -> None:
    """Print one line per part: bytes and floor in every schedule, and the time measured here."""
    table = plain_table(f"{roofline.anatomy.name}, part by part, per image", "part")
    table.add_column("MFLOP", justify="right", no_wrap=True)
    for way in roofline.schedules:
        for heading in (f"{way} MB", "us"):
            table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    if measured is not None:
        for heading in ("measured us", "x floor"):
            table.add_column(heading, justify="right", no_wrap=True)
    ways = {way: roofline.parts(way) for way in roofline.schedules}
    for part, kernels in ways["eager"].items():
        flops = sum(k.tensor_flops + k.fma_flops for k in kernels)
        cells = [part, f"{flops / roofline.batch / 1e6:,.0f}"]
        for found in ways.values():
            moved = sum(k.bytes for k in found.get(part, []))
            floor = sum(k.floor(roofline.rates) for k in found.get(part, []))
            cells += [f"{moved / roofline.batch / 1e6:.2f}", _us(floor / roofline.batch)]
        bounds = {bound_of(kernel, roofline.rates) for kernel in ways["ops"].get(part, [])}
        cells.append(" ".join(sorted(bounds)))
        if measured is not None:
            floor = sum(k.floor(roofline.rates) for k in ways["ops"].get(part, []))
            spent = measured.get(part, 0.0)
            cells += [_us(spent / roofline.batch), f"{spent / floor:.2f}" if floor else ""]
        table.add_row(*cells)
    console.print(table)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.4g}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


_COLOURS = {"memory": "#4878cf", "tensor": "#e08b3e", "fma": "#6aa56e"}
_BOUNDS = {"memory": "memory", "tensor": "matrix products", "fma": "other arithmetic"}


def plot(roofline: Roofline, path: Path, measured: dict[str, float] | None = None) -> None:
    """Draw each schedule as a row of bars, a part each, by what its kernels wait for.

    What was measured stands as dots over our own schedule's bars.
    """
    from matplotlib.figure import Figure

    ways = list(roofline.schedules)
    parts = list(roofline.parts("eager"))
    figure = Figure(figsize=(max(8, 0.34 * len(parts) + 3), 1.9 * len(ways) + 1.2))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(ways), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    per_image = 1e6 / roofline.batch
    for axis, way in zip(axes, ways, strict=True):
        bottom = [0.0] * len(parts)
        found = roofline.parts(way)
        for bound, colour in _COLOURS.items():
            heights = [
                per_image
                * sum(
                    k.floor(roofline.rates)
                    for k in found.get(part, [])
                    if bound_of(k, roofline.rates) == bound
                )
                for part in parts
            ]
            if any(heights) or way == ways[0]:
                label = _BOUNDS[bound] if way == ways[0] else None
                axis.bar(parts, heights, 0.8, bottom, color=colour, label=label)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        total = roofline.schedules[way].floor(roofline.rates) * per_image
        axis.set_title(f"{WAYS[way]}: {_us(total / 1e6)} us", loc="left", fontsize=10)
        if measured is not None and way == "ops":
            times = [per_image * measured.get(part, 0.0) for part in parts]
            axis.plot(parts, times, "o", color="black", markersize=4, label="measured")
            axis.legend(frameon=False, fontsize=9)
        axis.set_ylabel("us / image")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    axes[-1].tick_params(axis="x", labelrotation=90)
    kind = "forward + backward" if roofline.training else "inference"
    dtype = str(roofline.dtype).removeprefix("torch.")
    figure.suptitle(f"{roofline.anatomy.name}, {kind}, batch {roofline.batch}, {dtype}: floors")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
