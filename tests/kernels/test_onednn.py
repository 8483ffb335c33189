"""`conv2d_act` on CPUs: within the definition's budget, and weights packed when they must."""

from __future__ import annotations

import gc
import importlib
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vertebra import backend
from vertebra.kernels import _choices, _onednn, conv2d_act
from vertebra.kernels._act import ACTIVATIONS
from vertebra.kernels._op import Call, observe
from vertebra.kernels._watch import Watch
from vertebra.testing.budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("on_onednn")


@pytest.fixture(autouse=True)
def _nothing_packed() -> None:
    _onednn._packed.clear()


def frozen(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    fan_in = max(1, torch.Size(shape[1:]).numel())
    return nn.Parameter((torch.randn(shape) / fan_in**0.5).to(dtype), requires_grad=False)


def as_candidate(name: str, *args: Any, act: str = "none") -> Tensor:
    """Return a 1x1 as a candidate computes it, or the one that is chosen."""
    x, weight, bias, residual = (*args, None, None)[:4]
    op = importlib.import_module("vertebra.kernels.conv2d_act").op
    steps = ((1, 1), (0, 0), (1, 1), 1)
    return op(x, weight, None, bias, residual, *steps, act, "", name)


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


PRODUCTS = [
    ("onednn_linear", torch.float32),
    ("onednn_linear", torch.bfloat16),
    ("mkl", torch.float32),
]


@pytest.mark.parametrize(("name", "dtype"), PRODUCTS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_products_of_rows_are_within_the_budget(name, dtype, act):
    weight = frozen(24, 16, 1, 1, dtype=dtype)
    for N, with_bias, adds, packs in product((1, 3), *[(True, False)] * 3):
        x = torch.randn(N, 16, 9, 11, dtype=dtype).contiguous(memory_format=torch.channels_last)
        bias = torch.randn(24, dtype=torch.float32 if N == 3 else dtype) if with_bias else None
        residual = torch.randn(N, 24, 9, 11, dtype=dtype) if adds else None
        kept = [t.clone() for t in (x, residual) if t is not None]
        args = (x, weight if packs else weight.clone(), bias, residual)
        found = as_candidate(name, *args, act=act)
        double = [None if a is None else a.double() for a in args]
        with backend("eager"):
            eager = conv2d_act(*args, act)
            truth = conv2d_act(*double, act)
        assert_within_budget(f"{N} {adds}", found, eager, truth, 16)
        assert found.stride() == eager.stride()
        assert all(map(torch.equal, kept, (t for t in (x, residual) if t is not None)))


@pytest.mark.parametrize("name", ["onednn_linear", "mkl"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": (16, 16, 3, 3), "padding": 1}, "a window"),
        ({"stride": 2}, "steps"),
        ({"padding": 1}, "padding"),
        ({"weight": (16, 4, 1, 1), "groups": 4}, "groups"),
        ({"layout": torch.contiguous_format}, "not in channels_last"),
    ],
)
def test_what_is_no_product_of_rows(name, change, reason, monkeypatch):
    """Measured or not, it runs as a convolution."""
    monkeypatch.setattr(_choices, "best", lambda *_: name)
    steps = {"layout": torch.channels_last, "weight": (16, 16, 1, 1), **change}
    x = torch.randn(1, 16, 5, 5).contiguous(memory_format=steps.pop("layout"))
    weight = frozen(*steps.pop("weight"))
    ((path, why),) = paths(lambda: conv2d_act(x, weight, **steps))
    assert path == "onednn"
    assert reason in why
    assert "onednn: the default" in why


def test_mkl_is_for_fp32():
    x = torch.randn(1, 4, 5, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with pytest.raises(NotImplementedError, match="fp32"):
        as_candidate("mkl", x, frozen(4, 4, 1, 1, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["onednn_linear", "mkl"])
def test_a_table_of_this_cpu_decides(name):
    x = torch.randn(2, 4, 5, 7).contiguous(memory_format=torch.channels_last)
    weight = frozen(6, 4, 1, 1)
    device = _choices.device_name(x.device)
    assert device not in ("", "cpu")
    conv2d_act(x, weight, act="relu")
    assert _onednn._packed[id(weight)].way[0] == "convolution"
    path = _choices.write("conv2d_act", device, {"4x5x7 > 6 1x1 float32": {8: name}}, {})
    conv2d_act(x, weight, act="relu")  # for which the choice of the first call had lasted
    assert _onednn._packed[id(weight)].way[0] == name.removeprefix("onednn_")
    ((found, why),) = paths(lambda: conv2d_act(x, weight, act="relu"))
    assert found == name.partition("_")[0]
    assert why == f"{name}: measured to be the fastest on {device}"
    path.unlink()
    _choices.forget()
    ((found, why),) = paths(lambda: conv2d_act(x, weight, act="relu"))
    assert (found, "nothing is measured" in why) == ("onednn", True)


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


CANDIDATES = ["onednn", "onednn_linear", "mkl"]


def assert_right(x: Tensor, weight: Tensor, name: str = "") -> None:
    x = x.contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv2d(x.double(), weight.double())
    found = as_candidate(name, x, weight)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


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
@pytest.mark.parametrize("name", CANDIDATES)
def test_a_changed_weight_is_packed_anew(name, change):
    x, weight = torch.randn(1, 4, 5, 5), frozen(4, 4, 1, 1)
    assert_right(x, weight, name)
    with torch.no_grad():
        change(weight)
    assert_right(x, weight, name)


class Conversions(Watch):
    """Counts tensors that are converted."""

    count = 0

    def saw(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        self.count += func is torch.ops.aten._to_copy.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(), (1, 1)])
@pytest.mark.parametrize("frozen_", [frozen, lambda *a, **kw: frozen(*a, **kw).detach().clone()])
def test_fcs_are_computed_in_fp32(dtype, window, frozen_):
    """Whatever the parameters are in, and with a copy of them in fp32 that is kept, and heeds."""
    weight, bias = frozen_(24, 40, *window, dtype=dtype), frozen_(24, dtype=dtype)
    for N, with_bias in product((1, 3), (True, False)):
        s = torch.randn(N, 40).to(dtype)
        weight.mul_(1.5)
        found = _onednn.fc(s, weight, bias if with_bias else None)
        truth = s.double() @ weight.double().flatten(1).T + with_bias * bias.double()
        in_fp32 = s.float() @ weight.float().flatten(1).T + with_bias * bias.float()
        assert_within_budget(f"{N} {with_bias}", found, in_fp32, truth, 40)
    kept = {*_onednn._packed}
    is_kept = frozen_ is frozen and dtype != torch.float32
    assert kept == ({id(weight), id(bias)} if is_kept else set())
    assert all(_onednn.is_packed(packed.weight) for packed in _onednn._packed.values())
    assert not _onednn.is_packed(weight)
    s = s.float()
    with Conversions() as conversions:
        _onednn.fc(s, weight, bias)
    assert conversions.count == (0 if is_kept or dtype == torch.float32 else 2)
    assert {*_onednn._packed} == kept


def test_fcs_keep_no_copy_for_who_traces_or_wants_gradients():
    weight, bias = frozen(24, 40, dtype=torch.bfloat16), frozen(24, dtype=torch.bfloat16)
    s = torch.randn(2, 40).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert _onednn.fc(mode.from_tensor(s), weight, bias).shape == (2, 24)
    one_by_one = torch.vmap(lambda row: _onednn.fc(row[None], weight, bias)[0])(s)
    assert not _onednn._packed
    torch.testing.assert_close(one_by_one, _onednn.fc(s, weight, bias))
    for parameter in (weight, bias):
        parameter.requires_grad_()
        _onednn.fc(s, weight, bias).sum().backward()
        assert parameter.grad is not None
        parameter.requires_grad_(False)
    torch.testing.assert_close(weight.grad, s.sum(0).expand_as(weight), rtol=1e-2, atol=1e-2)


def test_a_weight_is_packed_for_whoever_takes_it():
    x, weight = torch.randn(1, 4, 5, 5), frozen(4, 4, 1, 1)
    for name in (*CANDIDATES, *CANDIDATES):
        assert_right(x, weight, name)


def test_memory_that_is_given_back_is_not_taken_for_the_same():
    x, weight = torch.randn(1, 4, 5, 5), frozen(4, 4, 1, 1)
    for _ in range(20):  # the next may lie where the last but one was
        weight.data = torch.randn(4, 4, 1, 1)
        assert_right(x, weight)
        weight.data = torch.randn(4, 4, 1, 1)


@pytest.mark.parametrize("name", CANDIDATES)
def test_another_size_is_packed_for_when_it_stays(name):
    weight = frozen(4, 4, 1, 1)
    small, large = torch.randn(1, 4, 5, 5), torch.randn(2, 4, 9, 9)

    def packed() -> Tensor:
        return _onednn._packed[id(weight)].weight

    assert_right(small, weight, name)
    first = packed()
    for x in (large, small, large, small):  # in turns
        assert_right(x, weight, name)
        assert packed() is first
    assert_right(large, weight, name)
    assert_right(large, weight, name)
    assert packed() is not first


def test_nan_is_what_the_module_says():
    """Where aten's relu returns NaN, oneDNN's returns 0; the other activations return NaN."""
    x, weight = torch.full((1, 4, 2, 2), torch.nan), frozen(4, 4, 1, 1)
    for act in ACTIVATIONS:
        y = conv2d_act(x, weight, act=act)
        assert (y == 0).all() if act == "relu" else y.isnan().all()
        with backend("eager"):
            assert conv2d_act(x, weight, act=act).isnan().all()
