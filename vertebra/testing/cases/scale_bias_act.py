"""The cases of `scale_bias_act`."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ...kernels import scale_bias_act
from . import _affine
from ._case import Case, Inputs, Subject


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x, scale, bias, residual, mean, var, _ = inputs.values()
    assert x is not None
    return {"y": scale_bias_act(x, scale, bias, residual, case.act, mean=mean, var=var)}


SUBJECT = Subject(
    _affine.draw,
    _run,
    partial(_affine.declare, "scale_bias_act"),
    _affine.DIFFERENTIABLE,
    _affine.PARAMETERS,
)
