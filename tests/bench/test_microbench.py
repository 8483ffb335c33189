"""The ops as microbenchmarks of pytest-benchmark; `make microbench` measures.

Without `--benchmark-only` this is a test of tiny cases, of answers and not of speed. With it the
cases are those of `vertebra bench kernels`; no answer that is wrong is timed.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from vertebra.bench import kernels
from vertebra.bench.kernels import Direction, Problem
from vertebra.bench.results import Row
from vertebra.bench.runner import Unavailable, first_answer
from vertebra.bench.settings import Settings
from vertebra.testing.cases import Case

plugin = pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

PLAIN = ("eager", "vertebra")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give the test its cases and providers, of real sizes where speed is measured."""
    measured = metafunc.config.getoption("benchmark_only", default=False)
    settings = Settings.choose(tiny=not measured, own_batches=True)
    settings = replace(settings, compiled=measured and settings.on_gpu)
    if not measured:
        settings = replace(settings, layouts=("nhwc",))
    found = [
        (case, direction, provider)
        for case in kernels.bench_cases((), settings)
        for direction in kernels.directions(case)
        # the peers' modules have tests of their own
        for provider in (kernels.suitable(case.op, settings) if measured else PLAIN)
    ]
    ids = ["-".join((case.id, *others)) for case, *others in found]
    metafunc.parametrize(("case", "direction", "provider"), found, ids=ids)


@lru_cache(maxsize=1)
def problem_of(case: Case) -> Problem:
    return Problem.create(case, DEVICE)


def host_clock() -> float:
    """Return the time when the GPU, too, has done what it was told."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=host_clock)
def test_op(benchmark, request, case: Case, direction: Direction, provider: str) -> None:
    measured = request.config.getoption("benchmark_only")
    problem, row = problem_of(case), Row(provider, peer=True)
    clock, given = problem.clock(DEVICE), problem.provider(provider, direction)
    with clock.stream():
        try:
            step = first_answer(given, row, problem.oracle(direction), DEVICE)
        except Unavailable as error:
            pytest.skip(str(error))
        assert row.status == "ok", row.detail
        benchmark.group = f"{case.id} {direction}"
        benchmark.extra_info |= {
            "op": case.op,
            "provider": provider,
            "path": problem.call.path,
            "bytes": problem.bytes(direction),
            "errors": row.errors,
        }
        calls = itertools.count()
        benchmark.pedantic(
            lambda: step(next(calls)),
            rounds=20 if measured else 1,
            iterations=clock.timer(step).calls if measured else 1,
            warmup_rounds=int(measured),
        )
