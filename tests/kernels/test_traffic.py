"""`Op.traffic` against what the launches can touch: every map that a launch is given, once."""

import pytest
import torch

from vertebra.kernels import _op
from vertebra.kernels._triton._launch import captured
from vertebra.testing.cases import Case, cases, example
from vertebra.testing.traffic import declared_and_launched, eager, launched

BN, RESIDUAL = ("affine", "stats"), ("affine", "stats", "residual")
SHAPE = (2, 8, 5, 6)
STATISTICS = 2 / SHAPE[1]  # mean and rstd of every pixel, in maps


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in cases("traffic")])
def test_traffic_is_what_the_launches_touch(case: Case) -> None:
    declared, found = declared_and_launched(case)
    assert declared == found


@pytest.mark.parametrize(
    ("op", "act", "options", "forward", "backward"),
    [  # the tables of docs/kernels, in maps: ours, eager's
        ("scale_bias_act", "relu", (*BN, "frozen"), (2, 4), (3, 5)),
        ("scale_bias_act", "relu", (*RESIDUAL, "frozen"), (3, 7), (4, 5)),
        ("scale_bias_act", "relu", BN, (2, 4), (3, 6)),
        ("scale_bias_act", "relu", RESIDUAL, (3, 7), (5, 6)),
        ("batch_norm_act", "relu", BN, (3, 5), (5, 8)),
        ("batch_norm_act", "relu", RESIDUAL, (4, 8), (7, 8)),
        (
            "layer_norm_2d",
            "none",
            ("affine",),
            (2 + STATISTICS, 4 + STATISTICS),
            (3 + STATISTICS,) * 2,
        ),
    ],
    ids=str,
)
def test_traffic_in_the_documentation(op, act, options, forward, backward) -> None:
    case = example(op, shape=SHAPE, layout="nchw", act=act, options=options)
    one = torch.empty(SHAPE, dtype=case.dtype).nbytes
    found = zip(declared_and_launched(case)[1], eager(case), strict=True)
    assert [(ours / one, theirs / one) for ours, theirs in found] == [forward, backward]


def test_layer_norm_writes_no_statistics_without_a_gradient(device) -> None:
    case = example("layer_norm_2d")
    inputs = case.inputs(device)
    declared: list[int] = []
    observer = _op.observe(lambda call: declared.append(call.op.traffic(*call.args).forward))
    with observer, captured() as launches:
        case.run(inputs)
    assert declared == [launched(launches)] == [2 * inputs["x"].nbytes]
