"""The ops on their bench cases: eager PyTorch, torch.compile, peers' modules, and our dispatch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels import backend
from ..kernels._op import Call, observe
from ..testing.cases import OPS, Case, Inputs, cases
from ..testing.contract import copied, evaluate, leaves_of, settled, upcast
from . import modules
from .ceilings import DTYPES
from .clock import Clock, Step, cache_copies
from .modules import Function
from .oracle import Answers, Oracle
from .results import Comparison
from .runner import Provider, measure
from .session import Session, Task
from .settings import Settings

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def directions(case: Case) -> tuple[Direction, ...]:
    """Return the passes that a case has: not every op has a backward one."""
    return DIRECTIONS if case.differentiable else DIRECTIONS[:1]


class Way(NamedTuple):
    """How to compute what an op computes: `bind` makes a function of a case, run on `path`."""

    bind: Callable[[Case], Function]
    path: Literal["auto", "eager"]
    compile: str | None = None
    peer: bool = True


def _op(case: Case) -> Function:
    """Return the op itself."""

    def call(inputs: Inputs) -> Tensor:
        return case.run(inputs)["y"]

    return call


PROVIDERS: dict[str, Way] = {
    "eager": Way(_op, "eager"),
    "compile": Way(_op, "eager", "default"),
    # without its CUDA graphs, which would copy the inputs; graphs are the clock's matter here
    "max-autotune": Way(_op, "eager", "max-autotune-no-cudagraphs"),
    **{library: Way(modules.of(library), "eager") for library in modules.LIBRARIES},
    "vertebra": Way(_op, "auto", peer=False),
    "vertebra-compile": Way(_op, "auto", "default", peer=False),
}


def suitable(op: str, settings: Settings) -> tuple[str, ...]:
    """Return the providers of an op that a machine has and can do in reasonable time."""
    return tuple(
        name
        for name, way in PROVIDERS.items()
        if (settings.compiled or way.compile is None)
        and (settings.on_gpu or name != "max-autotune")
        and (name not in modules.LIBRARIES or modules.offers(name, op))
    )


def bench_cases(ops: Sequence[str], settings: Settings) -> list[Case]:
    """Return the cases tagged "bench", the ops taking turns so that a run cut short has them all.

    On a CPU, one of each op and layout, unless some were asked for by name.
    """
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"ops are {', '.join(OPS)}; got {', '.join(unknown)}")
    turns = zip_longest(*(cases("bench", op) for op in ops or OPS))
    found = [case for turn in turns for case in turn if case is not None]
    found = [case for case in found if case.layout in settings.layouts]
    found = [case for case in found if settings.match in case.id]
    if settings.tiny or not (settings.on_gpu or settings.match):
        first = {(case.op, case.layout): case for case in reversed(found)}
        found = list(reversed(first.values()))
    dtype = DTYPES[settings.dtype]
    sized: list[Case] = []
    for case in found:
        C, H, W = (8, 7, 7) if settings.tiny else case.shape[1:]
        for N in settings.batches or case.shape[:1]:
            sized.append(replace(case, shape=(N, C, H, W), dtype=dtype))
    return list(dict.fromkeys(sized))


def tasks(ops: Sequence[str], settings: Settings) -> list[Task]:
    """Return what there is to measure of some ops, or of all.

    Raises:
        ValueError: there is no such op.
    """
    found: list[Task] = []
    for case in bench_cases(ops, settings):
        names = settings.providers or suitable(case.op, settings)
        ways = directions(case)
        comparisons = tuple(f"{case.id} {direction}" for direction in ways)
        steps = len(ways) * (len(names) + settings.rounds + 1)
        found.append(Task(comparisons, partial(compare, case, names, settings), steps))
    return found


@dataclass
class _Forward:
    """A call without gradients."""

    function: Function
    context: Callable[[], AbstractContextManager[Any]]
    inputs: Sequence[Inputs]

    def __call__(self, i: int) -> Answers:
        with torch.no_grad(), self.context():
            return {"y": self.function(self.inputs[i % len(self.inputs)])}


@dataclass
class _Backward:
    """Differentiates graphs that the first call builds, one per set of inputs."""

    case: Case
    function: Function
    context: Callable[[], AbstractContextManager[Any]]
    inputs: Sequence[Inputs]
    graphs: list[tuple[Tensor, dict[str, Tensor], Tensor]] = field(
        default_factory=list[tuple[Tensor, dict[str, Tensor], Tensor]]
    )

    def __call__(self, i: int) -> Answers:
        if not self.graphs:
            with _keeps_graph():
                self.graphs += [self._graph(inputs) for inputs in self.inputs]
                for j in range(len(self.graphs)):
                    self._differentiate(j)  # compiles it
        return self._differentiate(i)

    @property
    def given(self) -> list[Tensor]:
        """What is there before the forward pass."""
        return [value for value in self.inputs[0].values() if value is not None]

    def forward(self, i: int) -> Tensor:
        """Return y, with its graph."""
        inputs = self.inputs[i % len(self.inputs)]
        with self.context():
            return self.function({**inputs, **leaves_of(self.case, inputs)})

    def _graph(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        # statistics of its own: updating those of another graph would invalidate that one
        own = {k: v.clone() if v is not None and v.dim() == 1 else v for k, v in inputs.items()}
        leaves = leaves_of(self.case, own)
        dy = inputs["dy"]
        assert dy is not None
        with self.context():
            return self.function({**own, **leaves}), leaves, dy

    def _differentiate(self, i: int) -> Answers:
        y, leaves, dy = self.graphs[i % len(self.graphs)]
        gradients = torch.autograd.grad(y, [*leaves.values()], dy, retain_graph=True)
        return {"d" + name: g for name, g in zip(leaves, gradients, strict=True)}


def _keeps_graph() -> AbstractContextManager[Any]:
    """Let a compiled backward run more than once: by default it writes into what was saved."""
    config: Any = importlib.import_module("torch._functorch.config")
    return config.patch(donated_buffer=False)


@dataclass(frozen=True)
class Problem:
    """A case on a device: its inputs, in several places of memory, and what is right.

    Attributes:
        case: whose op is asked.
        sets: equal inputs, together larger than the cache.
        truth: in fp64.
        eager: plain PyTorch's answers in the case's dtype.
        call: what the op makes of it: path, reason, arguments.
    """

    case: Case
    sets: list[Inputs]
    truth: Answers
    eager: Answers
    call: Call

    @classmethod
    def create(cls, case: Case, device: torch.device) -> Problem:
        """Draw the inputs and compute the answers."""
        inputs = settled(case, case.inputs(device))
        truth = evaluate(case, upcast(inputs), "eager")
        eager = evaluate(case, copied(inputs), "eager")
        size = sum(value.nbytes for value in inputs.values() if value is not None)
        sets = [copied(inputs) for _ in range(cache_copies(size, device))]
        return cls(case, sets, truth, eager, _observed(case, sets[0]))

    def oracle(self, direction: Direction) -> Oracle:
        """Return the judge of y, or of the gradients."""
        wanted = "y" if direction == "forward" else "d"
        truth = {n: value for n, value in self.truth.items() if n.startswith(wanted)}
        terms = {n: self.case.subject.terms(self.case, n, value) for n, value in truth.items()}
        oracle = Oracle(truth, self.case.dtype, terms)
        oracle.calibrate({n: self.eager[n] for n in truth})
        return oracle

    def provider(self, name: str, direction: Direction) -> Provider:
        """Return what computes y, or the gradients, in the way of that name."""
        way = PROVIDERS[name]
        return Provider(name, way.peer, partial(self._make, way, direction), capturable=True)

    def bytes(self, direction: Direction) -> float:
        """Return what has to be moved."""
        return float(getattr(self.call.op.traffic(*self.call.args), direction))

    def clock(self, device: torch.device) -> Clock:
        """Return what times it."""
        return Clock(device, short=True, target_ms=20.0, least=len(self.sets))

    def _make(self, way: Way, direction: Direction) -> Step:
        function = way.bind(self.case)
        if way.compile is not None:
            function = torch.compile(function, dynamic=False, mode=way.compile)
        context = partial(backend, way.path)
        if direction == "forward":
            return _Forward(function, context, self.sets)
        return _Backward(self.case, function, context, self.sets)


def compare(case: Case, names: Sequence[str], settings: Settings, session: Session) -> None:
    """Check and time one case, forward and backward."""
    device = torch.device(settings.device)
    problem = Problem.create(case, device)
    for direction in directions(case):
        torch.compiler.reset()  # the same code for another shape counts as compiled too often
        comparison = Comparison(
            f"{case.id} {direction}",
            [],
            {"bytes": problem.bytes(direction)},
            facts=_facts(problem, direction, settings),
        )
        measure(
            session.begin(comparison),
            [problem.provider(name, direction) for name in names],
            problem.oracle(direction),
            problem.clock(device),
            settings.rounds,
            limits=session.limits(settings.first_answer_s),
            tick=session.tick,
        )


def _facts(problem: Problem, direction: Direction, settings: Settings) -> dict[str, Any]:
    case = problem.case
    options = [*case.options, *(() if case.act == "none" else (case.act,))]
    numbers = [option for option in options if "=" in option]
    return {
        "case": case.id,
        "op": case.op,
        "shape": list(case.shape),
        "batch": case.shape[0],
        "layout": case.layout,
        "options": " ".join(option for option in options if option not in numbers),
        "numbers": " ".join(numbers),
        "direction": direction,
        "dtype": settings.dtype,
        "device": settings.device,
        "path": problem.call.path,
        "reason": problem.call.reason,
    }


def _observed(case: Case, inputs: Inputs) -> Call:
    """Run the case once, with gradients, and return the call it makes."""
    seen: list[Call] = []
    with observe(seen.append):
        case.run({**inputs, **leaves_of(case, inputs)})
    return seen[0]
