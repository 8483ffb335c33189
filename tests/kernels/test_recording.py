"""Calls that were recorded compute what the function did that made them, and touch nothing else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vertebra.kernels._recording import record
from vertebra.kernels._watch import Watch

C = 4
WEIGHT, BIAS = torch.randn(C, C, 1, 1), torch.randn(C)
CONSTANTS = (WEIGHT, BIAS)

_unary: Any = torch.ops.mkldnn._convolution_pointwise.default
_binary: Any = torch.ops.mkldnn._convolution_pointwise.binary
_STEPS = ((0, 0), (1, 1), (1, 1), 1)


def is_constant(t: Tensor) -> bool:
    return any(t is constant for constant in CONSTANTS)


def recorded(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """Return the text of a recording; the run of it that made it has to be right itself."""
    wanted = function(x.clone(memory_format=torch.preserve_format))
    noted = record(function, x, is_constant)
    assert torch.equal(noted.y, wanted)
    return noted.text


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, C, 3, 5).contiguous(memory_format=torch.channels_last)


def conv(x: Tensor) -> Tensor:
    return _unary(x, WEIGHT, BIAS, *_STEPS, "relu", [], "")


def conv_add(x: Tensor, residual: Tensor) -> Tensor:
    return _binary(x, residual, WEIGHT, BIAS, *_STEPS, "add", 1.0, "relu", [], None)


def rows_and_back(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)


def scaled(x: Tensor) -> Tensor:
    return x * x.mean((2, 3)).sigmoid()[:, :, None, None]


def conv_add_parts(x: Tensor, residual: Tensor) -> Tensor:
    y = residual.clone()
    for part, sums in zip(x.split(1), y.split(1), strict=True):
        sums.copy_(conv_add(part, sums))
    return y


def keeping_sums(x: Tensor, residual: Tensor) -> Tensor:
    y = residual.clone()
    y[:1].copy_(sums := conv_add(x[:1], y[:1]))
    return y.relu() + sums


def copied_elsewhere(x: Tensor, residual: Tensor) -> Tensor:
    y = residual.clone()
    y[1:].copy_(conv_add(x[:1], y[:1]))
    return y


def in_another_order(x: Tensor, residual: Tensor) -> Tensor:
    y = residual.contiguous(memory_format=torch.contiguous_format).clone()
    return y.copy_(conv_add(x, y)).contiguous(memory_format=torch.channels_last)


def summed_twice(x: Tensor, residual: Tensor) -> Tensor:
    y = residual.clone()
    y.copy_(sums := conv_add(x, y))
    return sums


def of_themselves(x: Tensor, _: Tensor) -> Tensor:
    y = x.clone()
    return y.copy_(conv_add(y, y))


# what a step of a random program makes of two maps, either of which it may read again later
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "conv": lambda a, _: conv(a),
    "conv_add": conv_add,
    "mul": lambda a, b: a * b,
    "add": lambda a, b: a + b,
    "square": lambda a, _: a * a,
    "relu": lambda a, _: torch.relu(a),
    "scaled": lambda a, _: scaled(a),
    "row": lambda a, b: a * b[:, :, :1],
    "rows and back": lambda a, _: rows_and_back(a),
    "view of a half, filled": lambda a, _: torch.cat((a[:1], a[1:] + 1)),
    "chunks": lambda a, _: torch.cat(a.chunk(2, 1), 1),
    "of constants": lambda a, _: a + (WEIGHT[:, 0] * 2)[None],
    "in place": lambda a, b: (a + b).relu_().mul_(2),
    "conv_add, in parts": conv_add_parts,
    "conv_add, in parts that are read": keeping_sums,
    "conv_add, copied to another part": copied_elsewhere,
    "conv_add, copied in another order": in_another_order,
    "conv_add, returned and copied": summed_twice,
    "conv_add, of themselves": of_themselves,
    "turned and copied": lambda a, b: (a.mT.clone() * b.mT).mT,
}
Program = list[tuple[str, int, int]]
PROGRAMS = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)))


def interpreted(program: Program) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        maps = [x, x + 1]
        for name, a, b in program:
            maps.append(STEPS[name](maps[-1 - a % len(maps)], maps[-1 - b % len(maps)]))
        return maps[-1]

    return function


@settings(max_examples=150)
@given(PROGRAMS)
def test_random_programs(program):
    function = interpreted(program)
    text = recorded(function, image())
    run, x = text.compiled(), image()
    before = [t.clone() for t in (x, *CONSTANTS)]
    wanted = function(x.clone(memory_format=torch.preserve_format))
    for _ in range(2):
        y = run(x)
        assert torch.equal(y, wanted)
        assert y.stride() == wanted.stride()
    assert all(map(torch.equal, (x, *CONSTANTS), before))


@pytest.mark.parametrize(
    ("function", "overwrites"),
    [
        pytest.param(lambda x: conv_add(conv(x), conv(x)), "_convolution_pointwise_", id="sum"),
        pytest.param(
            lambda x: conv_add(conv(x), rows_and_back(conv(x))),
            "_convolution_pointwise_",
            id="sum onto what were rows",
        ),
        pytest.param(lambda x: conv_add(conv(x), x), "", id="sum onto x"),
        pytest.param(lambda x: conv_add(conv(x), rows_and_back(x)), "", id="sum onto rows of x"),
        pytest.param(lambda x: conv_add(y := conv(x), y), "", id="sum onto what is read"),
        pytest.param(lambda x: conv_add(conv(x), y := conv(x)) + y, "add_", id="sum, read later"),
        pytest.param(lambda x: scaled(conv(x)), "mul_", id="gate"),
        pytest.param(lambda x: scaled(x), "", id="gate of x"),
        pytest.param(lambda x: (y := conv(x), y * 2)[0], "", id="product of what is returned"),
        pytest.param(lambda x: conv(x)[:1] * conv(x)[:1], "", id="product of views"),
        pytest.param(lambda x: (y := conv(x)) * y.permute(0, 1, 2, 3), "", id="view of itself"),
        pytest.param(lambda x: conv(x) * image(1).new_ones(3, 1, 1, 1, 1), "", id="larger result"),
        pytest.param(lambda x: conv(x).mT * 2, "mul_", id="product of all of a view"),
        pytest.param(lambda x: torch.relu(conv(x) - 1), "relu_", id="activation"),
        pytest.param(
            lambda x: conv_add_parts(conv(x), conv(x)), "_convolution_pointwise_", id="parts"
        ),
        pytest.param(
            lambda x: keeping_sums(x, conv(x)), "add_ copy_ relu_", id="a part that is read beside"
        ),
        pytest.param(lambda x: copied_elsewhere(x, conv(x)), "copy_", id="another part"),
        pytest.param(lambda x: of_themselves(x, x), "copy_", id="a sum with what it is made of"),
        pytest.param(lambda x: in_another_order(x, conv(x)), "copy_", id="parts in another order"),
        pytest.param(
            lambda x: summed_twice(x, x), "copy_", id="a sum that is returned and not its copy"
        ),
    ],
)
def test_what_is_overwritten(function, overwrites):
    x = image()
    run = recorded(function, x).compiled()
    called: set[str] = set()

    class Names(Watch):
        def saw(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
            called.add(func.__name__.partition(".")[0])

    with Names():
        run(x)
    assert {name for name in called if name.endswith("_")} == {*overwrites.split()}


@pytest.mark.parametrize(
    ("function", "copies"),
    [
        pytest.param(lambda x: conv(x).clone(), 0, id="of what is read no more"),
        pytest.param(lambda x: conv(x).mT.clone(), 0, id="of a view of all of it"),
        pytest.param(lambda x: conv(x)[:1].clone(), 1, id="of a part"),
        pytest.param(lambda x: x.clone(), 1, id="of x"),
        pytest.param(lambda x: (y := conv(x)).clone() + y, 1, id="of what is read later"),
        pytest.param(lambda x: (y := conv(x))[:1] * y.clone(), 1, id="of what has a view"),
        pytest.param(lambda x: conv(x).contiguous(), 1, id="in another order"),
        pytest.param(lambda x: conv_add_parts(conv(x), conv(x)), 0, id="of a term"),
        pytest.param(lambda x: conv_add_parts(conv(x), x), 1, id="of a term that is x"),
    ],
)
def test_copies(function, copies):
    """What nobody else reads is not copied."""
    x = image()
    run, before, wanted = recorded(function, x).compiled(), x.clone(), function(x)
    called: list[str] = []

    class Names(Watch):
        def saw(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
            called.append(func.__name__.partition(".")[0])

    with Names():
        y = run(x)
    assert called.count("clone") == copies
    assert torch.equal(y, wanted)
    assert y.stride() == wanted.stride()
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        pytest.param(lambda x: conv(rows_and_back(conv(x))), 2, id="that cancel"),
        pytest.param(lambda x: (y := conv(x), y[:1])[0], 1, id="that nobody reads"),
        pytest.param(lambda x: (y := conv(x), y[0].mean(0))[0], 3, id="that somebody reads"),
        pytest.param(lambda x: (y := conv(x))[:1] + y[1:], 4, id="of two places"),
        pytest.param(lambda x: (y := conv(x))[:1] + y[:1], 3, id="of one place"),
        pytest.param(lambda x: (y := conv(x))[:, :, :3, :3] + y[:, :, :3, :3].mT, 4, id="turned"),
    ],
)
def test_views(function, calls):
    """One view is as good as another of the same place, and none where it is the map itself."""
    x = image()
    text = recorded(function, x)
    assert len(text.calls) == calls
    assert torch.equal(text.compiled()(x), function(x))


def test_a_copy_may_come_first():
    x = image()
    run = recorded(lambda x: x.copy_(WEIGHT[0, 0, 0, 0]).mul(2), x).compiled()
    assert torch.equal(run(image()), torch.full_like(x, 2 * WEIGHT[0, 0, 0, 0].item()))


@torch.inference_mode()
def test_x_stays_what_it_is_where_a_call_returns_it():
    x = image()
    before = x.clone()
    run = recorded(lambda x: F.dropout(x, training=False) * 2, x).compiled()
    assert torch.equal(run(x), before * 2)
    assert torch.equal(x, before)


def test_nothing_is_held_longer_than_it_is_read():
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    class Lives(Watch):
        def saw(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
            seen.append(weakref.ref(result))
            alive.append(sum(ref() is not None for ref in seen))

    def chain(x: Tensor) -> Tensor:
        for _ in range(6):
            x = conv(x)
        return x

    x = image()
    run = recorded(chain, x).compiled()
    with Lives():
        run(x)
    assert len(alive) == 6
    assert max(alive) == 2  # what is read, and what is made of it


def test_a_recording_holds_no_map():
    x = image()
    noted = record(lambda x: conv(conv(x)), x, is_constant)
    text, y = noted.text, weakref.ref(noted.y)
    held = weakref.ref(x)
    del noted, x
    gc.collect()
    assert y() is None
    assert held() is None
    assert text is not None


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x * float(x.sum()), id="a number of x"),
        pytest.param(lambda x: conv(x) if x.sum() > 0 else x, id="a branch on x"),
        pytest.param(lambda x: x + BIAS.mul_(1)[0], id="a constant"),
        pytest.param(
            lambda x: F.linear(x.permute(0, 2, 3, 1), nn.Parameter(WEIGHT[:, :, 0, 0])),
            id="a tensor of nobody's",
        ),
        pytest.param(lambda _: BIAS, id="nothing of x"),
    ],
)
def test_what_cannot_be_told_from_calls(function):
    with torch.no_grad():
        assert record(function, image().abs(), is_constant).text is None
