"""The roofline: what a network costs at least, part by part, in the ways it may be scheduled.

    vertebra bench models resnet50 --floor

`anatomy` finds the convolutions and their maps, `tracing` what runs today, `schedules` what could;
here the three meet a machine's rates: tables, a plot, and the measured time beside the floor.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .anatomy import Anatomy, dissect, macs
from .ceilings import Ceilings
from .report import plain_table
from .schedules import Kernel, Rates, Schedule, Way, construct
from .tracing import trace

__all__ = [
    "PRESETS",
    "Roofline",
    "draw",
    "macs",
    "measure_parts",
    "plot",
    "rates_of",
    "show",
    "show_parts",
]

PRESETS = {"h200-bf16": Rates(4.3e12, 790e12, 60e12)}
"""Rates measured elsewhere: bytes, tensor operations and other operations per second."""

WAYS: dict[Way, str] = {
    "eager": "every operation by itself, as eager PyTorch",
    "ops": "vertebra's ops, beside the library's convolutions",
    "conv": "one kernel per convolution",
    "shared": "the same, both gradients from one read",
    "block": "one kernel per block",
}

_LAUNCH_S = 1e-6  # between two kernels of a CUDA graph


def rates_of(ceilings: Ceilings, dtype: torch.dtype) -> Rates:
    """Return the rates that convolutions in `dtype` have on a machine."""
    rates = ceilings.matmul_flops_per_s
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if name == "fp32" and "tf32" in rates and torch.backends.cudnn.allow_tf32:
        name = "tf32"
    return Rates(ceilings.copy_bytes_per_s, rates[name], ceilings.fma_flops_per_s)


@dataclass(frozen=True)
class Roofline:
    """All schedules of one network, at one batch, size and dtype, on one machine."""

    anatomy: Anatomy
    rates: Rates
    batch: int
    dtype: torch.dtype
    training: bool
    schedules: dict[Way, Schedule]

    def parts(self, way: Way) -> dict[str, list[Kernel]]:
        """Return the kernels of a schedule by the part they belong to, in the network's order."""
        found: dict[str, list[Kernel]] = {part.name: [] for part in self.anatomy.parts}
        for kernel in self.schedules[way].kernels:
            found.setdefault(kernel.part, []).append(kernel)
        return {part: kernels for part, kernels in found.items() if kernels}

    def floors(self, way: Way) -> dict[str, float]:
        """Return the least seconds of each part."""
        return {
            part: sum(kernel.floor(self.rates) for kernel in kernels)
            for part, kernels in self.parts(way).items()
        }

    def latency(self, way: Way) -> float:
        """Return the least seconds of a batch whose weights are in no cache, launches included."""
        schedule = self.schedules[way]
        return schedule.floor(self.rates) + len(schedule.kernels) * _LAUNCH_S

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "model": self.anatomy.name,
            "image_size": self.anatomy.image_size,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "training": self.training,
            "rates": self.rates._asdict(),
            "params": self.anatomy.params,
            "macs": self.anatomy.macs,
            "schedules": {
                way: {
                    "kernels": len(schedule.kernels),
                    "bytes": schedule.bytes,
                    "flops": schedule.flops,
                    "floor_s": schedule.floor(self.rates),
                    "saved_bytes": schedule.saved_bytes,
                    "parts": [
                        {
                            "part": part,
                            "bytes": sum(k.bytes for k in kernels),
                            "flops": sum(k.tensor_flops + k.fma_flops for k in kernels),
                            "floor_s": sum(k.floor(self.rates) for k in kernels),
                        }
                        for part, kernels in self.parts(way).items()
                    ],
                }
                for way, schedule in self.schedules.items()
            },
        }


def draw(
    model: nn.Module | str,
    rates: Rates,
    *,
    training: bool = False,
    batch: int = 256,
    image_size: int = 224,
    dtype: torch.dtype = torch.bfloat16,
) -> Roofline:
    """Return the roofline of a vertebra model, by name or by itself; nothing is computed.

    Raises:
        ValueError: it is no ResNet, RegNet or ConvNeXt of this library.
    """
    anatomy = dissect(model, image_size)
    schedules: dict[Way, Schedule] = {}
    for way in ("eager", "ops"):
        schedules[way] = trace(model, anatomy, way, training=training, batch=batch, dtype=dtype)
    for way in ("conv", "shared", "block") if training else ("conv", "block"):
        schedules[way] = construct(
            anatomy,
            way,
            training=training,
            batch=batch,
            itemsize=dtype.itemsize,
            rates=rates,
        )
    return Roofline(anatomy, rates, batch, dtype, training, schedules)


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
        waits = sum(k.floor(found.rates) for k in s.kernels if _bound(k, found.rates) == "memory")
        saved = f"{s.saved_bytes / found.batch / 1e6:.1f}" if s.saved_bytes and way != "ops" else ""
        table.add_row(
            WAYS[way],
            str(len(s.kernels)),
            f"{s.bytes / found.batch / 1e6:.1f}",
            f"{s.flops / found.batch / 1e9:.1f}",
            f"{floor / found.batch * 1e6:.4g}",
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
        bounds = {_bound(kernel, roofline.rates) for kernel in ways["ops"].get(part, [])}
        cells.append(" ".join(sorted(bounds)))
        if measured is not None:
            floor = sum(k.floor(roofline.rates) for k in ways["ops"].get(part, []))
            spent = measured.get(part, 0.0)
            cells += [_us(spent / roofline.batch), f"{spent / floor:.2f}" if floor else ""]
        table.add_row(*cells)
    console.print(table)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.3g}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def _bound(kernel: Kernel, rates: Rates) -> str:
    """Return which resource the kernel waits for."""
    bounds = kernel.bounds(rates)
    return max(bounds, key=bounds.__getitem__)


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
                    if _bound(k, roofline.rates) == bound
                )
                for part in parts
            ]
            if any(heights) or way == ways[0]:
                label = _BOUNDS[bound] if way == ways[0] else None
                axis.bar(parts, heights, 0.8, bottom, color=colour, label=label)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        total = roofline.schedules[way].floor(roofline.rates) * per_image
        axis.set_title(f"{WAYS[way]}: {total:,.4g} us", loc="left", fontsize=10)
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


def measure_parts(
    model: nn.Module, x: Tensor, anatomy: Anatomy, rounds: int = 10
) -> dict[str, float]:
    """Return the median seconds that each part of `model(x)` takes here, in inference.

    A part lasts from the first module of it to the first of the next.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    with torch.no_grad(), _marked(model, x.device, anatomy) as marks:
        for i in range(-2, rounds):
            marks.clear()
            model(x)
            marks.append(("", _now(x.device)))
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            spent: dict[str, float] = defaultdict(float)
            for (part, start), (_, end) in pairwise(marks):
                spent[part] += _between(start, end)
            for part, seconds in spent.items() if i >= 0 else ():
                samples[part].append(seconds)
    return {part: statistics.median(times) for part, times in samples.items()}


@contextmanager
def _marked(
    model: nn.Module, device: torch.device, anatomy: Anatomy
) -> Generator[list[tuple[str, Any]]]:
    """Note when each part begins."""
    marks: list[tuple[str, Any]] = []
    stem, *others = [part.name for part in anatomy.parts]
    names = {module: name for name, module in model.named_modules()}
    begins = {name: name for name in others}
    begins |= {conv.name: part.name for part in anatomy.parts for conv in part.convs[:1]}

    def enter(module: nn.Module, _: Any) -> None:
        name = names.get(module)
        part = stem if module is model else begins.get(name or "")
        if part is not None and (not marks or marks[-1][0] != part):
            marks.append((part, _now(device)))

    hook = register_module_forward_pre_hook(enter)
    try:
        yield marks
    finally:
        hook.remove()


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
