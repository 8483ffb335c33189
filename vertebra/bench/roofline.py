"""The roofline: what a network costs at least, part by part, in the ways it may be scheduled.

`anatomy` finds the convolutions and their maps, `tracing` what runs today, `schedules` what could;
here the three meet a machine's rates, and the time that each part takes on it. `floors` shows them.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .anatomy import Anatomy, dissect, macs
from .ceilings import Ceilings
from .schedules import Kernel, Rates, Schedule, Way, construct
from .tracing import trace

__all__ = [
    "PRESETS",
    "WAYS",
    "Roofline",
    "bound_of",
    "draw",
    "macs",
    "measure_parts",
    "rates_of",
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


def bound_of(kernel: Kernel, rates: Rates) -> str:
    """Return which resource the kernel waits for."""
    bounds = kernel.bounds(rates)
    return max(bounds, key=bounds.__getitem__)


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
