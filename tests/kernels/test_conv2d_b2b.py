"""What is special about `conv2d_b2b`: its arguments, what runs as one kernel, who chooses."""

import json
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vertebra.kernels import _choices, backend, conv2d_b2b
from vertebra.kernels._op import observe
from vertebra.testing.budget import assert_within_budget
from vertebra.testing.cases import Case, example

module = sys.modules["vertebra.kernels.conv2d_b2b"]
CL = torch.channels_last
X = torch.randn(2, 8, 6, 5).to(memory_format=CL)
WEIGHT, NEXT = torch.randn(12, 8, 1, 1), torch.randn(4, 12, 1, 1)
MID = torch.randn(8, 8, 3, 3)
VECTOR = torch.randn(12)

BAD = {
    "rank": ({"x": X[0]}, ValueError, r"\(N, C, H, W\), got \(8, 6, 5\)"),
    "not a weight": ({"weight": 3}, ValueError, r"weight must have shape.*got int"),
    "channels": ({"weight": NEXT}, ValueError, r"weight must have shape \(filters, 8, 1, 1\)"),
    "between": ({"next_weight": WEIGHT}, ValueError, r"next_weight.*has 12 channels; got \(12, 8"),
    "window": ({"next_weight": torch.randn(4, 12, 3, 3)}, ValueError, r"got \(4, 12, 3, 3\)"),
    "dtype": ({"next_weight": NEXT.half()}, TypeError, r"next_weight must have x's dtype.*16"),
    "device": ({"weight": WEIGHT.to("meta")}, ValueError, r"weight is on meta and x on cpu"),
    "bias": ({"bias": VECTOR[:8]}, ValueError, r"bias must have shape \(12,\), one.*\(8,\)"),
    "next bias": ({"next_bias": VECTOR}, ValueError, r"next_bias must have shape \(4,\)"),
    "residual": ({"residual": X}, ValueError, r"y's shape \(2, 12, 6, 5\), got \(2, 8, 6, 5\)"),
    "mid weight": ({"mid_weight": WEIGHT}, ValueError, r"mid_weight must have.*8, 3, 3\), as"),
    "behind it": (
        {"mid_weight": MID[:5]},
        ValueError,
        r"weight must have.*has 5 channels; got \(12",
    ),
    "mid bias": ({"mid_weight": MID, "mid_bias": VECTOR}, ValueError, r"mid_bias must.*\(8,\)"),
    "no mid weight": ({"mid_bias": VECTOR[:8]}, ValueError, r"give its mid_weight too"),
    "no mid": ({"mid_act": "relu"}, ValueError, r"mid_bias and mid_act are a 3x3's"),
    "mid activation": ({"mid_weight": MID, "mid_act": "tanh"}, ValueError, r"got 'tanh'"),
    "activation": ({"next_act": "tanh"}, ValueError, r"act must be one of none.*got 'tanh'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changed, error, words = BAD[name]
    arguments = {"x": X, "weight": WEIGHT, "next_weight": NEXT, "bias": VECTOR, **changed}
    with pytest.raises(error, match=f"conv2d_b2b: .*{words}"):
        conv2d_b2b(**arguments)


def arguments(device: Any, **changes: Any) -> tuple[Any, ...]:
    """Return the arguments of the op for an example."""
    case = example("conv2d_b2b", dtype=torch.float16, **changes)
    *pair, mid_weight, mid_bias = case.inputs(device).values()
    mid_act = "none" if mid_weight is None else "hardswish"
    return *pair, "relu", "silu", mid_weight, mid_bias, mid_act, "", ""


FULL = ("bias", "residual")
# with a 3x3 in front
WHOLE: dict[str, Any] = {"shape": (3, 32, 7, 9), "options": ("mid=40", "k=72", "d=24", *FULL)}
CALLS = {"pair": {}, "bottleneck": WHOLE}


def calls(args: tuple[Any, ...]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    with observe(lambda call: found.append((call.op.name, call.path))):
        module.op(*args)
    return found


@pytest.mark.parametrize("call", CALLS)
def test_every_candidate_computes_the_same(call: str, device) -> None:
    args = arguments(device, **CALLS[call])
    names = module.candidates(*args)
    assert len(names) == len(set(names)) > 4
    assert names[0] == "apart"
    eager = module._eager(*args)
    truth = module._eager(*(a.double() if isinstance(a, Tensor) else a for a in args))
    for name in names:
        found = module.op(*args[:-1], name)
        for label, y, *wanted in zip("yz", found, eager, truth, strict=True):
            assert_within_budget(f"{name} {label}", y, *wanted)
            assert y.is_contiguous(memory_format=CL)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("onemkl", "no candidate 'onemkl' .one of triton, apart"),
        ("triton:64", "'64' is no configuration; give its blocks, as in 128x64:w8:s2"),
        ("triton:128x64:w4:s9", "128x64:w4:s9 does not fit"),
    ],
)
def test_a_candidate_that_cannot_run(name: str, words: str, device) -> None:
    with pytest.raises(NotImplementedError, match=words):
        module.op(*arguments(device)[:-1], name)


REFUSED = {
    "slices": ({"layout": "sliced_nhwc"}, "", "x is no matrix of aligned pixels"),
    "channels": ({"shape": (2, 20, 7, 9)}, "", "x is no matrix of aligned pixels"),
    "residual": ({"layout": "mixed"}, "", "residual is no matrix of aligned pixels"),
    "wide": ({"shape": (1, 264, 2, 2)}, "", "C of 264 (up to 256)"),
    "ieee": ({}, "ieee", "fp32 is not to be multiplied as TF32"),
    "taps": (WHOLE | {"shape": (2, 24, 7, 9)}, "", "24 channels of x leave blocks of 8"),
    "wide mid": (WHOLE | {"options": ("mid=264", *FULL)}, "", "C of 264 (up to 256)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_run_as_one_kernel(name: str, device) -> None:
    """It runs as two, and `triton` means those."""
    changes, precision, words = REFUSED[name]
    args = arguments(device, **changes)
    if precision:
        args = (*(a.float() if isinstance(a, Tensor) else a for a in args[:-2]), precision, "")
    a = module.Arguments(*args)
    assert words in str(module._refuses_as_one(a, "triton"))
    mid = ["conv2d_act", "conv2d_b2b"] if a.mid_weight is not None else []
    assert [op for op, _ in calls(args)] == ["conv2d_b2b", *mid, "conv2d_act", "conv2d_act"]
    with backend("triton"):
        assert calls(args) == [("conv2d_b2b", "triton")]


def test_a_3x3_that_is_not_dense(device) -> None:
    args = list(arguments(device, **WHOLE))
    args[8] = args[8].contiguous()
    assert "weight is not in channels_last" in str(module.op.refuses(*args))
    args[8] = torch.cat([args[8], args[8]], 1).contiguous(memory_format=CL)[:, :32]
    reason = module._refuses_as_one(module.Arguments(*args), "triton")
    assert reason == "mid_weight is not dense in channels_last"


def test_a_gradient_runs_apart_and_is_right(device) -> None:
    args = [a.float() if isinstance(a, Tensor) else a for a in arguments(device, **WHOLE)]
    for i in (1, 2, 4, 8, 9):
        varied = list(args)
        varied[i] = args[i].clone().requires_grad_()
        with backend("triton"), pytest.raises(NotImplementedError, match="a gradient is wanted"):
            module.op(*varied)
        y, z = module.op(*varied)
        (found,) = torch.autograd.grad(y.sum() + z.sum(), varied[i], allow_unused=True)
        h = F.hardswish(F.conv2d(varied[0], varied[8], varied[9], padding=1))
        plain = F.relu(F.conv2d(h, varied[1], varied[3]) + varied[5])
        wanted = plain.sum() + F.silu(F.conv2d(plain, varied[2], varied[4])).sum()
        torch.testing.assert_close(found, torch.autograd.grad(wanted, varied[i])[0])


@pytest.mark.parametrize("call", CALLS)
def test_nan_reaches_what_is_computed_from_it(call: str, device) -> None:
    x, weight, next_weight, *rest = arguments(device, **CALLS[call])
    x = x.clone()
    x[1, 2, 3, 4] = float("nan")
    y, z = module.op(x, weight, next_weight, *rest[:-1], "triton:64x64:w4:s2")
    wanted = torch.zeros(len(x), 7, 9, dtype=torch.bool, device=device)
    around = 1 if call == "bottleneck" else 0
    wanted[1, 3 - around : 4 + around, 4 - around : 5 + around] = True
    for found in (y, z):
        assert torch.equal(found.isnan(), wanted[:, None].expand_as(found))


@pytest.mark.parametrize("call", CALLS)
def test_autocast_casts_as_a_convolution_does(call: str, device) -> None:
    args = (a.float() if isinstance(a, Tensor) else a for a in arguments(device, **CALLS[call]))
    *pair, mid_weight, mid_bias, mid_act, _, _ = args
    mid = {"mid_weight": mid_weight, "mid_bias": mid_bias, "mid_act": mid_act}
    with torch.autocast(device.type, torch.bfloat16):
        y, z = conv2d_b2b(*pair, **mid)
    assert y.dtype == z.dtype == torch.bfloat16
    exact = conv2d_b2b(*pair, **mid)
    torch.testing.assert_close((y.float(), z.float()), exact, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("call", CALLS)
def test_empty_batch(call: str, device) -> None:
    x, weight, next_weight, *rest = arguments(device, **CALLS[call])
    given = (x[:0], weight, next_weight, *rest[:2], rest[2][:0], *rest[3:])
    y, z = module.op(*given)
    assert (y.shape, z.shape) == ((0, 72, 7, 9), (0, 24, 7, 9))
    assert module.as_one(*given[:-2]) is None


# ---------------------------------------------------------------------------------------- choices


@pytest.fixture
def table(device, tmp_path, monkeypatch):
    """Write a user's table."""
    monkeypatch.setattr(_choices, "user_folder", lambda: tmp_path)
    path = _choices.file_of(tmp_path, "conv2d_b2b", _choices.device_name(device))

    def write(choices: object) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"schema": 1, "op": "conv2d_b2b", "choices": choices}))
        _choices.forget()

    _choices.forget()
    yield write
    _choices.forget()


SITE = "24x7x9 > 72 > 24 float16 residual"
SITE_OF_WHOLE = "32x7x9 > 40 3x3 > 72 > 24 float16 residual"
SITE_BEHIND = "40x7x9 > 72 > 24 float16 residual"


def best(args: tuple[Any, ...]) -> str:
    """Return the candidate that a fused network takes."""
    name = module._best(module.Arguments(*args))[0]
    maps = module.as_one(*args[:-2])
    assert (maps is None) == (name == "apart")
    return name


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter, which is 132 processors")
def test_arithmetic_chooses_where_nothing_is_measured(table, device) -> None:
    few, many = arguments(device), arguments(device, shape=(1, 24, 94, 90))
    assert (best(few), best(many)) == ("apart", "triton")
    assert calls(few) == [("conv2d_b2b", "triton")]  # who asks for it gets it
    full = tuple(a.float() if isinstance(a, Tensor) else a for a in many)
    assert best(full) == "apart"
    with backend("eager"):
        assert module.as_one(*many[:-2]) is None
    with backend("triton"):
        assert (best(few), best(full)) == ("triton", "triton")


def test_what_is_measured_is_chosen(table, device) -> None:
    args = arguments(device)
    for name in ("triton:64x64:w4:s2", "apart"):
        table({SITE: {"2": name}})
        assert best(args) == name
    table({SITE: {"2": "triton:512x64:w4:s2"}})  # which does not fit
    assert best(args) == "apart"


def test_a_bottleneck_is_one_kernel_where_that_is_measured_or_asked_for(table, device) -> None:
    """Not by arithmetic; and what is apart leaves the pair its own choice."""
    args = arguments(device, shape=(1, 32, 94, 90), options=WHOLE["options"])
    assert best(args) == "apart"
    assert calls(args) == [("conv2d_b2b", "triton")]  # who asks for it gets it
    with backend("triton"):
        assert best(args) == "triton"
    args = arguments(device, **WHOLE)
    table({SITE_OF_WHOLE: {"3": "triton:64x64:w4:s2"}})
    assert best(args) == "triton:64x64:w4:s2"
    table({SITE_OF_WHOLE: {"3": "apart"}, SITE_BEHIND: {"3": "triton:64x64:w4:s2"}})
    assert best(args) == "apart"
    apart = (*args[:-1], "apart")
    assert calls(apart) == [
        ("conv2d_b2b", "apart"),
        ("conv2d_act", "triton"),
        ("conv2d_b2b", "triton"),
    ]


def test_arithmetic() -> None:
    """Stages 1 and 2 of a ResNet wait for memory, the later ones do not."""

    def advice(C: int, K: int, D: int, dtype: torch.dtype = torch.bfloat16) -> str | None:
        options = (f"k={K}", f"d={D}")
        case = Case("conv2d_b2b", (1, C, 2, 2), dtype=dtype, options=options)
        pair = [*case.inputs("meta").values()][:6]
        rest = ("relu", "relu", None, None, "none", "", "")
        return module.advises_against(module.Arguments(*pair, *rest))

    for C, K, D in ((64, 256, 64), (128, 512, 128), (128, 256, 128), (96, 96, 96), (48, 48, 48)):
        assert advice(C, K, D) is None
    assert "409 products per channel moved" in str(advice(256, 1024, 256))
    assert "819 products" in str(advice(512, 2048, 512))
    assert "float32" in str(advice(64, 256, 64, torch.float32))
