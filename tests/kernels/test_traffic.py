"""`Op.traffic` against what the launches can touch: every map that a launch is given, once.

A launch that is given one map as two arguments finds it in the cache the second time.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vertebra.kernels import Traffic, _op
from vertebra.kernels._triton._launch import Launch, captured
from vertebra.testing.cases import Case, cases, example
from vertebra.testing.contract import leaves_of

BN, RESIDUAL = ("affine", "stats"), ("affine", "stats", "residual")


def maps(value: Any) -> Iterator[torch.Tensor]:
    """Yield the (N, C, H, W) tensors of a launch's arguments."""
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        yield value
    elif isinstance(value, tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from maps(part)


def touched(launches: list[Launch]) -> int:
    found = [{id(m): m for m in maps(launch.arguments)}.values() for launch in launches]
    return sum(m.numel() * m.element_size() for distinct in found for m in distinct)


def measure(case: Case, device: torch.device) -> tuple[Traffic, Traffic]:
    """Return what the op declares for `case`, and what its launches can touch."""
    inputs = case.inputs(device)
    inputs |= leaves_of(case, inputs)
    declared: list[Traffic] = []
    with _op.observe(lambda call: declared.append(call.op.traffic(*call.args))):
        with captured() as forward:
            y = case.run(inputs)["y"]
        with captured() as backward:
            y.backward(inputs["dy"])
    (traffic,) = declared
    return traffic, Traffic(touched(forward), touched(backward))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in cases("traffic")])
def test_traffic_is_what_the_launches_touch(case: Case, device: torch.device) -> None:
    declared, found = measure(case, device)
    assert declared == found


@pytest.mark.parametrize(
    ("op", "options", "frozen", "forward", "backward"),
    [  # the tables of docs/kernels, in maps
        ("scale_bias_act", BN, True, 2, 3),
        ("scale_bias_act", RESIDUAL, True, 3, 4),
        ("scale_bias_act", BN, False, 2, 3),
        ("scale_bias_act", RESIDUAL, False, 3, 5),
        ("batch_norm_act", BN, False, 3, 5),
        ("batch_norm_act", RESIDUAL, False, 4, 7),
        ("batch_norm_act_pool", BN, False, 2.625, 2.875),
        ("batch_norm_act_pool", (*BN, "eval"), True, 1.375, 2.375),
    ],
)
def test_traffic_in_the_documentation(op, options, frozen, forward, backward, device) -> None:
    options = (*options, "frozen") if frozen else options
    case = example(op, shape=(2, 8, 4, 6), dtype=torch.bfloat16, act="relu", options=options)
    one = 2 * 8 * 4 * 6 * 2
    assert measure(case, device)[1] == (forward * one, backward * one)
