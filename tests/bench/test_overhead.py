"""What a call costs the host: what is timed is the call that a case makes, and nothing else."""

from contextlib import nullcontext

import pytest
import torch

from vertebra.bench import overhead
from vertebra.bench.overhead import _call
from vertebra.bench.results import Row
from vertebra.kernels._op import observe
from vertebra.testing.cases import OPS, cases
from vertebra.testing.contract import copied


@pytest.mark.parametrize("op", OPS)
def test_the_timed_call_is_the_cases(op: str, monkeypatch) -> None:
    (case, *_) = cases("compile", op)
    inputs = case.inputs("cpu")
    expected = case.run(copied(inputs))["y"]
    call = _call(case, inputs)
    monkeypatch.setattr(type(case), "run", None)
    seen: list[str] = []
    with observe(lambda made: seen.append(made.op.name)):
        found = call()
        found = found[0] if isinstance(found, tuple) else found
        assert torch.equal(found, expected)
    assert seen == [op]


def test_ctrl_c_keeps_what_there_is(monkeypatch) -> None:
    rows = [Row("eager", True, samples_ms=[1.0]), Row("vertebra", False, samples_ms=[1.0])]
    outcomes = iter([rows, KeyboardInterrupt()])

    def compare(*_: object) -> list[Row]:
        outcome = next(outcomes)
        if isinstance(outcome, KeyboardInterrupt):
            raise outcome
        return outcome

    monkeypatch.setattr(overhead, "_gpu", lambda: nullcontext(torch.device("cpu")))
    monkeypatch.setattr(overhead, "_compare", compare)
    report = overhead.measure(1)
    assert report.interrupted
    assert [comparison.rows for comparison in report.comparisons] == [rows]
