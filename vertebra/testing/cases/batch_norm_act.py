"""The cases of `batch_norm_act`, whose running statistics are the inputs mean and var."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...kernels import batch_norm_act
from . import _affine
from ._case import Case, Inputs, Subject


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x, weight, bias, residual, mean, var, _ = inputs.values()
    assert x is not None
    y = batch_norm_act(
        *(x, weight, bias, residual, case.act),
        running_mean=mean,
        running_var=var,
        momentum=0.3,
    )
    if mean is None or var is None:
        return {"y": y}
    return {"y": y, "running_mean": mean, "running_var": var}


SUBJECT = Subject(
    _affine.draw,
    _run,
    partial(_affine.declare, "batch_norm_act"),
    _affine.DIFFERENTIABLE,
    _affine.PARAMETERS,
    updated=("mean", "var"),
)
