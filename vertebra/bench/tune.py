"""`vertebra tune`: measure the candidates for every convolution of a fused model, keep the fastest.

The model runs once, to see which convolutions it has; equal ones are measured once. Every candidate
is checked against fp64 before it is timed, in turns with the others, on inputs that rotate through
memory, in CUDA graphs. What is not told apart from the choice without a table keeps that choice.
Each result is in the user's table as soon as it is found (`vertebra.kernels._choices`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from ..interop import fuse
from ..kernels import _choices, backend
from ..kernels._conv2d import Arguments, memory_format, site
from ..kernels._op import observe
from ..kernels.conv2d_act import candidates, op
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


class Place(NamedTuple):
    """A convolution, its tensors without memory, and how often the models have it."""

    arguments: Arguments
    count: int

    @property
    def site(self) -> str:
        """What tables call it."""
        return site(self.arguments)


def table_of(device: torch.device) -> Path:
    """Return the path of the table that is written."""
    return _choices.file_of(_choices.user_folder(), op.name, _choices.device_name(device))


# ------------------------------------------------------------------------------- what is measured


def convolutions(model: nn.Module, x: Tensor) -> list[Place]:
    """Return the convolutions that `model(x)` runs as `conv2d_act`, each site once."""
    found: list[Arguments] = []
    # in which no convolution runs as part of another op, as a table may have it
    plain = backend("eager")
    with (
        plain,
        torch.no_grad(),
        observe(lambda c: found.append(_shapes(c.args)) if c.op is op else None),
    ):
        model(x)
    counts = Counter(map(site, found))
    first = {site(a): a for a in reversed(found)}
    return [Place(first[name], n) for name, n in counts.items()]


def _shapes(args: Iterable[Any]) -> Arguments:
    return _each(Arguments(*args), lambda t: t.to("meta"))


def _each(a: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """Return a call with every tensor of it changed."""
    fields = a._asdict().items()
    return a._replace(**{name: change(v) for name, v in fields if isinstance(v, Tensor)})


def places(names: Sequence[str], settings: Settings) -> list[Place]:
    """Return the convolutions of some models after `fuse`, on an image of the size that is set.

    Raises:
        ValueError: there is no such model; on a CPU, where there is nothing to choose from.
    """
    if not settings.on_gpu and not settings.tiny:
        raise ValueError(
            "tune chooses between kernels of a GPU, and torch finds none here; on a CPU "
            "convolutions are oneDNN's. Only --tiny, which writes no table, runs there"
        )
    check(names)
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    found: dict[str, Place] = {}
    for name in names:
        model = fuse(create_model(name).to(device, dtype).eval())
        x = torch.randn(1, 3, *[settings.image_size] * 2, device=device, dtype=dtype)
        for place in convolutions(model, x):
            before = found[place.site].count if place.site in found else 0
            found[place.site] = place._replace(count=before + place.count)
    chosen = [place for name, place in found.items() if settings.match in name]
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
    problem = Problem.create(place.arguments, batch, device)
    a = problem.sets[0]
    names = candidates(*a)[: 3 if settings.tiny else None]
    comparison = Comparison(
        _title(place, batch),
        [],
        {"bytes": float(op.traffic(*a).forward), "flops": _flops(a)},
        {
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
        _choices.write(op.name, _choices.device_name(device), chosen, versions)


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

    sets: list[Arguments]

    @classmethod
    def create(cls, a: Arguments, batch: int, device: torch.device) -> Problem:
        """Draw the inputs."""
        first = _inputs(a, batch, device)
        size = sum(value.nbytes for value in first if isinstance(value, Tensor))
        copies = cache_copies(size, device)
        return cls([first, *(_each(first, Tensor.clone) for _ in range(copies - 1))])

    def oracle(self) -> Oracle:
        """Return the judge of y."""
        a = self.sets[0]
        exact = _each(a, Tensor.double)
        oracle = Oracle({"y": op.eager(*exact)}, a.x.dtype, {"y": a.weight[0].numel()})
        oracle.calibrate({"y": op.eager(*a)})
        return oracle

    def provider(self, name: str, peer: bool) -> Provider:
        """Return the candidate of that name."""
        return Provider(name, peer, partial(self._make, name), capturable=True)

    def _make(self, name: str) -> Step:
        calls = [a._replace(candidate=name) for a in self.sets]

        def step(i: int) -> Answers:
            with torch.no_grad(), backend("auto"):  # in which alone a candidate has a say
                return {"y": op(*calls[i % len(calls)])}

        return step


def _inputs(a: Arguments, batch: int, device: torch.device) -> Arguments:
    """Return the call of so many images, with values of which the sums are of order one."""

    def drawn(t: Tensor | None, images: int | None = None, scale: float = 1.0) -> Any:
        if t is None:
            return None
        shape = (images or t.shape[0], *t.shape[1:])
        values = (torch.randn(shape, device=device) * scale).to(t.dtype)
        return values.contiguous(memory_format=memory_format(t)) if t.dim() == 4 else values

    return a._replace(
        x=drawn(a.x, batch),
        weight=drawn(a.weight, scale=a.weight[0].numel() ** -0.5),
        scale=drawn(a.scale),
        bias=drawn(a.bias),
        residual=drawn(a.residual, batch),
    )


def _flops(a: Arguments) -> float:
    N, K, P, Q = a.shape
    return 2.0 * N * K * P * Q * a.weight[0].numel()


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
    """Yield, for every batch, what all convolutions take, each as often as the models have it."""
    sums: dict[int, list[float]] = {}
    for comparison in report.comparisons:
        pair = (best(comparison), comparison.best(peer=True))
        for i, row in enumerate(pair if None not in pair else ()):
            assert row is not None
            sums.setdefault(comparison.facts["batch"], [0.0, 0.0])[i] += (
                comparison.facts["count"] * row.median_ms
            )
    for batch, (own, other) in sums.items():
        yield (
            f"Batch {batch}: all of these take {own:.3f} ms, untuned {other:.3f} ms, "
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
