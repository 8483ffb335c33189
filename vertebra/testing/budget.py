"""The error budget: how far from the fp64 truth an answer may be, with no tolerance typed by hand.

    |actual - truth| <= 2 * (|eager - truth| + sqrt(terms) * eps * max|truth|)        maximum norm

`eager` is the same computation by plain PyTorch in the same dtype: a kernel may be wrong twice as
much as that, and by two roundings of the largest value. eps is that of the answer's dtype. An
answer that adds up `terms` values has had that many roundings, which add up like their square root
(Higham & Mary 2019, doi:10.1137/18M1226312); eager PyTorch adds in double precision on the CPU and
so does not show them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def error(actual: Tensor, truth: Tensor) -> float:
    """Return max |actual - truth| in fp64; infinite where one is NaN and the other is not."""
    actual, truth = actual.detach().double(), truth.detach().double()
    difference = torch.where(actual == truth, 0.0, (actual - truth).abs())
    difference = torch.where(actual.isnan() & truth.isnan(), 0.0, difference)
    return difference.nan_to_num(nan=float("inf")).max().item() if difference.numel() else 0.0


def allowance(eager: Tensor, truth: Tensor, terms: int = 1) -> float:
    """Return the budget for an answer of eager's dtype that adds up `terms` values."""
    largest = truth.detach().nan_to_num(0, 0, 0).abs().max().item() if truth.numel() else 0.0
    rounding = math.sqrt(terms) * torch.finfo(eager.dtype).eps
    return 2 * (error(eager, truth) + rounding * largest)


def assert_within_budget(
    name: str, actual: Tensor, eager: Tensor, truth: Tensor, terms: int = 1
) -> None:
    """Raise AssertionError, with the numbers, unless `actual` is what the budget allows."""
    if (actual.shape, actual.dtype) != (truth.shape, eager.dtype):
        raise AssertionError(
            f"{name}: {actual.dtype} {tuple(actual.shape)}, not {eager.dtype} {tuple(truth.shape)}"
        )
    found, budget = error(actual, truth), allowance(eager, truth, terms)
    if not found <= budget:
        raise AssertionError(
            f"{name}: error {found:.3e} exceeds the budget {budget:.3e} "
            f"(eager's own error {error(eager, truth):.3e}, {eager.dtype})"
        )
