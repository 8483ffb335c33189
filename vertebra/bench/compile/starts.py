"""Cold starts: how long the first answer is in coming, in a fresh process with empty caches.

A start is timed from the call of `torch.compile`, or of the eager model, to the answer. Imports,
the first use of the device and the building of the module are told apart from it. A restart is the
same in another fresh process that finds the caches of the first.
"""

from __future__ import annotations

import random

from ..results import Comparison, Row
from ..session import Session
from ..workload import CompileMode
from .child import Account
from .plan import Direction
from .process import Caches, Job, new_row
from .subjects import Subject

_AGAIN = 4  # calls after the first: CUDA graphs are recorded in the second
_KEPT = ("imports_s", "device_s", "build_s", "compiling_s", "kernels", "library_calls")


def compare(
    comparison: Comparison,
    subject: Subject,
    direction: Direction,
    mode: CompileMode,
    caches: Caches,
    session: Session,
) -> None:
    """Start every provider, in turn, as often as the plan says; fill in the rows.

    What an earlier run has of a row stays. One that the time did not suffice for keeps the starts
    that it had.
    """
    plan = subject.plan
    rows = {row.provider: row for row in comparison.rows if row.status != "late"}
    for name in plan.chosen:
        rows.setdefault(name, new_row(name, plan))
    comparison.rows[:] = [rows[name] for name in plan.chosen]
    order = random.Random(0)
    for i in range(plan.starts):
        for name in order.sample(list(rows), len(rows)):
            row = rows[name]
            if row.status != "ok" or len(row.samples_ms) > i:
                continue
            session.tick(f"{name}: start {i + 1} of {plan.starts}")
            _start(row, subject, direction, mode, caches, session)
    counts = [len(row.samples_ms) for row in rows.values() if row.status == "ok"]
    comparison.finished = min(counts, default=plan.starts) >= plan.starts


def _start(
    row: Row,
    subject: Subject,
    direction: Direction,
    mode: CompileMode,
    caches: Caches,
    session: Session,
) -> None:
    """Add a start to a row, and a restart where the first one has left something in its caches."""
    plan = subject.plan
    variant = plan.chosen[row.provider]
    job = Job(subject, variant, direction, mode, "static", [plan.base], _AGAIN)
    cache = caches.empty(subject, row.provider, direction, mode)
    limits = session.limits(plan.first_answer_s)
    again: Account | None = None
    first = job.run(row, cache, limits)
    if first is not None and any(cache.iterdir()):
        again = job.run(row, cache, limits)
    if row.status == "late" and row.samples_ms:
        row.status, row.detail = "ok", ""
        return
    if first is None or row.status != "ok":
        row.samples_ms.clear()
        row.facts.clear()
        return
    (call,) = first.visits
    row.samples_ms.append(call.first_s * 1e3)
    row.calls_per_sample, row.method = 1, "host"
    row.first_call_s = row.median_ms / 1e3
    row.peak_bytes = first.device_bytes or first.host_bytes
    kept = {name: getattr(first, name) for name in _KEPT} | {"again_ms": call.again_ms}
    kept |= {"host_bytes": first.host_bytes, "device_bytes": first.device_bytes}
    kept["restart_s"] = None if again is None else again.visits[0].first_s
    row.facts.setdefault("starts", []).append(kept)
