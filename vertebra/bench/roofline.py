"""The roofline: what a network costs at least, part by part, in the ways it may be scheduled.

`anatomy` finds the convolutions and their maps, `tracing` what runs today, `construction` what
could; here the three meet a machine's rates. `part_times` measures the parts, `floors` shows all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .anatomy import Anatomy, dissect, macs
from .ceilings import Ceilings
from .construction import construct
from .part_times import PartTimes
from .schedules import Bound, Kernel, Rates, Schedule, Way
from .tracing import trace

__all__ = ["PRESETS", "WAYS", "Roofline", "draw", "macs", "rates_of"]

_H200 = Rates(4.3e12, 790e12, 60e12)
PRESETS = {"h200": {"bf16": _H200, "fp16": _H200}}
"""Rates measured elsewhere, by dtype."""

WAYS: dict[Way, str] = {
    "eager": "every operation by itself, as eager PyTorch",
    "ops": "vertebra's ops, beside the library's convolutions",
    "conv": "one kernel per convolution",
    "shared": "the same, both gradients from one read",
    "block": "one kernel per block",
}

LAUNCH_S = 1e-6
"""The gap before a kernel of a CUDA graph."""


def rates_of(ceilings: Ceilings, dtype: torch.dtype) -> Rates:
    """Return the rates that convolutions in `dtype` have on a machine."""
    rates = ceilings.matmul_flops_per_s
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    conv = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    if name == "fp32" and "tf32" in rates and conv.fp32_precision == "tf32":
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
    measured: PartTimes | None = None

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

    def waits(self, kernels: Iterable[Kernel]) -> dict[Bound, float]:
        """Return the least seconds of some kernels by what they wait for."""
        waits: dict[Bound, float] = {"memory": 0.0, "tensor": 0.0, "fma": 0.0}
        for kernel in kernels:
            waits[kernel.bound(self.rates)] += kernel.floor(self.rates)
        return waits

    def latency(self, way: Way) -> float:
        """Return the least seconds until a batch is done: its floor, and a gap before each kernel.

        With one image that is mostly reading the weights, once, and the gaps.
        """
        schedule = self.schedules[way]
        return schedule.floor(self.rates) + len(schedule.kernels) * LAUNCH_S

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
            "schedules": {way: self._schedule(way) for way in self.schedules},
            "measured": None if self.measured is None else self.measured._asdict(),
        }

    def _schedule(self, way: Way) -> dict[str, Any]:
        schedule = self.schedules[way]
        return {
            "bytes": schedule.bytes,
            "flops": schedule.flops,
            "floor_s": schedule.floor(self.rates),
            "latency_s": self.latency(way),
            "saved_bytes": schedule.saved_bytes,
            "kernels": [
                {
                    **kernel._asdict(),
                    "floor_s": kernel.floor(self.rates),
                    "bound": kernel.bound(self.rates),
                }
                for kernel in schedule.kernels
            ],
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
