"""Every op's cases, declared once, one module per op; tests, compile gate and bench use them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import (
    batch_norm_act,
    batch_norm_act_pool,
    conv2d_act,
    conv2d_act_pool,
    conv2d_b2b,
    drop_path_add,
    global_avg_pool,
    global_response_norm,
    layer_norm_2d,
    scale_bias_act,
    squeeze_excite,
    squeeze_gate,
)
from ._case import DTYPES, LAYOUTS, SUBJECTS, Case, Draw, Inputs, Subject

SUBJECTS.update(
    {
        "scale_bias_act": scale_bias_act.SUBJECT,
        "batch_norm_act": batch_norm_act.SUBJECT,
        "layer_norm_2d": layer_norm_2d.SUBJECT,
        "global_avg_pool": global_avg_pool.SUBJECT,
        "global_response_norm": global_response_norm.SUBJECT,
        "squeeze_excite": squeeze_excite.SUBJECT,
        "drop_path_add": drop_path_add.SUBJECT,
        "batch_norm_act_pool": batch_norm_act_pool.SUBJECT,
        "conv2d_act": conv2d_act.SUBJECT,
        "conv2d_act_pool": conv2d_act_pool.SUBJECT,
        "conv2d_b2b": conv2d_b2b.SUBJECT,
        "squeeze_gate": squeeze_gate.SUBJECT,
    }
)
OPS = tuple(SUBJECTS)
CASES: tuple[Case, ...] = tuple(case for subject in SUBJECTS.values() for case in subject.declare())

__all__ = [
    "CASES",
    "DTYPES",
    "LAYOUTS",
    "OPS",
    "Case",
    "Draw",
    "Inputs",
    "Subject",
    "cases",
    "example",
]


def cases(tag: str, op: str | None = None) -> list[Case]:
    """Return the cases with `tag`, of one op or of all."""
    return [case for case in CASES if tag in case.tags and op in (None, case.op)]


def example(op: str, **changes: Any) -> Case:
    """Return the first test case of `op`, with `changes`."""
    return replace(cases("test", op)[0], **changes)
