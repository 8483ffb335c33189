"""Steady state: how fast calls are once everything is compiled, providers in turn, and memory."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ..clock import Clock, Step
from ..results import Comparison
from ..runner import Provider, measure
from ..session import Session
from ..workload import CompileMode
from .plan import Direction, Variant
from .process import Caches, variables
from .subjects import Subject


def compare(
    comparison: Comparison,
    subject: Subject,
    direction: Direction,
    mode: CompileMode,
    caches: Caches,
    session: Session,
) -> None:
    """Check every provider, then time all of them in turn; fill in the rows."""
    plan = subject.plan
    torch.compiler.reset()  # what another comparison has made dynamic, or has used up
    torch.backends.cudnn.benchmark = True  # eager PyTorch at its best
    oracle = subject.oracle(plan.base, direction)
    comparison.rows.clear()
    measure(
        comparison,
        [
            Provider(name, v.is_peer, _maker(subject, name, v, direction, mode, caches))
            for name, v in plan.chosen.items()
        ],
        oracle,
        Clock(torch.device(plan.device)),
        plan.rounds,
        limits=session.limits(plan.first_answer_s),
        tick=session.tick,
    )
    for row in comparison.rows:
        row.first_call_s = None  # with caches as they came: `starts` has the real one


def _maker(
    subject: Subject,
    name: str,
    variant: Variant,
    direction: Direction,
    mode: CompileMode,
    caches: Caches,
) -> Callable[[], Step]:
    def make() -> Step:
        if not variant.compiled:
            return subject.step(variant, direction)
        run = {"mode": mode, "dynamic": False, "backend": subject.plan.backend}
        step = subject.step(variant, direction, run=run)
        with caches.copy(subject, name, direction, mode) as cache, _compiling_in(cache):
            step(0)
        return step

    return make


@contextmanager
def _compiling_in(cache: Path) -> Generator[None]:
    """Let compilers use `cache`, and nothing that they remember."""
    inductor: Any = importlib.import_module("torch._inductor.utils")
    inductor.clear_caches()
    with patch.dict(os.environ, variables(cache)):
        yield
