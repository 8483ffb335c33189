"""`vertebra tune`: measure the candidates for every convolution of a fused model, keep the fastest.

The model runs, to see which convolutions it has, and which pairs of them one kernel could run, or
pairs with the 3x3 in front; equal ones are measured once, and after what they consist of, so that
one kernel competes with the best of the others. Every candidate is checked against fp64 before it
is timed, in turns with the others, on inputs that rotate through memory, in CUDA graphs. What is
not told apart from the choice without a table keeps that choice. Each result is in the user's table
as soon as it is found (`vertebra.kernels._choices`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from ..interop import fuse
from ..kernels import _b2b, _choices, _conv2d, backend
from ..kernels._b2b import Arguments as Pair
from ..kernels._conv2d import Arguments, memory_format
from ..kernels._op import Call, Op, has_kernels, observe
from ..kernels.conv2d_act import candidates
from ..kernels.conv2d_act import op as convolution
from ..kernels.conv2d_b2b import candidates as candidates_of_pair
from ..kernels.conv2d_b2b import op as back_to_back
from ..models import create_model
from .ceilings import DTYPES
from .clock import Clock, Step, cache_copies
from .models import check
from .oracle import Answers, Oracle
from .report import conclude, plain_table, print_table
from .results import Comparison, Report, Row, quartiles
from .runner import Provider, measure
from .session import Session, Task
from .settings import Settings


class Tuned(NamedTuple):
    """An op that has candidates: its calls, what tables call them, who takes them, and the work."""

    op: Op
    arguments: Callable[..., Any]
    site: Callable[[Any], str]
    candidates: Callable[..., list[str]]
    flops: Callable[[Any], float]


def _flops(a: Arguments) -> float:
    N, K, P, Q = a.shape
    return 2.0 * N * K * P * Q * a.weight[0].numel()


def _flops_of_pair(a: Pair) -> float:
    (N, B, H, W), (C, K, D) = a.x.shape, a.widths
    mid = 0 if a.mid_weight is None else 9 * B * C
    return 2.0 * N * H * W * (mid + K * (C + D))


ALONE = Tuned(convolution, Arguments, _conv2d.site, candidates, _flops)
PAIRS = Tuned(back_to_back, Pair, _b2b.site, candidates_of_pair, _flops_of_pair)


KINDS = {1: "convolutions", 2: "pairs of them", 3: "pairs with the 3x3 in front"}


class Place(NamedTuple):
    """Some convolutions, their tensors without memory, and how often the models have them."""

    tuned: Tuned
    arguments: Any
    count: int

    @property
    def site(self) -> str:
        """What tables call it."""
        return self.tuned.site(self.arguments)

    @property
    def convolutions(self) -> int:
        """How many one candidate runs: one of `KINDS`."""
        if self.tuned.op is convolution:
            return 1
        return 2 if self.arguments.mid_weight is None else 3


def table_of(device: torch.device, tuned: Tuned = ALONE) -> Path:
    """Return the path of the table that is written."""
    folder, name = _choices.user_folder(), _choices.device_name(device)
    return _choices.file_of(folder, tuned.op.name, name)


# ------------------------------------------------------------------------------- what is measured


def convolutions(model: nn.Module, x: Tensor) -> list[Place]:
    """Return the convolutions that `model(x)` runs as `conv2d_act`, each site once."""
    # in which no convolution runs as part of another op, as a table may have it
    with backend("eager"):
        return _observed(ALONE, model, x)


def pairs(model: nn.Module, x: Tensor) -> list[Place]:
    """Return the pairs of convolutions that one kernel could run in `model(x)`, each site once.

    And, where it could run them with the 3x3 in front, those too.
    """
    if not has_kernels(x):
        return []
    try:
        with backend("triton"):  # which takes whatever it can
            return _observed(PAIRS, model, x)
    except NotImplementedError:  # something in it cannot: no network of bottlenecks
        return []


def _observed(tuned: Tuned, model: nn.Module, x: Tensor) -> list[Place]:
    found: list[Any] = []

    def note(call: Call) -> None:
        if call.op is tuned.op:
            a = _each(tuned.arguments(*call.args), lambda t: t.to("meta"))
            found.append(a)
            if isinstance(a, Pair) and a.mid_weight is not None:
                found.append(a.behind_mid(convolution.eager(*a.mid)))

    with torch.no_grad(), observe(note):
        model(x)
    counts = Counter(map(tuned.site, found))
    first = {tuned.site(a): a._replace(candidate="") for a in reversed(found)}
    return [Place(tuned, first[name], n) for name, n in counts.items()]


def _each(a: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a call with every tensor of it changed."""
    fields = a._asdict().items()
    return a._replace(**{name: change(v) for name, v in fields if isinstance(v, Tensor)})


def places(names: Sequence[str], settings: Settings) -> list[Place]:
    """Return the convolutions of some models after `fuse`, on an image of the size that is set.

    Raises:
        ValueError: there is no such model; kernels are interpreted, so that no time counts.
    """
    if has_kernels(torch.empty(0)) and not settings.tiny:
        raise ValueError(
            "tune times candidates, and TRITON_INTERPRET=1 has those of Triton interpreted; unset "
            "it. Only --tiny, which writes no table, runs so"
        )
    check(names)
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    found: dict[str, Place] = {}
    for name in names:
        model = fuse(create_model(name).to(device, dtype).eval())
        x = torch.randn(1, 3, *[settings.image_size] * 2, device=device, dtype=dtype)
        for place in [*convolutions(model, x), *pairs(model, x)]:
            before = found[place.site].count if place.site in found else 0
            found[place.site] = place._replace(count=before + place.count)
    chosen = [place for name, place in found.items() if settings.match in name]
    chosen.sort(key=lambda place: place.convolutions)
    return chosen[:3] if settings.tiny else chosen


def tasks(found: Sequence[Place], settings: Settings) -> list[Task]:
    """Return what there is to measure: every convolution at every batch."""
    return [
        Task((_title(place, batch),), partial(_compare, place, batch, settings), settings.rounds)
        for batch in settings.batches
        for place in found
    ]


def _title(place: Place, batch: int) -> str:
    return f"{place.site}, batch {batch}"


# --------------------------------------------------------------------------------- how, and which


def _compare(place: Place, batch: int, settings: Settings, session: Session) -> None:
    """Check and time all candidates for a convolution, and write down the fastest."""
    device = torch.device(settings.device)
    torch.backends.cudnn.benchmark = True  # cuDNN at its best
    tuned = place.tuned
    problem = Problem.create(place, batch, device)
    a = problem.sets[0]
    names = tuned.candidates(*a)[: 3 if settings.tiny else None]
    comparison = Comparison(
        _title(place, batch),
        [],
        {"bytes": float(tuned.op.traffic(*a).forward), "flops": tuned.flops(a)},
        {
            "op": tuned.op.name,
            "convolutions": place.convolutions,
            "site": place.site,
            "batch": batch,
            "count": place.count,
            "dtype": settings.dtype,
            "device": settings.device,
        },
    )
    measure(
        session.begin(comparison),
        # who runs without a table is the one to beat
        [problem.provider(name, peer=name == names[0]) for name in names],
        problem.oracle(),
        Clock(device, short=True, target_ms=10.0, least=len(problem.sets)),
        settings.rounds,
        limits=session.limits(settings.first_answer_s),
        tick=session.tick,
    )
    fastest = best(comparison)
    if fastest is not None and not settings.tiny:
        facts = session.report.environment
        versions = {name: str(facts[name]) for name in ("torch", "triton", "vertebra")}
        chosen = {place.site: {batch: fastest.provider}}
        _choices.write(tuned.op.name, _choices.device_name(device), chosen, versions)


def best(comparison: Comparison) -> Row | None:
    """Return the fastest candidate, or the default if that one is not told apart from it."""
    ours, default = (comparison.best(peer) for peer in (False, True))
    if ours is None or default is None:
        return ours or default
    low, _, _ = quartiles(comparison.speedups(ours))
    return ours if low > 1 else default


@dataclass(frozen=True)
class Problem:
    """A convolution of a batch: its inputs in several places of memory, and what is right."""

    op: Op
    sets: list[Any]

    @classmethod
    def create(cls, place: Place, batch: int, device: torch.device) -> Problem:
        """Draw the inputs."""
        first = _inputs(place.arguments, batch, device)
        size = sum(value.nbytes for value in first if isinstance(value, Tensor))
        copies = cache_copies(size, device)
        others = (_each(first, _cloned) for _ in range(copies - 1))
        return cls(place.tuned.op, [first, *others])

    def oracle(self) -> Oracle:
        """Return the judge of what the op returns."""
        a = self.sets[0]
        truth = _answers(self.op.eager(*_each(a, Tensor.double)))
        oracle = Oracle(truth, a.x.dtype, {name: a.weight[0].numel() for name in truth})
        oracle.calibrate(_answers(self.op.eager(*a)))
        return oracle

    def provider(self, name: str, peer: bool) -> Provider:
        """Return the candidate of that name."""
        return Provider(name, peer, partial(self._make, name), capturable=True)

    def _make(self, name: str) -> Step:
        calls = [a._replace(candidate=name) for a in self.sets]

        def step(i: int) -> Answers:
            with torch.no_grad(), backend("auto"):  # in which alone a candidate has a say
                return _answers(self.op(*calls[i % len(calls)]))

        return step


def _answers(returned: Any) -> Answers:
    maps: tuple[Tensor, ...] = (returned,) if isinstance(returned, Tensor) else returned
    return dict(zip("yz", maps, strict=False))


def _cloned(t: Tensor) -> Tensor:
    return nn.Parameter(t.clone(), False) if isinstance(t, nn.Parameter) else t.clone()


def _inputs(a: Any, batch: int, device: torch.device) -> Any:
    """Return the call of so many images, with values of which the sums are of order one.

    What is no map is a parameter: others are not packed on CPUs.
    """

    def drawn(t: Tensor) -> Tensor:
        is_map = t is a.x or t is a.residual
        shape = (batch, *t.shape[1:]) if is_map else tuple(t.shape)
        scale = 1.0 if is_map or t.dim() == 1 else t[0].numel() ** -0.5
        values = (torch.randn(shape, device=device) * scale).to(t.dtype)
        if t.dim() == 4:
            values = values.contiguous(memory_format=memory_format(t))
        return values if is_map else nn.Parameter(values, requires_grad=False)

    return _each(a, drawn)


# --------------------------------------------------------------------------------------- the output


HEADINGS = ("site", "candidate", "batch", "times", "us", "untuned", "gain", "of floor")


def lines(report: Report) -> Iterator[list[str]]:
    """Yield what was found, a line for every convolution and batch under `HEADINGS`."""
    for comparison in report.comparisons:
        facts, chosen, default = comparison.facts, best(comparison), comparison.best(peer=True)
        where = [str(facts["batch"]), str(facts["count"])]
        if chosen is None or default is None:
            yield [facts["site"], "nothing was timed", *where, "", "", "", ""]
            continue
        floor, ms = comparison.floor_ms(report.ceilings), chosen.median_ms
        times = [f"{1e3 * ms:.1f}", f"{1e3 * default.median_ms:.1f}"]
        gain, share = f"{default.median_ms / ms:.2f}x", f"{floor / ms:.0%}" if floor else ""
        yield [facts["site"], chosen.provider, *where, *times, gain, share]


def totals(report: Report) -> Iterator[str]:
    """Yield, for every batch, what all convolutions take, each as often as the models have it.

    And what those take that pairs consist of, together, and pairs with the 3x3 in front.
    """
    sums: dict[tuple[int, int], list[float]] = {}
    for comparison in report.comparisons:
        pair = (best(comparison), comparison.best(peer=True))
        for i, row in enumerate(pair if None not in pair else ()):
            assert row is not None
            facts = comparison.facts
            of_kind = sums.setdefault((facts["convolutions"], facts["batch"]), [0.0, 0.0])
            of_kind[i] += facts["count"] * row.median_ms
    for (kind, batch), (own, other) in sums.items():
        yield (
            f"Batch {batch}: all {KINDS[kind]} take {own:.3f} ms, untuned {other:.3f} ms, "
            f"{other / own:.2f}x."
        )


def show(report: Report, console: Console) -> None:
    """Print what was chosen for every convolution, and what all of them gain."""
    table = plain_table("the fastest candidate of every convolution", HEADINGS[0])
    for i, heading in enumerate(HEADINGS[1:]):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for line in lines(report):
        table.add_row(*line)
    print_table(console, table, "of floor", "times", "untuned")
    for comparison in report.comparisons:
        for row in comparison.rows:
            if row.detail:
                text = f"{comparison.name}, {row.provider}: {row.status}, {row.detail}"
                console.print(text, markup=False, highlight=False)
    conclude(report, totals(report), console)
