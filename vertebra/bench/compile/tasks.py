"""The comparisons of a run: every network and block, question by question."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from .. import cpu
from ..models import ON_CPU, ON_GPU, TINY, check
from ..results import Comparison, Report
from ..session import Session, Task
from ..workload import CompileMode
from . import graphs, shapes, starts, steady
from .plan import TITLES, Aspect, Direction, Plan, Policy
from .process import Caches
from .subjects import blocks, subject


@dataclass(frozen=True)
class Question:
    """One comparison: what is asked of which network, or of its block at `path`.

    `mode` and `policy` are those of the compiler where the question depends on them.
    """

    model: str
    path: str
    direction: Direction
    aspect: Aspect
    mode: CompileMode = "default"
    policy: Policy = "automatic"

    @property
    def subject(self) -> str:
        """The network's name, and the block's."""
        return " ".join(filter(None, (self.model, self.path)))

    def title(self, plan: Plan) -> str:
        """Return the name of the comparison."""
        how = {"graphs": "graphs", "shapes": f"shapes, {self.policy}"}
        what = how.get(self.aspect, f"{self.aspect}, {self.mode}")
        size = f"{plan.base.batch} x {plan.base.size} x {plan.base.size}"
        return f"{self.subject} {TITLES[self.direction]}, {size}, {plan.dtype}: {what}"

    @property
    def rank(self) -> tuple[bool, bool]:
        """What is asked later: blocks, and before them, of networks, all but the defaults."""
        return self.path != "", (self.mode, self.policy) != ("default", "automatic")

    def steps(self, plan: Plan) -> int:
        """Return how often it tells of its progress."""
        count = len(plan.chosen)
        if self.aspect == "starts":
            return count * plan.starts
        return count + (plan.rounds + 1 if self.aspect == "steady" else 0)


def questions(model: str, plan: Plan) -> Iterator[Question]:
    """Yield what is asked of a network, then of its blocks.

    Of blocks, only Inductor's default mode and what torch.compile does with shapes by default; and
    by a quick plan, no question that takes processes.
    """
    for path in ("", *(blocks(model, plan) if plan.blocks else ())):
        for direction in plan.directions:
            ask = partial(Question, model, path, direction)
            modes: list[CompileMode] = list(plan.modes if path == "" else plan.modes[:1])
            if direction == "training" and "freezing" in modes:
                modes.remove("freezing")
            if "graphs" in plan.aspects:
                yield ask("graphs")
            alone = path != "" and plan.quick
            if "starts" in plan.aspects and not alone:
                yield from (ask("starts", mode) for mode in modes)
            if "steady" in plan.aspects:
                yield from (ask("steady", mode) for mode in modes)
            if "shapes" in plan.aspects and not alone:
                policies = plan.policies if path == "" else ("automatic",)
                yield from (ask("shapes", policy=policy) for policy in policies)


def tasks(names: Sequence[str], plan: Plan) -> list[Task]:
    """Return what there is to compare: what matters most of every network, then the rest.

    Raises:
        ValueError: there is no such model.
    """
    check(names)
    suitable = ON_GPU if plan.on_gpu else TINY[:1] if plan.quick else ON_CPU
    asked = [q for name in names or suitable for q in questions(name, plan)]
    caches = Caches()
    return [
        Task((q.title(plan),), partial(compare, q, plan, caches), q.steps(plan))
        for q in sorted(asked, key=lambda q: q.rank)
        if plan.match in q.subject
    ]


def compare(question: Question, plan: Plan, caches: Caches, session: Session) -> None:
    """Ask a question of every provider."""
    if not plan.on_gpu:
        _settle()
    session.tick("weights and photographs")
    it = subject(question.model, question.path, plan)
    title = question.title(plan)
    rows = [row for c in session.report.comparisons if c.name == title for row in c.rows]
    facts = {
        "model": question.model,
        "block": question.path,
        "aspect": question.aspect,
        "direction": question.direction,
        "mode": question.mode,
        "policy": question.policy,
        "batch": plan.base.batch,
        "image_size": plan.base.size,
        "dtype": plan.dtype,
        "device": plan.device,
        "threads": torch.get_num_threads(),
        "reference": it.work.library,
        "load": os.getloadavg()[0],
    }
    comparison = session.begin(Comparison(title, rows, {"images": plan.base.batch}, facts))
    direction, mode, policy = question.direction, question.mode, question.policy
    if question.aspect == "graphs":
        graphs.compare(comparison, it, direction, session)
    elif question.aspect == "starts":
        starts.compare(comparison, it, direction, mode, caches, session)
    elif question.aspect == "steady":
        steady.compare(comparison, it, direction, mode, caches, session)
    else:
        shapes.compare(comparison, it, direction, policy, caches, session)


def notes(report: Report) -> Iterator[str]:
    """Yield what a reader of the tables must know of how they came about."""
    settings, loads = report.settings, [c.facts["load"] for c in report.comparisons]
    if settings["backend"] != "inductor":
        yield f"The backend of torch.compile was {settings['backend']}, which is not its own."
    if settings["device"] == "cpu" and loads:
        cores, threads = os.cpu_count(), report.comparisons[-1].facts["threads"]
        yield (
            f"A CPU of {cores} cores, {threads} of them used, while {min(loads):.0f} to "
            f"{max(loads):.0f} processes wanted to run: times are noisy, by a factor where a start "
            "is timed once. Kernels need a GPU: here ours are operations of PyTorch like the "
            "peer's, compiled or not, and no difference in speed is due to them."
        )
    yield (
        "A start is timed from the call of torch.compile, or of the eager model, to the answer: "
        "imports, the first use of the device and the building of the module are told apart. "
        f"Fresh processes per provider, with empty caches: {settings['starts']}."
    )


@cache
def _settle() -> None:
    cpu.settle()
