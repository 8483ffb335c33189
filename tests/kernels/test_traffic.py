"""`Op.traffic` against what the launches can touch: every map that a launch is given, once."""

import pytest
import torch

from vertebra.testing.cases import Case, cases, example
from vertebra.testing.traffic import declared_and_launched, eager

BN, RESIDUAL = ("affine", "stats"), ("affine", "stats", "residual")


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in cases("traffic")])
def test_traffic_is_what_the_launches_touch(case: Case) -> None:
    declared, found = declared_and_launched(case)
    assert declared == found


@pytest.mark.parametrize(
    ("op", "options", "forward", "backward"),
    [  # the tables of docs/kernels, in maps: ours, eager's
        ("scale_bias_act", (*BN, "frozen"), (2, 4), (3, 5)),
        ("scale_bias_act", (*RESIDUAL, "frozen"), (3, 7), (4, 5)),
        ("scale_bias_act", BN, (2, 4), (3, 6)),
        ("scale_bias_act", RESIDUAL, (3, 7), (5, 6)),
        ("batch_norm_act", BN, (3, 5), (5, 8)),
        ("batch_norm_act", RESIDUAL, (4, 8), (7, 8)),
    ],
)
def test_traffic_in_the_documentation(op, options, forward, backward) -> None:
    case = example(op, shape=(2, 8, 5, 6), dtype=torch.bfloat16, act="relu", options=options)
    one = 2 * 8 * 5 * 6 * 2
    found = zip(declared_and_launched(case)[1], eager(case), strict=True)
    assert [(ours / one, theirs / one) for ours, theirs in found] == [forward, backward]
