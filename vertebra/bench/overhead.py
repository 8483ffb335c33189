"""What a call costs the host: the time to return from an op, kernels left out.

Every op on a small declared case, three ways: without gradients, with them (the forward pass, graph
included), and in a compiled function; each beside eager PyTorch, called or compiled the same way.
On a GPU nothing waits for the device. Without one Triton is real up to the driver call, and the
tensors are the CPU's: eager pays for its arithmetic then, little on a case this small.

The providers take turns. The table shows medians and, since other processes only ever add to a
time, minima.
"""

from __future__ import annotations

import importlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unittest.mock import patch

import torch
from rich.console import Console

from ..kernels import backend
from ..kernels._op import INTERPRETED
from ..testing.cases import OPS, Case, Inputs, cases
from . import environment
from .report import conclude, plain_table
from .results import Comparison, Report, Row

Mode = Literal["no grad", "grad", "compiled"]
MODES: tuple[Mode, ...] = ("no grad", "grad", "compiled")

_CALLS = 30  # of a sample: few, so that some sample is disturbed by nothing
_WARM_UP = 5  # calls that compile, and record what is replayed


def measure(
    rounds: int, modes: Sequence[Mode] = MODES, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Time every op, or until Ctrl-C those there is time for; `say` is told what comes next."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    with _gpu() as device:
        where = "this GPU" if device.type == "cuda" else "sm_90, up to the driver call"
        settings = {"rounds": rounds, "calls_per_sample": _CALLS, "launches": where}
        report = Report("overhead", environment.describe(device), settings)
        try:
            for op, mode, case in _todo(modes):
                say(f"{op}, {mode}")
                rows = _compare(case, mode, device, rounds)
                facts = {"op": op, "mode": mode, "case": case.id}
                report.comparisons.append(Comparison(f"{op} {mode}", rows, facts=facts))
        except KeyboardInterrupt:
            report.interrupted = True
    return report


def _todo(modes: Sequence[Mode]) -> Iterator[tuple[str, Mode, Case]]:
    for op in OPS:
        case = cases("compile", op)[0]
        for mode in modes:
            if mode != "grad" or case.differentiable:
                yield op, mode, case


def show(report: Report, console: Console) -> None:
    """Print one line per op and mode."""
    table = plain_table(f"us per call; launches: {report.settings['launches']}", "op")
    table.add_column("mode", no_wrap=True)
    for heading in ("eager", "(min)", "vertebra", "(min)", "x eager"):
        table.add_column(heading, justify="right")
    for comparison in report.comparisons:
        eager, ours = (row.samples_ms for row in comparison.rows)
        ratio = statistics.median(b / a for a, b in zip(eager, ours, strict=True))
        cells = [f"{1e3 * of(t):.1f}" for t in (eager, ours) for of in (statistics.median, min)]
        facts = comparison.facts
        table.add_row(facts["op"], facts["mode"], *cells, f"{ratio:.2f}")
    console.print(table)
    conclude(report, (), console)


@contextmanager
def _gpu() -> Generator[torch.device]:
    """Yield the GPU; without one, make Triton compile for sm_90 and let CPU tensors pass."""
    if torch.cuda.is_available():
        yield torch.device("cuda", torch.cuda.current_device())
        return
    if INTERPRETED:
        raise ValueError(
            "TRITON_INTERPRET is set: kernels are then Python functions, which nothing launches; "
            "set TRITON_INTERPRET=0"
        )
    from ..kernels._triton._stand_in import stand_in

    stand_in("sm_90")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dispatch = importlib.import_module("..kernels._op", __package__)
    try:
        with patch.object(dispatch, "INTERPRETED", True):  # lets CPU tensors pass, and no more
            yield torch.device("cpu")
    finally:
        torch.set_num_threads(threads)


def _compare(case: Case, mode: Mode, device: torch.device, rounds: int) -> list[Row]:
    torch.compiler.reset()  # the same code is compiled a few times only, and looks through them all
    providers = {"eager": _provider(case, mode, device, "eager")}
    providers["vertebra"] = _provider(case, mode, device, "triton")
    rows = {name: Row(name, name == "eager", calls_per_sample=_CALLS) for name in providers}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(providers), len(providers)):
            rows[name].samples_ms.append(providers[name]())
    return list(rows.values())


def _provider(
    case: Case, mode: Mode, device: torch.device, path: Literal["eager", "triton"]
) -> Callable[[], float]:
    """Return what times a sample of calls, in milliseconds per call."""
    inputs = case.inputs(device)
    x = inputs["x"]
    assert x is not None
    x.requires_grad_(mode == "grad")
    call = _call(case, inputs)
    timed = torch.compile(call, dynamic=False) if mode == "compiled" else call

    def sample(calls: int = _CALLS) -> float:
        with torch.set_grad_enabled(mode == "grad"), backend(path):
            start = time.perf_counter()
            for _ in range(calls):
                timed()
            elapsed = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or the next sample would wait for room in the queue
        return elapsed * 1e3 / calls

    sample(_WARM_UP)
    return sample


def _call(case: Case, inputs: Inputs) -> Callable[[], object]:
    """Return the op's call that a case makes, free of what it takes the case to make it."""
    module = sys.modules[case.subject.run.__module__]
    name = case.op if hasattr(module, case.op) else "op"  # which takes a candidate's name too
    op: Any = getattr(module, name)
    with patch.object(module, name, wraps=op) as spy:
        case.run(inputs)
    args, kwargs = spy.call_args
    return lambda: op(*args, **kwargs)
