"""Time by part: how long each part of a network takes here, beside its floor."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels._op import observe
from .anatomy import Anatomy
from .clock import synchronize
from .places import Places


class PartTimes(NamedTuple):
    """Median seconds of each part of a pass, and whether kernels of ours ran in it ("ops")."""

    way: Literal["eager", "ops"]
    seconds: dict[str, float]


def measure_parts(
    model: nn.Module, images: Tensor, anatomy: Anatomy, rounds: int = 10
) -> PartTimes:
    """Time `model(images)` part by part, and in training mode its backward pass as well.

    A part lasts from its first module to the first of the next, backward from the gradient of its
    output to that of its input. On a GPU events say when; whatever it waits for counts.
    """
    marks = _Marks(model, images.device, anatomy)
    used: set[str] = set()
    with torch.no_grad(), observe(lambda call: used.add(call.path)):
        model(images)
    samples: dict[str, list[float]] = defaultdict(list)
    for i in range(-2, rounds):
        spent = marks.of_a_pass(model, images)
        for part, seconds in spent.items() if i >= 0 else ():
            samples[part].append(seconds)
    medians = {part: statistics.median(times) for part, times in samples.items()}
    return PartTimes("ops" if used - {"eager"} else "eager", medians)


class _Marks:
    """Notes when each part begins."""

    def __init__(self, model: nn.Module, device: torch.device, anatomy: Anatomy) -> None:
        self._device = device
        self._head = anatomy.parts[-1].name
        leaves = {name for name, module in model.named_modules() if not [*module.children()]}
        self._beginnings = leaves | anatomy.owners.keys()
        self._places = Places(model, anatomy, self._entered)
        self._marks: list[tuple[str, Any]] = []

    def of_a_pass(self, model: nn.Module, images: Tensor) -> dict[str, float]:
        """Return the seconds of each part."""
        model.zero_grad(set_to_none=True)
        self._marks.clear()
        with torch.set_grad_enabled(model.training):
            with self._places.followed():
                logits = model(images)
            if model.training:
                self._begin(self._head)
                logits.backward(torch.ones_like(logits))
        self._begin("")
        synchronize(self._device)
        spent: dict[str, float] = defaultdict(float)
        for (part, start), (_, end) in pairwise(self._marks):
            spent[part] += _between(start, end)
        return spent

    def _entered(self, name: str, args: Any, outer: str) -> None:
        part, before = self._places.part, self._marks[-1][0] if self._marks else None
        if part == before or name not in self._beginnings:
            return
        if before is not None and args[0].requires_grad:
            args[0].register_hook(partial(self._arrived, before))
        self._begin(part)

    def _arrived(self, part: str, gradient: Tensor) -> None:
        self._begin(part)

    def _begin(self, part: str) -> None:
        if not self._marks or self._marks[-1][0] != part:
            self._marks.append((part, _now(self._device)))


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
