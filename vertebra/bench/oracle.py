"""The judge: is an answer as close to the fp64 truth as eager PyTorch is in the same dtype?

    |actual - truth| / |truth| <= 2 * (error of eager + rounding)                Euclidean norms

The budget of `vertebra.testing.budget`, made for the gradients of a whole network. There one ReLU
that falls on the other side of 0 moves all gradients before it, and two correct runs differ, tensor
by tensor, by more than a factor of 2. Hence errors are norms, answers are judged in groups (a name
is `group` or `group:tensor`) by their worst tensor, and eager may run several times. The rounding
is one of the activations: torch.compile, for one, rounds statistics to their type. Or, where an
answer is known to add up `terms` values, that many of its own type, which add up like their square
root.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Answers = dict[str, Tensor]

_NEGLIGIBLE = 1e-2


@dataclass(frozen=True)
class Verdict:
    """What the judge found: the worst error of each group, and what is wrong, if anything."""

    errors: dict[str, float]
    allowed: dict[str, float]
    wrong: str
    top1: float | None


class _Worst(NamedTuple):
    error: float
    tensor: str


class Oracle:
    """Judges answers against `truth` (fp64), after `calibrate` has seen eager PyTorch's own.

    Args:
        truth: the answers in fp64, on any device.
        dtype: of the activations.
        terms: by group, how many values the answers of it add up.
    """

    def __init__(
        self, truth: Answers, dtype: torch.dtype, terms: Mapping[str, int] | None = None
    ) -> None:
        self._truth = truth
        self._terms = terms or {}
        self._eps = torch.finfo(dtype).eps
        self._scales = _scales(truth)
        self._allowed: dict[str, float] = {}

    def calibrate(self, eager: Answers) -> None:
        """Widen the budget to what this run of eager PyTorch needs."""
        for group, worst in self._worst(eager).items():
            if not worst.error < 0.45:  # its double would allow a zero in place of the answer
                raise ValueError(
                    f"eager is no yardstick: {worst.tensor} has error {worst.error:.1e}"
                )
            own = torch.finfo(eager[worst.tensor].dtype).eps
            rounding = max(self._eps, own * math.sqrt(self._terms.get(group, 1)))
            budget = 2 * (worst.error + rounding)
            self._allowed[group] = max(self._allowed.get(group, 0.0), budget)

    def judge(self, answers: Answers) -> Verdict:
        """Return the errors of `answers`, and whether the budget allows them."""
        if answers.keys() != self._truth.keys():
            odd = sorted(answers.keys() ^ self._truth.keys())
            return Verdict({}, {}, f"missing or unexpected: {', '.join(odd[:3])}", None)
        worst = self._worst(answers)
        wrong = [
            f"{found.tensor}: error {found.error:.1e}, allowed {self._allowed[group]:.1e}"
            for group, found in worst.items()
            if not found.error <= self._allowed[group]
        ]
        errors = {group: found.error for group, found in worst.items()}
        return Verdict(errors, dict(self._allowed), "; ".join(wrong), self._top1(answers))

    def _worst(self, answers: Answers) -> dict[str, _Worst]:
        worst: dict[str, _Worst] = {}
        for name, truth in self._truth.items():
            found = _Worst(_distance(answers[name], truth) / self._scales[name], name)
            worst[_group(name)] = max(worst.get(_group(name), found), found)
        return worst

    def _top1(self, answers: Answers) -> float | None:
        if "logits" not in answers:
            return None
        truth = self._truth["logits"].argmax(1)
        return (answers["logits"].argmax(1).to(truth.device) == truth).double().mean().item()


def _group(name: str) -> str:
    return name.partition(":")[0]


def _distance(actual: Tensor, truth: Tensor) -> float:
    if actual.shape != truth.shape:
        return math.inf
    distance = (actual.detach().to(truth.device, torch.float64) - truth).norm().item()
    return math.inf if math.isnan(distance) else distance


def _scales(truth: Answers) -> dict[str, float]:
    """Return what errors are relative to: a tensor's norm, but never one negligible in its group.

    A gradient may be exactly 0 (of a bias that the next batch norm removes, say), and then what is
    computed is rounding alone.
    """
    squares: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for name, value in truth.items():
        group = _group(name)
        squares[group] = squares.get(group, 0.0) + value.square().sum().item()
        sizes[group] = sizes.get(group, 0) + value.numel()
    return {
        name: value.norm().item()
        + _NEGLIGIBLE * math.sqrt(squares[_group(name)] * value.numel() / sizes[_group(name)])
        + torch.finfo(torch.float64).tiny
        for name, value in truth.items()
    }
