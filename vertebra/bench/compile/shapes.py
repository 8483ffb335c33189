"""Changing shapes: which of them are compiled anew, how long that takes, and is it still right?

Every provider meets a sequence of batches and image sizes, in a process of its own that finds what
its cold start has compiled. Answers are checked at every shape, the first and the last one. Eager
providers, to whom it is nothing what the compiler is told of shapes, come once, beside the default.
A quick plan leaves out the peer's model on our ops.
"""

from __future__ import annotations

import statistics

from ..results import Comparison, Row
from ..session import Session
from .child import Account
from .plan import Direction, Policy, Visit
from .process import Caches, Job, new_row
from .subjects import Subject

_AGAIN = 3


def compare(
    comparison: Comparison,
    subject: Subject,
    direction: Direction,
    policy: Policy,
    caches: Caches,
    session: Session,
) -> None:
    """Send every provider through the shapes; fill in the rows.

    Rows that an earlier run has finished stay.
    """
    plan = subject.plan
    visits = plan.visits(direction)
    done = {row.provider: row for row in comparison.rows if row.status != "late"}
    comparison.rows.clear()
    for name, variant in plan.chosen.items():
        if policy != "automatic" and not variant.compiled:
            continue
        if plan.quick and variant.source == "accelerated":
            continue
        session.tick(f"{name}: {len(visits)} shapes")
        row = done.get(name, new_row(name, plan))
        comparison.rows.append(row)
        if name in done:
            continue
        job = Job(subject, variant, direction, "default", policy, visits, _AGAIN)
        with caches.copy(subject, name, direction, "default") as cache:
            account = job.run(row, cache, session.limits(plan.first_answer_s))
        if account is not None:
            _fill(row, visits, account)
    comparison.finished = True


def _fill(row: Row, visits: list[Visit], account: Account) -> None:
    calls = account.visits
    row.facts["visits"] = [
        {
            **visit._asdict(),
            "graphs": call.graphs,
            "reasons": call.reasons,
            "first_s": call.first_s,
            "again_ms": call.again_ms,
        }
        for visit, call in zip(visits, calls, strict=True)
    ]
    # the first shape was compiled, or found, at the start
    row.facts["recompiled"] = sum(call.graphs for call in calls[1:])
    row.facts["stalled_s"] = sum(
        max(0.0, call.first_s - statistics.median(call.again_ms) / 1e3) for call in calls[1:]
    )
