"""Time: calls on a CPU by the host's clock, on a GPU by CUDA events or by replaying CUDA graphs.

A GPU works through a queue. Where its kernels are shorter than their launch, events around calls
time the host. Two ways around that, for `short` clocks:

* a CUDA graph of all calls of a sample, captured once and replayed: one launch. What it computed
  stays in its memory and can be checked. Only for steps that say they can be captured, since a
  failed capture may take the process down with it;
* else a lead: the GPU is kept busy until all calls are in its queue.

Everything on a GPU, from the building of a step on, has to happen on the clock's `stream`: a
backward pass runs on the stream of its forward pass, and a capture sees one stream only.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor

Step = Callable[[int], dict[str, Tensor]]
"""One timed call, on the i-th of the inputs that are rotated through; returns what it computed."""

Method = Literal["host", "events", "lead", "graph"]

_CYCLES_PER_MS = 2_000_000  # of a GPU at 2 GHz
_LONGEST_LEAD_MS = 500.0


class Clock:
    """What times the steps of one comparison on `device`.

    Args:
        device: that the steps use.
        short: whether its kernels may be shorter than their launch.
        target_ms: how long a sample should take.
        least, most: calls of a sample; `least` so that a graph comes by every input.
    """

    def __init__(
        self,
        device: torch.device,
        short: bool = False,
        target_ms: float = 50.0,
        least: int = 1,
        most: int = 50,
    ) -> None:
        self.device = device
        self._short = short
        self._target_ms = target_ms
        self._least, self._most = least, max(least, most)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def stream(self) -> Generator[None]:
        """Build, call and time steps in here."""
        if self._stream is None:
            yield
            return
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    def timer(self, step: Step, capturable: bool = False) -> Timer:
        """Return what times samples of `step`; it has been called before."""
        if self.device.type != "cuda":
            timer = Timer(step)
        elif self._short:
            timer = LeadTimer(step, self.device)
        else:
            timer = EventTimer(step, self.device)
        timer = self.sized(timer)
        if self._stream is not None and self._short and capturable:
            with suppress(RuntimeError):  # it cannot be captured after all
                return GraphTimer(step, self.device, timer.calls, self._stream)
        return timer

    def sized(self, timer: Timer) -> Timer:
        """Make the samples of `timer` as long as they should be."""
        estimate = statistics.median(timer.elapsed(i, 1) for i in range(3))
        wanted = round(self._target_ms / max(estimate, 1e-3))
        timer.calls = max(self._least, min(self._most, wanted))
        return timer


class Timer:
    """Times samples of `calls` calls of a step by the host's clock."""

    method: Method = "host"

    def __init__(self, step: Step, calls: int = 1) -> None:
        self.step = step
        self.calls = calls

    def sample(self, first: int) -> float:
        """Return milliseconds per call, over a sample that begins with the `first` input."""
        return self.elapsed(first, self.calls) / self.calls

    def elapsed(self, first: int, count: int) -> float:
        """Return the milliseconds of `count` calls."""
        start = time.perf_counter()
        for i in range(first, first + count):
            self.step(i)
        return (time.perf_counter() - start) * 1e3

    def answers(self) -> dict[str, Tensor]:
        """Return what the step computes, for a check after the last sample."""
        return self.step(0)


class EventTimer(Timer):
    """Times by CUDA events, and so whatever the GPU waits for too."""

    method = "events"

    def __init__(self, step: Step, device: torch.device) -> None:
        super().__init__(step)
        self.device = device

    def elapsed(self, first: int, count: int) -> float:
        """Return the milliseconds between the first call and the end of the last."""
        elapsed, _ = self._between_events(first, count)
        return elapsed

    def _between_events(self, first: int, count: int, lead_ms: float = 0.0) -> tuple[float, bool]:
        """Return the milliseconds, and whether the GPU began before it had all calls."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if lead_ms:
            torch.cuda._sleep(int(lead_ms * _CYCLES_PER_MS))  # pyright: ignore[reportPrivateUsage]
        start.record()
        for i in range(first, first + count):
            self.step(i)
        overtaken = start.query()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), overtaken


class LeadTimer(EventTimer):
    """Times by CUDA events behind a lead as long as the calls take to be launched."""

    method = "lead"

    def __init__(self, step: Step, device: torch.device) -> None:
        super().__init__(step, device)
        self.lead_ms = 2.0

    def elapsed(self, first: int, count: int) -> float:
        """Return the milliseconds of the calls, none of which the GPU has waited for."""
        while True:
            elapsed, overtaken = self._between_events(first, count, self.lead_ms)
            if not overtaken or self.lead_ms > _LONGEST_LEAD_MS:
                return elapsed
            self.lead_ms *= 2


class GraphTimer(EventTimer):
    """Times replays of a CUDA graph of all calls of a sample."""

    method = "graph"

    def __init__(self, step: Step, device: torch.device, calls: int, stream: Any) -> None:
        super().__init__(step, device)
        self.calls = calls
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for i in range(calls):
                self._answers = step(i)
        self._graph.replay()  # the first one uploads it

    def elapsed(self, first: int, count: int) -> float:
        """Return the milliseconds of one replay: of `calls` calls, from the first input on."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def answers(self) -> dict[str, Tensor]:
        """Return what the last replay has computed."""
        return self._answers


def cache_copies(size: int, device: torch.device) -> int:
    """Return how many inputs of `size` bytes to rotate through, so that none is still in cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 + max(1, min(31, -(-2 * cache // max(size, 1))))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reserved_bytes(device: torch.device) -> int:
    """Return the bytes that cannot be given back to a GPU now; of a CPU, 0."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)
