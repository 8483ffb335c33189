"""The runner: prepare each provider, check its answer, and only then time all of them in turn.

Rounds are interleaved, each in an order of its own, so that a machine that slows down slows all of
them down; the first round is not recorded. The timed call returns the answer, so what is timed is
what was checked; it is checked again after the last round.

Rows are filled in as things happen, a round as a whole, so that whoever stops a run has what there
is. No provider may take longer for its first answer than it is given, and none is begun after the
deadline.
"""

from __future__ import annotations

import importlib
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .clock import Clock, Step, Timer, reserved_bytes, synchronize
from .memory import peak_bytes
from .oracle import Answers, Oracle
from .results import Comparison, Row

_LEAST_ROUNDS = 3  # fewer have no spread to speak of


class Unavailable(Exception):
    """A provider that this machine or this model does not have; says why."""


class OutOfTime(BaseException):
    """A provider has had its time; no error, so that nobody on the way up takes it for one."""


@dataclass(frozen=True)
class Provider:
    """One way to compute the answer.

    Attributes:
        name: what tables call it.
        peer: it is not ours.
        make: builds it.
        capturable: its calls can be captured in a CUDA graph.
    """

    name: str
    peer: bool
    make: Callable[[], Step]
    capturable: bool = False


@dataclass(frozen=True)
class Limits:
    """How long a measurement may take.

    Attributes:
        deadline: `time.monotonic()` after which no provider is begun, and no round but the first 3.
        first_answer_s: what a provider has for its first answer, compilation included.
    """

    deadline: float = math.inf
    first_answer_s: float = math.inf

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


NO_LIMITS = Limits()


def measure(
    comparison: Comparison,
    providers: Sequence[Provider],
    oracle: Oracle,
    clock: Clock,
    rounds: int,
    *,
    limits: Limits = NO_LIMITS,
    tick: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Check every provider, time those that are right, and fill in a row for each.

    Args:
        comparison: gets the rows.
        providers: what to compare.
        oracle: calibrated.
        clock: of the device that the providers use.
        rounds: samples per provider.
        limits: how long it may take.
        tick: told what comes next, before each provider's check and each round.
    """
    ready: list[tuple[Row, Timer]] = []
    if oracle.noisy:
        comparison.facts["noisy"] = oracle.noisy
    with clock.stream():
        for provider in providers:
            tick(f"{provider.name}: build and check")
            row = Row(provider.name, provider.peer)
            comparison.rows.append(row)
            timer = _prepare(provider, row, oracle, clock, limits)
            ready += [] if timer is None else [(row, timer)]
        calls, order = 0, random.Random(0)
        for i in range(-1, rounds):
            if i >= _LEAST_ROUNDS and limits.left_s <= 0:
                break
            tick(f"round {i + 1} of {rounds}" if i >= 0 else "warm-up")
            samples: list[tuple[Row, float]] = []
            for row, timer in order.sample(ready, len(ready)):
                with _recorded(row):
                    samples.append((row, timer.sample(calls)))
                calls += timer.calls
            ready = [(row, timer) for row, timer in ready if row.status == "ok"]
            for row, elapsed in samples if i >= 0 else ():
                row.samples_ms.append(elapsed)
        for row, timer in ready:
            with _recorded(row):
                _check(row, timer.answers(), oracle)
    comparison.finished = True
    return comparison


def _prepare(
    provider: Provider, row: Row, oracle: Oracle, clock: Clock, limits: Limits
) -> Timer | None:
    """Build, call and check; fill in everything but the times. Return None unless all is well."""
    left = limits.left_s
    if left <= 0:
        row.status, row.detail = "late", "no time was left for it"
        return None
    reserved = reserved_bytes(clock.device)
    try:
        with _recorded(row), _within(min(left, limits.first_answer_s)):
            step = first_answer(provider, row, oracle, clock.device)
            if row.status == "ok":
                _weigh(row, step, clock.device, reserved)
                timer = clock.timer(step, provider.capturable)
                row.calls_per_sample, row.method = timer.calls, timer.method
                return timer
    except OutOfTime:
        if limits.first_answer_s < left:
            row.status = "slow"
            row.detail = f"no answer within the {limits.first_answer_s:.0f} s a provider is given"
        else:
            row.status, row.detail = "late", "the time was over before it had an answer"
    return None


def first_answer(provider: Provider, row: Row, oracle: Oracle, device: torch.device) -> Step:
    """Build a provider and check its first answer, which may take it long; note both."""
    step = provider.make()
    with _cold_compiler():
        start = time.perf_counter()
        answers = step(0)
        synchronize(device)
        row.first_call_s = time.perf_counter() - start
    _check(row, answers, oracle)
    return step


@contextmanager
def _recorded(row: Row) -> Generator[None]:
    """Make whatever a provider raises its result."""
    try:
        yield
    except Exception as error:
        row.samples_ms.clear()
        row.detail = f"{type(error).__name__}: {error}".partition("\n")[0]
        if row.peer and isinstance(error, (Unavailable, ImportError)):
            row.status, row.detail = "absent", str(error)
        elif row.peer and isinstance(error, torch.OutOfMemoryError):
            row.status = "memory"
        else:
            row.status = "FAILED"


@contextmanager
def _within(seconds: float) -> Generator[None]:
    """Raise `OutOfTime` in here when so many seconds have passed.

    By an alarm, which Python can only handle between two of its instructions and in its main
    thread: a single call into a library is not cut short. It rings again, should the first one be
    lost in a destructor.
    """
    main = threading.current_thread() is threading.main_thread()
    if math.isinf(seconds) or not main or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: Any) -> None:
        raise OutOfTime

    outer = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer)


def _check(row: Row, answers: Answers, oracle: Oracle) -> None:
    verdict = oracle.judge(answers)
    row.errors, row.allowed, row.top1 = verdict.errors, verdict.allowed, verdict.top1
    if verdict.wrong:
        row.status, row.detail = "WRONG", verdict.wrong
        row.samples_ms.clear()


def _weigh(row: Row, step: Step, device: torch.device, reserved: int) -> None:
    """Fill in what a call needs of memory, of a GPU's weights included, and what it saves.

    A step with a backward half has its forward half as `forward`. Memory that CUDA graphs hold for
    good shows as reserved, other memory as allocated.
    """
    if hasattr(step, "forward"):
        row.saved_bytes = saved_bytes(step)
    if device.type == "cuda":
        for _ in range(2):  # graphs are recorded by the second call
            step(1)
    held = reserved_bytes(device) - reserved
    row.peak_bytes = held + peak_bytes(lambda: step(1), device)


def saved_bytes(step: Any) -> int:
    """Return the bytes that `step.forward` saves for its backward pass beside `step.given`.

    Storages are counted, each once: a tensor may be saved several times, or in views of it.
    """
    given = {t.untyped_storage()._cdata for t in step.given}  # pyright: ignore[reportPrivateUsage]
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key not in given:
            saved[key] = storage.nbytes(), t  # kept, or another might get its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step.forward(0)
    return sum(size for size, _ in saved.values())


def warm_up_compiler(device: torch.device) -> None:
    """Pay what the first compilation of a process costs beside its own work: imports, detection."""
    with _cold_compiler():
        torch.compile(torch.sin)(torch.zeros(8, device=device))


@contextmanager
def _cold_compiler() -> Generator[None]:
    """Compile from scratch: what an earlier run or another provider compiled is out of reach."""
    inductor: Any = importlib.import_module("torch._inductor.utils")
    raised: Exception | None = None
    with TemporaryDirectory() as folder, inductor.fresh_cache(dir=folder, delete=False):
        try:
            yield
        except Exception as error:  # which Inductor would keep the folder for, and say so
            raised = error
    if raised is not None:
        raise raised
