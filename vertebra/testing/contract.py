"""The contract every op keeps on every case: one check, for the tests and before any timing."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from ..kernels import backend
from .budget import assert_within_budget
from .cases import Case, Inputs

_KINKS = {"relu": (0.0,), "hardswish": (-3.0, 3.0)}


def check(case: Case, device: torch.device | str) -> None:
    """Raise AssertionError unless the op's Triton path keeps its contract on `case`.

    Outputs, updated statistics and every gradient are within the error budget of eager fp64;
    outputs have x's memory format; inputs are untouched; a second run gives the same bits; all of
    it with fresh memory filled with NaN and PyTorch's deterministic mode on.
    """
    inputs = settled(case, case.inputs(device))
    truth = evaluate(case, upcast(inputs), "eager")
    eager = evaluate(case, copied(inputs), "eager")
    with strict_memory():
        mine, again = copied(inputs), copied(inputs)
        actual = evaluate(case, mine, "triton")
        repeated = evaluate(case, again, "triton")

    for name, value in actual.items():
        terms = case.subject.terms(case, name, value)
        assert_within_budget(name, value, eager[name], truth[name], terms)
        if not same_bits(value, repeated[name]):
            raise AssertionError(f"{name}: a second run gave other bits")
    x = inputs["x"]
    assert x is not None
    for name in {"y", "dx"} & actual.keys():
        wanted = _strides_like(x, actual[name].shape)
        if actual[name].stride() != wanted:
            raise AssertionError(f"{name}: strides {actual[name].stride()}, not {wanted}")
    for name, value in inputs.items():
        after = mine[name]
        if value is None or after is None or name in case.subject.updated:
            continue
        if not same_bits(value, after):
            raise AssertionError(f"{name}: the input was changed")


def evaluate(
    case: Case,
    inputs: Inputs,
    path: str,
    call: Callable[[Inputs], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Run `case`, or `call` in its place, both ways; return outputs, new statistics, gradients."""
    leaves = leaves_of(case, inputs)
    with backend(path):  # pyright: ignore[reportArgumentType]
        results = (call or case.run)({**inputs, **leaves})
        if leaves:
            gradients = torch.autograd.grad(results["y"], list(leaves.values()), inputs["dy"])
            results |= {"d" + name: g for name, g in zip(leaves, gradients, strict=True)}
    return {k: v.detach() for k, v in results.items()}


def leaves_of(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Return the inputs that want a gradient, detached, as leaves of a new graph."""
    leaves = {k: inputs[k] for k in case.differentiable}
    return {k: v.detach().requires_grad_() for k, v in leaves.items() if v is not None}


def settled(case: Case, inputs: Inputs) -> Inputs:
    """Return `inputs`, dy with zeros where z is within rounding of a kink of the activation.

    There the derivative is one of two values, and which one is not part of the contract. An op may
    have such places of its own, which its `Subject.settle` knows.
    """
    if not case.subject.differentiable:
        return inputs
    if case.subject.settle is not None:
        return {**inputs, "dy": case.subject.settle(case, inputs)}
    if case.act not in _KINKS:
        return inputs
    with backend("eager"):
        z = replace(case, act="none").run(upcast(inputs))["y"]
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in _KINKS[case.act]:
        near |= (z - kink).abs() < 1e-5 * z.abs().max()
    dy = inputs["dy"]
    assert dy is not None
    return {**inputs, "dy": torch.where(near, 0, dy)}


def copied(inputs: Inputs) -> Inputs:
    """Return a copy of `inputs` that keeps values and strides, gaps of a sliced tensor included."""
    return {k: None if v is None else _clone(v) for k, v in inputs.items()}


def upcast(inputs: Inputs) -> Inputs:
    """Return `inputs` in fp64."""
    return {k: None if v is None else v.double() for k, v in inputs.items()}


def _clone(t: Tensor) -> Tensor:
    storage = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage().clone())
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, NaN equal to NaN."""
    return bool(torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)))


def _strides_like(x: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Return the strides of a fresh tensor of `shape` with x's memory format."""
    like = torch.empty_like(x)
    if shape == x.shape:
        return like.stride()
    channels_last = len(shape) == 4 and like.is_contiguous(memory_format=torch.channels_last)
    dense = channels_last and not like.is_contiguous()  # else x is both, and NCHW the plain name
    layout = torch.channels_last if dense else torch.contiguous_format
    return torch.empty(shape, device="meta", memory_format=layout).stride()


@contextmanager
def strict_memory() -> Generator[None]:
    """Fill fresh memory with NaN, and refuse operations that are not deterministic."""
    flags: Any = deterministic
    outer = torch.are_deterministic_algorithms_enabled(), flags.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    flags.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(outer[0])
        flags.fill_uninitialized_memory = outer[1]
