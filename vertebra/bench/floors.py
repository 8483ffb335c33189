"""`bench models --floor`: rooflines as tables and JSON, and measured times beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import create_model
from . import ceilings, cpu, environment
from .ceilings import DTYPES
from .floor_chart import plot
from .part_times import PartTimes, measure_parts
from .report import plain_table, print_table
from .roofline import PRESETS, WAYS, Roofline, draw, rates_of
from .schedules import Kernel, Rates
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
    kernels_of: str | None = None,
    plots: Path | None = None,
    data: Path | None = None,
) -> bool:
    """Show the roofline of every model and batch; with the rates of this machine, times as well.

    Args:
        names: models of this library.
        settings: device, dtype, batches, image size, rounds, minutes.
        training: forward and backward instead of inference.
        machine: one of `PRESETS`, whose rates to use; None for those measured here.
        rates: by the fields of `Rates`; what is not None goes before the machine's.
        console: where the tables go.
        say: told what comes next.
        kernels_of: also list the kernels of the parts whose name has this.
        plots: where to draw; with several rooflines, each to a file of its own beside it.
        data: where to write all of it as JSON.

    Returns:
        Whether it came to its end; after Ctrl-C, what there was is shown and written.
    """
    here = machine is None and not any(rates.values())
    found: list[Roofline] = []
    deadline = time.monotonic() + 60 * settings.minutes
    try:
        chosen = _rates(settings, machine, rates, say)
        for name in names:
            for batch in settings.batches:
                if time.monotonic() >= deadline:
                    say(f"no time left for {name}, batch {batch}")
                    continue
                say(f"{name}, batch {batch}")
                roofline = draw(
                    name,
                    chosen,
                    training=training,
                    batch=batch,
                    image_size=settings.image_size,
                    dtype=DTYPES[settings.dtype],
                )
                if here:
                    roofline = replace(roofline, measured=_measured(roofline, settings, say))
                found.append(roofline)
                show(roofline, console)
                show_parts(roofline, console)
                if kernels_of is not None:
                    show_kernels(roofline, kernels_of, console)
    except KeyboardInterrupt:
        say("interrupted")
        return False
    finally:
        for path in _write(found, settings, plots, data):
            say(f"written: {path}")
    return True


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
        known = PRESETS[machine]
        if settings.dtype not in known:
            raise ValueError(
                f"the rates of {machine} are for {', '.join(known)}; got dtype "
                f"{settings.dtype!r}: give --bandwidth, --tensor-rate and --fma-rate"
            )
        return known[settings.dtype]._replace(**named)
    device = torch.device(settings.device)
    if device.type == "cpu":
        cpu.settle()
    measured = ceilings.measure(device, (settings.dtype,), tiny=settings.tiny, say=say)
    return rates_of(measured, DTYPES[settings.dtype])._replace(**named)


def _measured(
    roofline: Roofline, settings: Settings, say: Callable[[str], None]
) -> PartTimes | None:
    """Return the seconds of each part, on random numbers: what they are costs nothing."""
    device, size = torch.device(settings.device), settings.image_size
    model: Any = create_model(roofline.anatomy.name).train(roofline.training)
    model = model.to(device, roofline.dtype).to(memory_format=torch.channels_last)
    images = torch.randn(roofline.batch, 3, size, size, device=device, dtype=roofline.dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    try:
        return measure_parts(model, images, roofline.anatomy, settings.rounds)
    except torch.OutOfMemoryError:
        say(f"not timed: a batch of {roofline.batch} does not fit the memory of {device}")
        return None


def _write(
    found: Sequence[Roofline], settings: Settings, plots: Path | None, data: Path | None
) -> Iterable[Path]:
    for roofline in found if plots is not None else ():
        path: Any = plots
        if len(found) > 1:
            path = path.with_stem(f"{path.stem}-{roofline.anatomy.name}-{roofline.batch}")
        plot(roofline, path)
        yield path
    if data is not None and found:
        content = {
            "kind": "floors",
            "environment": environment.describe(torch.device(settings.device)),
            "rooflines": [roofline.to_dict() for roofline in found],
        }
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(content, indent=1) + "\n")
        yield data


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
    table.columns[0].no_wrap, table.columns[0].min_width = False, 24
    headings = ["kernels", "MB/img", "GFLOP/img", "floor us/img", "img/s", "x eager", "in memory"]
    headings += ["saved MB/img"] if found.training else ["batch us, launched"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    eager = found.schedules["eager"].floor(found.rates)
    for way, s in found.schedules.items():
        floor = s.floor(found.rates)
        saved = f"{s.saved_bytes / found.batch / 1e6:.1f}" if way != "ops" else ""
        table.add_row(
            WAYS[way],
            str(len(s.kernels)),
            f"{s.bytes / found.batch / 1e6:.1f}",
            f"{s.flops / found.batch / 1e9:.1f}",
            _us(floor / found.batch),
            f"{found.batch / floor:,.0f}",
            f"{eager / floor:.2f}",
            f"{found.waits(s.kernels)['memory'] / floor:.0%}",
            saved if found.training else _us(found.latency(way)),
        )
    print_table(console, table, "GFLOP/img", "in memory", "kernels", headings[-1], "MB/img")
    rates = found.rates
    console.print(
        f"ceilings: {rates.bytes / 1e9:,.0f} GB/s, {rates.tensor / 1e12:,.3g} TFLOP/s in matrix "
        f"products, {rates.fma / 1e12:,.3g} TFLOP/s elsewhere",
        highlight=False,
    )


def show_parts(roofline: Roofline, console: Console) -> None:
    """Print one line per part: bytes and floor in every schedule, and the time measured here."""
    found, measured = roofline, roofline.measured
    table = plain_table(f"{found.anatomy.name}, part by part, per image", "part")
    table.add_column("MFLOP", justify="right", no_wrap=True)
    for way in found.schedules:
        for heading in (f"{way} MB", "us"):
            table.add_column(heading, justify="right", no_wrap=True)
    if measured is not None:
        for heading in ("measured us", f"x {measured.way}"):
            table.add_column(heading, justify="right", no_wrap=True)
    ways = {way: found.parts(way) for way in found.schedules}
    for part, kernels in ways["eager"].items():
        cells = [part, f"{sum(k.flops for k in kernels) / found.batch / 1e6:,.0f}"]
        for parts in ways.values():
            moved = sum(k.bytes for k in parts[part])
            cells += [f"{moved / found.batch / 1e6:.2f}", _bounded(found, parts[part])]
        if measured is not None:
            spent, floor = measured.seconds.get(part, 0.0), found.floors(measured.way)[part]
            cells += [_us(spent / found.batch), f"{spent / floor:.2f}" if floor else ""]
        table.add_row(*cells)
    print_table(console, table, "MFLOP", *(f"{way} MB" for way in found.schedules))
    console.print("waits for: m memory, t matrix products, f other arithmetic", highlight=False)


def show_kernels(roofline: Roofline, match: str, console: Console) -> None:
    """Print one line per kernel of the parts whose name has `match`."""
    found = roofline
    for way in found.schedules:
        table = plain_table(f"{WAYS[way]}, kernel by kernel, per image", "part")
        table.add_column("kernel", no_wrap=True)
        for heading in ("MB", "MFLOP", "us"):
            table.add_column(heading, justify="right", no_wrap=True)
        for part, kernels in found.parts(way).items():
            for k in kernels if match in part else ():
                work = f"{k.flops / found.batch / 1e6:,.1f}" if k.flops else ""
                moved = f"{k.bytes / found.batch / 1e6:.3f}"
                table.add_row(part, k.name, moved, work, _bounded(found, [k]))
        console.print(table)


def _bounded(roofline: Roofline, kernels: Sequence[Kernel]) -> str:
    """Return the floor of kernels in microseconds, and the initial of what most of it waits for."""
    waits = roofline.waits(kernels)
    longest = max(waits, key=waits.__getitem__)
    return f"{_us(sum(waits.values()) / roofline.batch)} {longest[0]}"


def _us(seconds: float) -> str:
    us = 1e6 * seconds
    return f"{us:.2f}" if us < 100 else f"{us:,.0f}"
