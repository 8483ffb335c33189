"""The judge: is an answer as close to the fp64 truth as eager PyTorch is in the same dtype?

    |actual - truth| / |truth| <= 2 * (error of eager + rounding)                Euclidean norms

The budget of `vertebra.testing.budget`, made for the gradients of a whole network. There one ReLU
that falls on the other side of 0 moves all gradients before it, and two correct runs differ, tensor
by tensor, by more than a factor of 2. Hence errors are norms, answers are judged in groups (a name
is `group` or `group:tensor`) by their worst tensor, and eager may run several times. The rounding
is one of the activations: torch.compile, for one, rounds statistics to their type. Or, where an
answer is known to add up `terms` values, that many of its own type, which add up like their square
root.

A gradient may be a sum that cancels, of which half precision leaves little: eager's own is then off
by half. Such a tensor is *noisy*. It has a budget of its own, by which a zero might pass, and none
of the others gets it: they are judged without it. There may be few of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Answers = dict[str, Tensor]

_NEGLIGIBLE = 1e-2
_NOISY = 0.25  # eager's error, past which the budget is no test
_MOST_NOISY = 0.1  # of the tensors of a group


@dataclass(frozen=True)
class Verdict:
    """What the judge found: the worst error of each group, and what is wrong, if anything."""

    errors: dict[str, float]
    allowed: dict[str, float]
    wrong: str
    top1: float | None


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
        self._budgets: dict[str, float] = {}
        self._noisy: set[str] = set()

    @property
    def noisy(self) -> list[str]:
        """The tensors that eager PyTorch itself gets too wrong to tell whether another is right."""
        return sorted(self._noisy)

    def calibrate(self, eager: Answers) -> None:
        """Widen the budgets to what this run of eager PyTorch needs.

        Raises:
            ValueError: too many tensors are noisy.
        """
        for name, error in self._errors(eager).items():
            own = torch.finfo(eager[name].dtype).eps
            rounding = max(self._eps, own * math.sqrt(self._terms.get(_group(name), 1)))
            self._budgets[name] = max(self._budgets.get(name, 0.0), 2 * (error + rounding))
            if not error < _NOISY:
                self._noisy.add(name)
        for group, names in self._groups().items():
            noisy = self._noisy.intersection(names)
            if len(noisy) > _MOST_NOISY * len(names) or math.inf in map(self._budgets.get, noisy):
                worst = max(noisy, key=lambda name: self._budgets[name])
                raise ValueError(
                    f"eager is no yardstick: {len(noisy)} of {len(names)} {group} are off, "
                    f"{worst} by {self._budgets[worst] / 2:.1e}"
                )

    def judge(self, answers: Answers) -> Verdict:
        """Return the errors of `answers`, and whether the budgets allow them."""
        if answers.keys() != self._truth.keys():
            odd = sorted(answers.keys() ^ self._truth.keys())
            return Verdict({}, {}, f"missing or unexpected: {', '.join(odd[:3])}", None)
        found = self._errors(answers)
        errors: dict[str, float] = {}
        allowed: dict[str, float] = {}
        wrong: list[str] = []
        for group, names in self._groups().items():
            judged = [name for name in names if name not in self._noisy]
            allowed[group] = max(self._budgets[name] for name in judged)
            worst = max(judged, key=lambda name: found[name])
            errors[group] = found[worst]
            limits = [(worst, allowed[group])]
            limits += [(name, self._budgets[name]) for name in names if name in self._noisy]
            wrong += [
                f"{name}: error {found[name]:.1e}, allowed {limit:.1e}"
                for name, limit in limits
                if not found[name] <= limit
            ]
        return Verdict(errors, allowed, "; ".join(wrong), self._top1(answers))

    def _errors(self, answers: Answers) -> dict[str, float]:
        return {
            name: _distance(answers[name], truth) / self._scales[name]
            for name, truth in self._truth.items()
        }

    def _groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in self._truth:
            groups.setdefault(_group(name), []).append(name)
        return groups

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
