"""What a call costs the host: what is timed is the call that a case makes, and nothing else."""

import pytest
import torch

from vertebra.bench.overhead import _call
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
