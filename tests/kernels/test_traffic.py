"""`Op.traffic` against what the launches can touch: every map that a launch is given, once."""

import pytest
import torch

from vertebra.kernels import _op
from vertebra.kernels._triton._launch import captured
from vertebra.testing.cases import Case, cases, example
from vertebra.testing.traffic import declared_and_launched, eager, launched

BN, RESIDUAL = ("affine", "stats"), ("affine", "stats", "residual")
SHAPE = (2, 8, 4, 6)
OF_BF16 = ("batch_norm_act_pool",)  # its table is: indices have a size of their own
ROWS = 2 / SHAPE[1]  # mean and rstd of every pixel, in maps


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
        ("batch_norm_act_pool", "relu", BN, (2.625, 7.25), (2.875, 10.25)),
        ("batch_norm_act_pool", "relu", (*BN, "eval", "frozen"), (1.375, 6.25), (2.375, 7.25)),
        ("layer_norm_2d", "none", ("affine",), (2 + ROWS, 4 + ROWS), (3 + ROWS, 3 + ROWS)),
        ("squeeze_excite", "relu", ("bias",), (3, 5), (5, 13)),
        ("squeeze_excite", "relu", ("bias", "residual"), (4, 8), (6, 13)),
        ("squeeze_excite", "relu", ("bias", "residual", "shares", "inference"), (3, 7), (0, 0)),
        ("squeeze_excite", "none", ("bias",), (3, 3), (4, 10)),
        ("squeeze_excite", "none", ("bias", "residual"), (4, 6), (4, 10)),
        ("drop_path_add", "none", ("drop", "frozen"), (2, 4), (2, 4)),
        ("drop_path_add", "none", ("residual", "drop", "frozen"), (3, 7), (2, 4)),
        ("drop_path_add", "none", ("residual", "gamma", "drop", "frozen"), (3, 9), (2, 6)),
        ("drop_path_add", "none", ("residual", "gamma", "drop"), (3, 9), (3, 10)),
        ("global_response_norm", "none", (), (3, 8), (5, 27)),
        ("global_avg_pool", "none", ("frozen",), (1, 1), (1, 1)),
        ("global_avg_pool", "none", ("norm", "affine"), (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_traffic_in_the_documentation(op, act, options, forward, backward) -> None:
    dtype = torch.bfloat16 if op in OF_BF16 else torch.float32
    case = example(op, shape=SHAPE, dtype=dtype, layout="nchw", act=act, options=options)
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
