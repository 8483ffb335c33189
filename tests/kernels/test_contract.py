"""Every op, over every declared case, against eager PyTorch in double precision."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from vertebra.kernels import backend, scale_bias_act
from vertebra.kernels._act import ACTIVATIONS
from vertebra.testing.cases import Case, cases
from vertebra.testing.contract import check, copied, evaluate, leaves_of, same_bits, upcast


def parametrize(tag: str) -> Callable[[Any], Any]:
    """Every case with `tag`; of the slow finite differences, `make test` takes one an op."""
    found = [case for case in cases(tag) if not _is_left_to_others(case)]
    first = {case.op: case for case in reversed(found)}
    thorough = {c for c in found if "thorough" in c.tags or (tag == "double" and c != first[c.op])}
    marked = [
        pytest.param(c, id=c.id, marks=pytest.mark.thorough if c in thorough else ()) for c in found
    ]
    return pytest.mark.parametrize("case", marked)


def _is_left_to_others(case: Case) -> bool:
    """Return whether it is only measured: no kernel convolves maps whose channels lie apart."""
    return "bench" in case.tags and case.op.startswith("conv2d") and case.layout == "nchw"


@parametrize("test")
def test_contract(case: Case, device: torch.device) -> None:
    check(case, device)


@pytest.mark.gpu
@pytest.mark.xdist_group("large")  # one at a time: the truth in fp64 takes tens of GB
@pytest.mark.skipif(not torch.cuda.is_available(), reason="sizes of a real batch need a GPU")
@parametrize("bench")
def test_contract_at_full_size(case: Case, device: torch.device) -> None:
    check(case, device)


@parametrize("compile")
def test_registered_ops(case: Case, device: torch.device) -> None:
    """Schema, fake kernel and dispatch of every registered op that a call takes, by opcheck."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "vertebra":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    inputs = case.inputs(device)
    with Recorder():
        evaluate(case, inputs, "triton")
    passes = [case.op, f"{case.op}_backward"] if case.differentiable else [case.op]
    assert [op._opname for op, _ in calls] == passes
    for op, args in calls:  # autograd is outside of them
        torch.library.opcheck(op, [a.detach() if isinstance(a, torch.Tensor) else a for a in args])


def compilations() -> list[Any]:
    """Every case to compile, for its shape alone and for any.

    Thorough is the first of a case that is not in NCHW: it has a twin there, and the second.
    """
    both = [(case, dynamic) for case in cases("compile") for dynamic in (False, True)]
    return [
        pytest.param(
            *(case, dynamic),
            id=f"{case.id}-{'dynamic' if dynamic else 'static'}",
            marks=pytest.mark.thorough
            if "thorough" in case.tags or not (dynamic or case.layout == "nchw")
            else (),
        )
        for case, dynamic in both
    ]


@pytest.mark.parametrize(("case", "dynamic"), compilations())
def test_compiled(case: Case, dynamic: bool, device: torch.device) -> None:
    """One graph, the same bits as without compilation, and no second graph for a second size."""
    torch._dynamo.reset()
    compiled = torch.compile(case.run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    counters.clear()
    for shape in (case.shape, (3, case.shape[1], 4, 5))[: 1 + dynamic]:
        inputs = replace(case, shape=shape).inputs(device)
        plain = evaluate(case, copied(inputs), "triton")
        found = evaluate(case, copied(inputs), "triton", compiled)
        assert plain.keys() == found.keys()
        for name in plain:
            assert same_bits(plain[name], found[name]), name
    assert counters["stats"]["unique_graphs"] == 1


@parametrize("double")
def test_double_precision_gradients(case: Case, device: torch.device) -> None:
    """The kernels' gradients are those of the kernels' own outputs, by finite differences."""
    inputs = upcast(case.inputs(device))
    leaves = leaves_of(case, inputs)

    def run(*values: torch.Tensor) -> torch.Tensor:
        return case.run({**copied(inputs), **dict(zip(leaves, values, strict=True))})["y"]

    with backend("triton"):
        assert torch.autograd.gradcheck(run, [*leaves.values()], atol=1e-6, fast_mode=False)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_and_infinity_pass_as_in_eager(act: str, device: torch.device) -> None:
    """A NaN comes out where it went in, and nowhere else."""
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 2.0], device=device)
    x = x.repeat(4).reshape(2, 2, 3, 2)
    expected = ACTIVATIONS[act](x.double()).float()  # in fp32 eager GELU is NaN at infinity
    with backend("triton"), np.errstate(all="ignore"):  # the interpreter computes with numpy
        torch.testing.assert_close(scale_bias_act(x, None, None, act=act), expected, equal_nan=True)
