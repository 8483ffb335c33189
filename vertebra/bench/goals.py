"""What the project steers by, beside which results are shown; never weakened to fit them."""

from __future__ import annotations

from typing import NamedTuple

from .results import Comparison, Report


class Goal(NamedTuple):
    """Images per second of one model: what is aimed at, and what would be a triumph."""

    rate: float
    stretch: float


class Goals(NamedTuple):
    """Of one model, inference and a whole training step."""

    inference: Goal
    training: Goal


H200 = {
    "resnet18": Goals(Goal(151e3, 174e3), Goal(37.9e3, 46.6e3)),
    "resnet50": Goals(Goal(48e3, 74e3), Goal(10.2e3, 12.6e3)),
    "resnext50_32x4d": Goals(Goal(44e3, 70e3), Goal(9.0e3, 11.0e3)),
    "regnety_040": Goals(Goal(54e3, 78e3), Goal(10.4e3, 12.8e3)),
    "convnext_tiny": Goals(Goal(44e3, 54e3), Goal(11.5e3, 14.1e3)),
    "convnext_base": Goals(Goal(16e3, 17e3), Goal(4.3e3, 5.3e3)),
}
"""On an H200, in bf16, 224 pixels, 256 images or more per call; `bench roofline` says of what."""

COPY_SHARE = 0.9
"""Of the bandwidth of a copy, for an op that waits for memory."""

SAVED_SHARE = {"resnet50": 0.77, "convnext_tiny": 0.5}
"""Of what eager keeps for the backward pass, in bytes."""


def of(report: Report, comparison: Comparison) -> Goal | None:
    """Return the goal of a comparison of models, if it was made as the goals are."""
    facts = comparison.facts
    if (
        "H200" not in str(report.environment["device"])
        or (facts["dtype"], facts["image_size"]) != ("bf16", 224)
        or facts["batch"] < 256
        or facts["model"] not in H200
    ):
        return None
    goals = H200[facts["model"]]
    return {"forward": goals.inference, "sgd": goals.training}.get(facts["mode"])
