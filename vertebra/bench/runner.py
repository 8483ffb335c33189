"""The runner: prepare each provider, check its answer, and only then time all of them in turn.

Rounds are interleaved, each in an order of its own, so that a machine that slows down slows all of
them down; the first round is not recorded. The timed call returns the answer, so what is timed is
what was checked; it is checked again after the last round.
"""

from __future__ import annotations

import gc
import importlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .oracle import Answers, Oracle
from .results import Row

Step = Callable[[int], Answers]
"""One timed call, on the i-th of the inputs that are rotated through; returns what it computed."""

_THREADS = torch.get_num_threads()  # what torch chose, or OMP_NUM_THREADS
_LEAST_ROUNDS = 3  # fewer have no spread to speak of


class Unavailable(Exception):
    """A provider that this machine or this model does not have; says why."""


@dataclass(frozen=True)
class Provider:
    """One way to compute the answer; `peer` says that it is not ours."""

    name: str
    peer: bool
    make: Callable[[], Step]


@dataclass
class Clock:
    """Times calls on a device: CUDA events, or the host's clock on a CPU.

    With `queued`, the GPU is kept busy until all calls are enqueued, so that kernels shorter than
    their launch are timed and not their launch.
    """

    device: torch.device
    queued: bool = False
    lead_ms: float = 2.0

    def __call__(self, step: Step, first: int, count: int) -> float:
        """Return milliseconds per call, over `count` calls from the `first` input on."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for i in range(first, first + count):
                step(i)
            return (time.perf_counter() - start) * 1e3 / count
        while True:
            elapsed, overtaken = self._events(step, first, count)
            if not overtaken or self.lead_ms > 500:
                return elapsed / count
            self.lead_ms *= 2

    def _events(self, step: Step, first: int, count: int) -> tuple[float, bool]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if self.queued:
            cycles_per_ms = 2_000_000
            torch.cuda._sleep(int(self.lead_ms * cycles_per_ms))  # pyright: ignore[reportPrivateUsage]
        start.record()
        for i in range(first, first + count):
            step(i)
        overtaken = self.queued and start.query()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), overtaken

    def sample_size(self, step: Step, target_ms: float = 50.0, most: int = 50) -> int:
        """Return how many calls make one sample."""
        estimate = statistics.median(self(step, i, 1) for i in range(3))
        return max(1, min(most, round(target_ms / max(estimate, 1e-3))))


def measure(
    providers: Sequence[Provider],
    oracle: Oracle,
    clock: Clock,
    rounds: int,
    *,
    deadline: float = float("inf"),
    tick: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Check every provider, time those that are right, and return a row for each.

    Args:
        providers: what to compare.
        oracle: calibrated.
        clock: of the device that the providers use.
        rounds: samples per provider.
        deadline: `time.monotonic()` after which no provider is begun, and no round but the first 3.
        tick: told what comes next, before each provider's check and each round.
    """
    rows: list[Row] = []
    steps: list[tuple[Row, Step]] = []
    for provider in providers:
        tick(f"{provider.name}: build and check")
        row = Row(provider.name, provider.peer)
        rows.append(row)
        if time.monotonic() > deadline:
            row.status, row.detail = "late", "no time was left for it"
        elif (step := _prepare(provider, row, oracle, clock)) is not None:
            steps.append((row, step))
    calls, order = 0, random.Random(0)
    for i in range(-1, rounds):
        if i >= _LEAST_ROUNDS and time.monotonic() > deadline:
            break
        tick(f"round {i + 1} of {rounds}" if i >= 0 else "warm-up")
        for row, step in order.sample(steps, len(steps)):
            elapsed = clock(step, calls, row.calls_per_sample)
            calls += row.calls_per_sample
            if i >= 0:
                row.samples_ms.append(elapsed)
    for row, step in steps:
        _check(row, step(0), oracle)
    return rows


def _prepare(provider: Provider, row: Row, oracle: Oracle, clock: Clock) -> Step | None:
    """Build, call and check; fill in everything but the times. Return None unless all is well."""
    device = clock.device
    reserved = _reserved(device)
    try:
        with _cold_compiler():
            step = provider.make()
            start = time.perf_counter()
            answers = step(0)
            _synchronize(device)
            row.first_call_s = time.perf_counter() - start
        _check(row, answers, oracle)
        del answers
        if row.status != "ok":
            return None
        _weigh(row, step, device, reserved)
        row.calls_per_sample = clock.sample_size(step)
    except Exception as error:  # whatever a provider raises is its result
        absent = provider.peer and isinstance(error, (Unavailable, ImportError))
        row.status = "absent" if absent else "FAILED"
        row.detail = f"{type(error).__name__}: {error}".partition("\n")[0]
    else:
        return step
    return None


def _check(row: Row, answers: Answers, oracle: Oracle) -> None:
    verdict = oracle.judge(answers)
    row.errors, row.allowed, row.top1 = verdict.errors, verdict.allowed, verdict.top1
    if verdict.wrong:
        row.status, row.detail = "WRONG", verdict.wrong
        row.samples_ms.clear()


def _weigh(row: Row, step: Step, device: torch.device, reserved: int) -> None:
    """Fill in the memory a call needs, weights included, and what its forward half saves.

    The forward half, of a step that has one, is its `forward`; what that returns keeps alive what
    it saved. Memory that CUDA graphs hold for good shows as reserved, other memory as allocated.
    """
    if device.type != "cuda":
        return
    forward = getattr(step, "forward", None)
    for _ in range(2):  # graphs are recorded by the second call
        step(1)
    held = _reserved(device) - reserved
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(1)
    row.peak_bytes = held + torch.cuda.max_memory_allocated(device) - before
    if forward is not None:
        before = torch.cuda.memory_allocated(device)
        kept = forward(1)
        row.saved_bytes = torch.cuda.memory_allocated(device) - before
        del kept


def _reserved(device: torch.device) -> int:
    """Return the bytes that cannot be given back to the device now."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def settle_threads() -> None:
    """Use no more CPU threads than pay now: all wait for the one whose core is busy elsewhere.

    On two cores, one of them taken, two threads were five times as slow as one.
    """
    x, weight = torch.randn(4, 64, 56, 56), torch.randn(64, 64, 3, 3)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        times: list[float] = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(5):
                F.conv2d(x, weight).relu_()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    halves = [_THREADS >> i for i in range(_THREADS.bit_length())]
    torch.set_num_threads(min(halves, key=seconds))


def warm_up_compiler(device: torch.device) -> None:
    """Pay what the first compilation of a process costs beside its own work: imports, detection."""
    with _cold_compiler():
        torch.compile(torch.sin)(torch.zeros(8, device=device))


def _cold_compiler() -> AbstractContextManager[None]:
    """Compile from scratch: what an earlier run or another provider compiled is out of reach."""
    inductor: Any = importlib.import_module("torch._inductor.utils")
    return inductor.fresh_cache()
