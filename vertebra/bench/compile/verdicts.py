"""Who wins where, from the numbers alone: ours beside the peer's, question by question.

Of several rows that could stand for a side, the best one does. Times that were taken in turn are
compared round by round, with the fastest of the peer's rows in that round: where the quartiles of
the ratios are on one side of 1, somebody wins. Of single times that says nothing, and only a factor
of two counts. Counts and bytes are compared as they are.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..results import Comparison, Report, Row, quartiles
from .plan import EAGER_TWIN, PROVIDERS, TITLES

Outcome = Literal["win", "tie", "loss"]
Key = tuple[str, str]
"""Aspect; and the mode or the policy that it was asked for, where there are several."""

_FEW = 3  # samples, fewer than which have no quartiles to speak of
_CLEAR = 2.0  # the factor that single times must differ by: runs of equals differed by 1.7 here
_WORDS: dict[Outcome, str] = {"win": "wins against", "tie": "ties with", "loss": "loses to"}


@dataclass
class Case:
    """All that was found of one network or block, in one direction."""

    subject: str
    direction: str
    comparisons: dict[Key, Comparison] = field(default_factory=dict[Key, Comparison])

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.subject} {TITLES[self.direction]}"  # pyright: ignore[reportArgumentType]

    def of(self, aspect: str) -> Iterator[tuple[str, Comparison]]:
        """Yield the comparisons of an aspect, each with its mode or policy."""
        for (name, how), comparison in self.comparisons.items():
            if name == aspect:
                yield how, comparison


def cases(report: Report) -> list[Case]:
    """Return what a report has, case by case, in its order."""
    found: dict[tuple[str, str], Case] = {}
    for comparison in report.comparisons:
        facts = comparison.facts
        subject = " ".join(filter(None, (facts["model"], facts["block"])))
        case = found.setdefault((subject, facts["direction"]), Case(subject, facts["direction"]))
        aspect = facts["aspect"]
        how = {"graphs": "", "shapes": facts["policy"]}.get(aspect, facts["mode"])
        case.comparisons[aspect, how] = comparison
    return list(found.values())


class Verdict(NamedTuple):
    """How ours does beside the peer's in one question; `ratio` is quartiles of how much better."""

    case: Case
    question: str
    ours: str
    peer: str
    outcome: Outcome
    ratio: tuple[float, float, float] | None
    numbers: str

    def __str__(self) -> str:
        factor = ""
        if self.ratio is not None:
            low, middle, high = self.ratio
            spread = f" [quartiles {low:.2f} to {high:.2f}]" if low < high else ""
            factor = f", {middle:.2f}x as good{spread}"
        return (
            f"{self.case.title}, {self.question}: {self.ours} {_WORDS[self.outcome]} {self.peer} "
            f"({self.numbers}{factor})"
        )


def verdicts(report: Report) -> list[Verdict]:
    """Return the verdict on every question that both sides have an answer to, or should have."""
    return [verdict for case in cases(report) for verdict in _judge(case)]


_EAGER = ("eager",), ("vertebra", "accelerated")
_COMPILED = ("compile",), ("vertebra-compile", "accelerated-compile")
_ALL = tuple(a + b for a, b in zip(_EAGER, _COMPILED, strict=True))


def _judge(case: Case) -> Iterator[Verdict]:
    for how, found in case.of("graphs"):
        yield from _counted(case, "graph breaks", found, "breaks", how)
    for mode, found in case.of("starts"):
        if mode == "default":
            yield from _timed(case, "first answer, eager", found, *_EAGER)
        yield from _timed(case, f"first answer, compiled ({mode})", found, *_COMPILED)
    for mode, found in case.of("steady"):
        yield from _timed(case, f"steady speed, eager or compiled ({mode})", found, *_ALL)
        yield from _timed(
            case, f"steady speed, ours without a compiler ({mode})", found, _ALL[0], _EAGER[1]
        )
        yield from _weighed(case, f"saved for the backward pass ({mode})", found, "saved_bytes")
        yield from _weighed(case, f"peak memory ({mode})", found, "peak_bytes")
    yield from _over_modes(case, dict(case.of("steady")))
    for policy, found in case.of("shapes"):
        yield from _counted(case, "recompilations", found, "recompiled", policy)


def _timed(
    case: Case, question: str, found: Comparison, peers: Sequence[str], ours: Sequence[str]
) -> Iterator[Verdict]:
    """Compare the fastest of either side, round by round."""
    timed = {row.provider: row for row in found.timed}
    peer, own = (_best(timed, names) for names in (peers, ours))
    if own is None or peer is None:
        yield from _by_default(case, question, found, peers, ours, own, peer)
        return
    fastest = map(min, zip(*(timed[n].samples_ms for n in peers if n in timed), strict=False))
    ratios = [b / a for a, b in zip(own.samples_ms, fastest, strict=False)]
    low, middle, high = quartiles(ratios)
    if len(ratios) < _FEW:
        low, high = middle / _CLEAR, middle * _CLEAR
    outcome: Outcome = "win" if low > 1 else "loss" if high < 1 else "tie"
    spread = (low, middle, high) if len(ratios) >= _FEW else (middle, middle, middle)
    numbers = f"{duration(own.median_ms)} to {duration(peer.median_ms)}"
    yield Verdict(case, question, own.provider, peer.provider, outcome, spread, numbers)


def _over_modes(case: Case, found: dict[str, Comparison]) -> Iterator[Verdict]:
    """Compare the fastest of either side in whatever mode, by their speeds beside the peer's eager.

    The modes were not timed in turn: here the quartiles of either side must not overlap.
    """
    speeds: dict[bool, dict[str, tuple[float, float, float]]] = {True: {}, False: {}}
    for mode, comparison in found.items():
        timed = {row.provider: row for row in comparison.timed}
        eager = timed.get("eager")
        for name, row in timed.items() if eager else ():
            pairs = zip(eager.samples_ms, row.samples_ms, strict=False) if eager else ()
            how = f"{name} ({mode})" if PROVIDERS[name].compiled else name
            speeds[row.peer][how] = quartiles([a / b for a, b in pairs])
    if len(found) < 2 or not all(speeds.values()):
        return
    peer, own = (max(speeds[side].items(), key=lambda item: item[1][1]) for side in (True, False))
    (low, middle, high), (peer_low, peer_middle, peer_high) = own[1], peer[1]
    outcome: Outcome = "win" if low > peer_high else "loss" if high < peer_low else "tie"
    ratio = (low / peer_high, middle / peer_middle, high / peer_low)
    numbers = f"{middle:.2f} to {peer_middle:.2f} times the speed of eager"
    yield Verdict(case, "steady speed, best of all modes", own[0], peer[0], outcome, ratio, numbers)


def _best(timed: dict[str, Row], names: Sequence[str]) -> Row | None:
    rows = [timed[name] for name in names if name in timed]
    return min(rows, key=lambda row: row.median_ms, default=None)


def _by_default(
    case: Case,
    question: str,
    found: Comparison,
    peers: Sequence[str],
    ours: Sequence[str],
    own: Row | None,
    peer: Row | None,
) -> Iterator[Verdict]:
    """Whoever alone has an answer wins, unless the other was not there or not asked."""
    silent = peers if peer is None else ours
    asked = [row for row in found.rows if row.provider in silent]
    if (own is None) == (peer is None) or not asked:
        return
    if all(row.status in ("absent", "late", "ok") for row in asked):
        return
    outcome: Outcome = "win" if peer is None else "loss"
    numbers = ", ".join(f"{row.provider} is {row.status}" for row in asked)
    ours_name, peer_name = (row.provider if row else asked[0].provider for row in (own, peer))
    yield Verdict(case, question, ours_name, peer_name, outcome, None, numbers)


def _counted(
    case: Case, question: str, found: Comparison, fact: str, how: str
) -> Iterator[Verdict]:
    """Compare counts of the compiled, of which the least is the best."""
    rows = {r.provider: r for r in found.rows if r.status == "ok" and fact in r.facts}
    counts = {name: row.facts[fact] for name, row in rows.items()}
    (peer,), own = _COMPILED
    best = min((name for name in own if name in counts), key=counts.__getitem__, default=None)
    where = f"{question}, {how}" if how else question
    if best is None or peer not in counts:
        sides = (None if best is None else rows[best]), rows.get(peer)
        yield from _by_default(case, where, found, (peer,), own, *sides)
        return
    a, b = counts[best], counts[peer]
    outcome: Outcome = "win" if a < b else "loss" if a > b else "tie"
    yield Verdict(case, where, best, peer, outcome, None, f"{a} to {b}")


def _weighed(case: Case, question: str, found: Comparison, what: str) -> Iterator[Verdict]:
    """Compare bytes, of which the least are the best; within 1 % they are as many."""
    sizes = {row.provider: getattr(row, what) for row in found.timed if getattr(row, what)}
    sides = [[name for name in names if name in sizes] for names in _ALL]
    if not all(sides):
        return
    peer, own = (min(names, key=sizes.__getitem__) for names in sides)
    ratio = sizes[peer] / sizes[own]
    outcome: Outcome = "win" if ratio > 1.01 else "loss" if ratio < 1 / 1.01 else "tie"
    numbers = f"{amount(sizes[own])} to {amount(sizes[peer])}"
    yield Verdict(case, question, own, peer, outcome, (ratio, ratio, ratio), numbers)


class Payoff(NamedTuple):
    """After how many images compiling has paid, beside the same model run eagerly.

    `cold` counts from empty caches, `again` from those of an earlier process; None is never.
    """

    case: Case
    mode: str
    provider: str
    eager: str
    cold: float | None
    again: float | None
    ratio: tuple[float, float, float]

    def __str__(self) -> str:
        low, middle, high = self.ratio
        speed = f"{middle:.2f}x the speed of {self.eager} [{low:.2f} to {high:.2f}]"
        if self.cold is None:
            return f"{self.case.title}: {self.provider} ({self.mode}) never pays: {speed}"
        later = "" if self.again is None else f", {self.again:,.0f} where caches are filled"
        return (
            f"{self.case.title}: {self.provider} ({self.mode}) pays after {self.cold:,.0f} "
            f"images{later}: {speed}"
        )


def payoffs(report: Report) -> Iterator[Payoff]:
    """Yield, for everything compiled, when it has paid."""
    for case in cases(report):
        for mode, steady in case.of("steady"):
            starts = case.comparisons.get(("starts", mode))
            if starts is None:
                continue
            first, rows = ({row.provider: row for row in c.timed} for c in (starts, steady))
            for name, eager in EAGER_TWIN.items():
                if {name, eager} <= first.keys() & rows.keys():
                    yield _payoff(case, mode, name, eager, first, rows, steady.work["images"])


def _payoff(
    case: Case,
    mode: str,
    name: str,
    eager: str,
    first: dict[str, Row],
    rows: dict[str, Row],
    batch: float,
) -> Payoff:
    pairs = zip(rows[eager].samples_ms, rows[name].samples_ms, strict=True)
    ratio = quartiles([a / b for a, b in pairs])
    gain = rows[eager].median_ms - rows[name].median_ms  # per call
    if ratio[0] <= 1 or gain <= 0:
        return Payoff(case, mode, name, eager, None, None, ratio)

    def images(start_ms: float) -> float:
        return batch * (1 + max(0.0, start_ms - first[eager].median_ms) / gain)

    again = median_of(first[name], "restart_s")
    return Payoff(
        *(case, mode, name, eager, images(first[name].median_ms)),
        None if again is None else images(again * 1e3),
        ratio,
    )


def median_of(row: Row, fact: str) -> float | None:
    """Return the median of a number that every start of a row has, or None."""
    values: list[Any] = [start[fact] for start in row.facts.get("starts", ())]
    return statistics.median(values) if values and None not in values else None


def tally(found: Sequence[Verdict]) -> Iterator[str]:
    """Say how often ours win, tie and lose; then every loss, and every win."""
    count = {outcome: sum(v.outcome == outcome for v in found) for outcome in _WORDS}
    yield (
        f"Of {len(found)} questions ours win {count['win']}, tie in {count['tie']} and lose "
        f"{count['loss']}."
    )
    for outcome, heading in (("loss", "a loss"), ("win", "a win")):
        yield from (f"{heading}: {verdict}." for verdict in found if verdict.outcome == outcome)


def duration(milliseconds: float) -> str:
    """Return a time as people read it."""
    if milliseconds >= 1e4:
        return f"{milliseconds / 1e3:.0f} s"
    return f"{milliseconds / 1e3:.2g} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"


def amount(size: float) -> str:
    """Return bytes as people read them."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


assert set(_ALL[0] + _ALL[1]) == set(PROVIDERS)
