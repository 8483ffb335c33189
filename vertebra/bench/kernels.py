"""The ops on their bench cases: eager PyTorch, torch.compile of it, and this library's dispatch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import Traffic, backend
from ..kernels._op import Call, observe
from ..testing.cases import OPS, Case, Inputs, cases
from ..testing.contract import copied, evaluate, leaves_of, settled, upcast
from .oracle import Answers, Oracle
from .results import Comparison
from .runner import Clock, Provider, Step, measure
from .workload import cache_copies

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def bench_cases(tiny: bool) -> list[Case]:
    """Return the cases tagged "bench", the ops taking turns so that a run cut short has them all.

    With `tiny`, only two of each op, of a size that a CPU does in no time.
    """
    found = [case for turn in zip_longest(*(cases("bench", op) for op in OPS)) for case in turn]
    found = [case for case in found if case is not None]
    if not tiny:
        return found
    first = {(case.op, case.layout): case for case in reversed(found)}
    return [replace(case, shape=(2, 8, 7, 7)) for case in first.values()]


def copy_bandwidth(clock: Clock, size: int) -> float:
    """Return bytes per second, read and written, of a copy of `size` bytes (median of ten)."""
    source = torch.empty(size // 4, dtype=torch.float32, device=clock.device).normal_()
    target = torch.empty_like(source)

    def step(_: int) -> Answers:
        return {"copy": target.copy_(source)}

    samples = sorted(clock(step, 0, 3) for _ in range(11))
    return 2 * source.nbytes / (samples[5] / 1e3)


@dataclass(frozen=True)
class _Run:
    """A case bound to inputs: what a call of it computes, on one path."""

    case: Case
    inputs: list[Inputs]
    path: Literal["auto", "eager"]
    compiled: bool

    def forward(self) -> Step:
        call = self._call()

        def step(i: int) -> Answers:
            with torch.no_grad(), self._backend():
                return {"y": call(self.inputs[i % len(self.inputs)])}

        return step

    def backward(self) -> Step:
        """Differentiate graphs that were built beforehand, once per set of inputs."""
        call = self._call()
        graphs: list[tuple[Tensor, dict[str, Tensor], Tensor]] = []
        with self._backend(), _keeps_graph():
            for inputs in self.inputs:
                # statistics of its own: updating those of another graph would invalidate that one
                inputs = {
                    k: v.clone() if v is not None and v.dim() == 1 else v for k, v in inputs.items()
                }
                leaves = leaves_of(self.case, inputs)
                dy = inputs["dy"]
                assert dy is not None
                y = call({**inputs, **leaves})
                torch.autograd.grad(y, [*leaves.values()], dy, retain_graph=True)  # compiles it
                graphs.append((y, leaves, dy))

        def step(i: int) -> Answers:
            y, leaves, dy = graphs[i % len(graphs)]
            gradients = torch.autograd.grad(y, [*leaves.values()], dy, retain_graph=True)
            return {"d" + name: g for name, g in zip(leaves, gradients, strict=True)}

        return step

    def _backend(self) -> AbstractContextManager[None]:
        return backend(self.path)

    def _call(self) -> Callable[[Inputs], Tensor]:
        def call(inputs: Inputs) -> Tensor:
            return self.case.run(inputs)["y"]

        if not self.compiled:
            return call
        torch.compiler.reset()  # a second shape of the same code would be compiled for any shape
        return torch.compile(call, dynamic=False)


def _keeps_graph() -> AbstractContextManager[Any]:
    """Let a compiled backward run more than once: by default it writes into what was saved."""
    config: Any = importlib.import_module("torch._functorch.config")
    return config.patch(donated_buffer=False)


def compare(
    case: Case,
    clock: Clock,
    rounds: int,
    bandwidth: float,
    *,
    deadline: float,
) -> list[Comparison]:
    """Check and time one case, both ways if it has a gradient; `bandwidth` is a copy's here."""
    inputs = settled(case, case.inputs(clock.device))
    truth = evaluate(case, upcast(inputs), "eager")
    eager = evaluate(case, copied(inputs), "eager")
    size = sum(value.nbytes for value in inputs.values() if value is not None)
    sets = [copied(inputs) for _ in range(cache_copies(size, clock.device))]
    call = _observed(case, sets[0])
    work: Traffic = call.op.traffic(*call.args)
    del inputs
    found: list[Comparison] = []
    for direction in DIRECTIONS if case.differentiable else DIRECTIONS[:1]:
        wanted = "y" if direction == "forward" else "d"
        names = [name for name in truth if name.startswith(wanted)]
        oracle = Oracle({n: truth[n] for n in names}, case.dtype)
        oracle.calibrate({n: eager[n] for n in names})
        rows = measure(
            [
                Provider("eager", True, getattr(_Run(case, sets, "eager", False), direction)),
                Provider("compile", True, getattr(_Run(case, sets, "eager", True), direction)),
                Provider("vertebra", False, getattr(_Run(case, sets, "auto", False), direction)),
            ],
            oracle,
            clock,
            rounds,
            deadline=deadline,
        )
        facts: dict[str, Any] = {"case": case.id, "direction": direction}
        facts |= {"path": call.path, "reason": call.reason, "copy_bytes_per_s": bandwidth}
        moved = {"bytes": float(getattr(work, direction))}
        found.append(Comparison(f"{case.id} {direction}", rows, moved, facts))
    return found


def _observed(case: Case, inputs: Inputs) -> Call:
    """Run the case once, with gradients, and return the call it makes."""
    seen: list[Call] = []
    with observe(seen.append):
        case.run({**inputs, **leaves_of(case, inputs)})
    return seen[0]
