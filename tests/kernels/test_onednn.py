"""`conv2d_act` by oneDNN: within the definition's budget, and weights packed when they must."""

from __future__ import annotations

import gc
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vertebra import backend
from vertebra.kernels import _onednn, conv2d_act
from vertebra.kernels._act import ACTIVATIONS
from vertebra.kernels._op import Call, observe
from vertebra.testing.budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("on_onednn")


@pytest.fixture(autouse=True)
def _nothing_packed() -> None:
    _onednn._packed.clear()


def frozen(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    fan_in = max(1, torch.Size(shape[1:]).numel())
    return nn.Parameter((torch.randn(shape) / fan_in**0.5).to(dtype), requires_grad=False)


def paths(call: Any) -> list[tuple[str, str | None]]:
    seen: list[Call] = []
    with observe(seen.append):
        call()
    return [(c.path, c.reason) for c in seen]


WINDOWS = {
    "1x1": ((16, 16, 1, 1), {}),
    "3x3": ((16, 16, 3, 3), {"padding": 1}),
    "strided": ((24, 16, 3, 3), {"stride": (2, 1), "padding": (0, 1)}),
    "grouped": ((16, 4, 3, 3), {"groups": 4, "padding": 2, "dilation": 2}),
    "depthwise": ((16, 1, 7, 7), {"groups": 16, "padding": 3}),
    "patches": ((8, 16, 4, 4), {"stride": 4}),
    "odd": ((5, 16, 3, 2), {"padding": 1}),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_the_budget(window, act, dtype):
    shape, steps = WINDOWS[window]
    weight = frozen(*shape, dtype=dtype)
    terms = weight[0].numel()
    for N, layout, with_bias, adds in product(
        (1, 3), (torch.contiguous_format, torch.channels_last), (True, False), (True, False)
    ):
        x = torch.randn(N, 16, 9, 11, dtype=dtype).contiguous(memory_format=layout)
        bias = torch.randn(shape[0], dtype=torch.float32 if N == 3 else dtype) * with_bias
        size = torch.nn.functional.conv2d(x, weight, **steps).shape
        residual = torch.randn(size, dtype=dtype) if adds else None
        args = (x, weight, bias if with_bias else None, residual)
        found = conv2d_act(*args, act, **steps)
        double = [None if a is None else a.double() for a in args]
        with backend("eager"):
            eager = conv2d_act(*args, act, **steps)
            truth = conv2d_act(*double, act, **steps)
        assert_within_budget(f"{layout}", found, eager, truth, terms)
        assert found.stride() == eager.stride()
    assert paths(lambda: conv2d_act(*args, act, **steps))[0][0] == "onednn"


def test_slices_and_one_channel():
    weight = frozen(8, 1, 3, 3)
    x = torch.randn(2, 4, 8, 18)[:, 1:2, :, ::2]
    kept = x.clone()
    with backend("eager"):
        eager = conv2d_act(x, weight, act="relu")
        truth = conv2d_act(x.double(), weight.double(), act="relu")
    assert_within_budget("slice", conv2d_act(x, weight, act="relu"), eager, truth, 9)
    assert torch.equal(x, kept)


REFUSED = {
    "dtype torch.float64": (lambda x, w: conv2d_act(x.double(), w.double())),
    "a gradient is wanted": (lambda x, w: conv2d_act(x, w.clone().requires_grad_())),
    "a scale": (lambda x, w: conv2d_act(x, w, scale=torch.ones(4))),
    "empty input": (lambda x, w: conv2d_act(x[:0], w)),
    "something traces": (lambda x, w: torch.func.vmap(lambda z: conv2d_act(z, w))(x[None])),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    ((path, why),) = paths(lambda: REFUSED[reason](torch.randn(1, 4, 5, 5), frozen(4, 4, 1, 1)))
    assert path == "eager"
    assert reason in why


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_switched_off():
    x, weight = torch.randn(1, 4, 5, 5), frozen(4, 4, 1, 1)
    plain = conv2d_act(x, weight, act="relu")
    with torch.backends.mkldnn.flags(enabled=False):
        ((path, reason),) = paths(lambda: conv2d_act(x, weight))
        assert (path, "switched off" in reason) == ("eager", True)
        torch.testing.assert_close(conv2d_act(x, weight, act="relu"), plain)


def test_gradients_are_there_when_they_are_wanted_again():
    x, weight = torch.randn(2, 4, 5, 5), nn.Parameter(torch.randn(4, 4, 1, 1))
    for _ in range(2):
        with torch.no_grad():
            assert not conv2d_act(x, weight).requires_grad
        conv2d_act(x, weight).sum().backward()
        assert weight.grad is not None
        weight.grad = None


# the packed copies


def assert_right(x: Tensor, weight: Tensor) -> None:
    expected = torch.nn.functional.conv2d(x.double(), weight.double())
    torch.testing.assert_close(conv2d_act(x, weight).double(), expected, rtol=1e-4, atol=1e-4)


def test_parameters_are_packed_and_nothing_else():
    x = torch.randn(1, 4, 5, 5)
    conv2d_act(x, torch.randn(4, 4, 1, 1))
    assert not _onednn._packed
    rows = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    for _ in range(2):
        assert_right(x, rows[:, :, None, None])  # a view, each time another
    with torch.inference_mode():
        conv2d_act(x, rows[:, :, None, None])
    assert list(_onednn._packed) == [id(rows)]
    with torch.inference_mode():
        inference = nn.Parameter(torch.randn(4, 4, 1, 1), requires_grad=False)
        conv2d_act(x, inference)
        inference.mul_(2)  # of which nothing counts the versions
        assert_right(x, inference)
    assert list(_onednn._packed) == [id(rows)]
    del rows
    gc.collect()
    assert not _onednn._packed


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w.copy_(torch.randn(4, 4, 1, 1)),
        lambda w: setattr(w, "data", torch.randn(4, 4, 1, 1)),
        lambda w: setattr(w, "data", w.data.transpose(0, 1)),
        lambda w: w.detach().zero_(),
    ],
)
def test_a_changed_weight_is_packed_anew(change):
    x, weight = torch.randn(1, 4, 5, 5), frozen(4, 4, 1, 1)
    assert_right(x, weight)
    with torch.no_grad():
        change(weight)
    assert_right(x, weight)


def test_memory_that_is_given_back_is_not_taken_for_the_same():
    x, weight = torch.randn(1, 4, 5, 5), frozen(4, 4, 1, 1)
    for _ in range(20):  # the next may lie where the last but one was
        weight.data = torch.randn(4, 4, 1, 1)
        assert_right(x, weight)
        weight.data = torch.randn(4, 4, 1, 1)


def test_another_size_is_packed_for_when_it_stays():
    weight = frozen(4, 4, 1, 1)
    small, large = torch.randn(1, 4, 5, 5), torch.randn(2, 4, 9, 9)

    def packed() -> Tensor:
        return _onednn._packed[id(weight)].weight

    assert_right(small, weight)
    first = packed()
    for x in (large, small, large, small):  # in turns
        assert_right(x, weight)
        assert packed() is first
    assert_right(large, weight)
    assert_right(large, weight)
    assert packed() is not first


def test_nan_is_what_the_module_says():
    """Where aten's relu returns NaN, oneDNN's returns 0; the other activations return NaN."""
    x, weight = torch.full((1, 4, 2, 2), torch.nan), frozen(4, 4, 1, 1)
    for act in ACTIVATIONS:
        y = conv2d_act(x, weight, act=act)
        assert (y == 0).all() if act == "relu" else y.isnan().all()
        with backend("eager"):
            assert conv2d_act(x, weight, act=act).isnan().all()
