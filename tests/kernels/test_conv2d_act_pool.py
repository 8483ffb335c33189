"""What is special about `conv2d_act_pool`: its arguments, its candidates, where it stands in."""

import json
import sys

import pytest
import torch

from vertebra.kernels import _choices, backend, conv2d_act_pool, squeeze_gate
from vertebra.testing.budget import assert_within_budget
from vertebra.testing.cases import example

module = sys.modules["vertebra.kernels.conv2d_act_pool"]
CL = torch.channels_last
X = torch.randn(2, 8, 6, 5).to(memory_format=CL)
WEIGHT = torch.randn(12, 8, 1, 1).to(memory_format=CL)
GATE = torch.rand(2, 8)
NOTHING = {"writes": False, "pools": False}

BAD = {
    "gate shape": ({"gate": GATE[0]}, ValueError, r"\(N, C\) = \(2, 8\).*got \(8,\); flatten it"),
    "gate dtype": ({"gate": GATE.half()}, TypeError, r"gate must be torch.float32 where x is.*16"),
    "gate device": ({"gate": GATE.to("meta")}, ValueError, r"gate is on meta and x on cpu; move"),
    "nothing": (NOTHING, ValueError, r"nothing is asked for; give writes=True or pools=True"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changed, error, words = BAD[name]
    with pytest.raises(error, match=f"conv2d_act_pool: .*{words}"):
        conv2d_act_pool(**{"x": X, "weight": WEIGHT, **changed})


W1, W2 = torch.randn(4, 8), torch.randn(8, 4)
BAD_FCS = {
    "rank": ({"shares": GATE}, ValueError, r"shape \(N, T, C\), got \(2, 8\); of means give s"),
    "not a tensor": ({"shares": 3}, ValueError, r"shape \(N, T, C\), got int"),
    "dtype": ({"shares": GATE[:, None].half()}, TypeError, r"float32 or float64, got torch.float1"),
    "fc1": ({"fc1_weight": W2}, ValueError, r"fc1_weight must have shape \(R, C\).*shares has C ="),
    "device": ({"fc2_weight": W2.to("meta")}, ValueError, r"fc2_weight is on meta and shares on"),
    "act": ({"act": "tanh"}, ValueError, r"act must be one of none.*got 'tanh'"),
    "gate": ({"gate": "relu"}, ValueError, r"gate must be one of sigmoid.*got 'relu'"),
}


@pytest.mark.parametrize("name", BAD_FCS)
def test_bad_fcs(name: str) -> None:
    changed, error, words = BAD_FCS[name]
    given = {"shares": GATE[:, None], "fc1_weight": W1, "fc2_weight": W2}
    with pytest.raises(error, match=f"squeeze_gate: .*{words}"):
        squeeze_gate(**{"fc1_bias": None, "fc2_bias": None, **given, **changed})


def test_a_gradient_runs_in_eager_and_is_right(device) -> None:
    x, weight, gate = (t.to(device) for t in (X, WEIGHT, GATE))
    gate = gate.clone().requires_grad_()
    y, shares = conv2d_act_pool(x, weight, act="silu", gate=gate)
    (found,) = torch.autograd.grad(y.sum() + shares.sum(), gate)
    z = torch.nn.functional.silu(torch.einsum("nchw,kc,nc->nkhw", x, weight[:, :, 0, 0], gate))
    (wanted,) = torch.autograd.grad(z.sum() + z.mean((2, 3)).sum(), gate)
    torch.testing.assert_close(found, wanted)
    with backend("triton"), pytest.raises(NotImplementedError, match="a gradient is wanted"):
        conv2d_act_pool(x, weight, gate=gate)
    fcs = (W1.to(device), None, W2.to(device), None)
    with backend("triton"), pytest.raises(NotImplementedError, match="a gradient is wanted"):
        squeeze_gate(gate[:, None], *fcs)


def call(device, x, gate, candidate: str, weight=WEIGHT):
    steps = ((1, 1), (0, 0), (1, 1), 1, "relu", "tf32", candidate)
    x, weight, gate = (None if t is None else t.to(device) for t in (x, weight, gate))
    return module.op(x, weight, None, None, None, *steps, gate, True, True)


@pytest.mark.parametrize("candidate", ["triton:tiles", "triton:gather"])
@pytest.mark.parametrize("where", ["x", "gate"])
def test_nan_stays_in_its_image(candidate: str, where: str, device) -> None:
    x, gate = X.clone(memory_format=torch.preserve_format), GATE.clone()
    wanted = torch.zeros(2, 6, 5, dtype=torch.bool)
    if where == "x":
        x[1, 2, 3, 4] = float("nan")
        wanted[1, 3, 4] = True
    else:
        gate[1, 2] = float("nan")
        wanted[1] = True
    y, shares = call(device, x, gate, candidate)
    assert torch.equal(y.isnan().cpu(), wanted[:, None].expand_as(y))
    assert torch.equal(shares.sum(1).isnan().cpu(), wanted.any(2).any(1)[:, None].expand(2, 12))


def test_every_configuration_computes_the_same(device) -> None:
    case = example("conv2d_act_pool", shape=(2, 32, 9, 13))
    args = tuple(module._Call.read(*_of(case, device)))
    args = (*args[0], *args[1:])
    names = module.configurations(*args)
    assert len(names) > 4
    assert {name.split(":")[1] for name in names} == {"tiles", "gather"}
    eager = module._eager(*args)
    truth = module._eager(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    for name in names:
        found = module.op(*args[:11], name, *args[12:])
        for what, *values in zip(("y", "shares"), found, eager, truth, strict=True):
            if what == "shares":  # of which pixels is not promised
                values = [v.sum(1) for v in values]
            assert_within_budget(f"{name} {what}", *values, 32 * 9 * 13)


def _of(case, device):
    from vertebra.testing.cases import conv2d_act_pool as cases

    return cases._arguments(case, case.inputs(device))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("triton:tiles:1x1x128x64x16:w4:s2", "boxes of 1x128 pixels are no runs of 64"),
        ("triton:gather:32x16x16x1:w4:s2", "tiles of 32 pixels have no runs of 64"),
        ("triton:tiles:2x1x64x128x16:w4:s2", "a gate beside 128x128 sums, which spill"),
    ],
)
def test_a_candidate_that_cannot_run(name: str, words: str, device) -> None:
    with backend("triton"), pytest.raises(NotImplementedError, match=words):
        call(device, X, GATE, name)


# ------------------------------------------------------------------------------ where it stands in

SITE = "8x6x5 > 12 1x1 float32"
STEPS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "writes": True, "pools": True}


@pytest.fixture
def table(device, tmp_path, monkeypatch):
    """Write what was measured of `conv2d_act`."""
    monkeypatch.setattr(_choices, "user_folder", lambda: tmp_path)
    path = _choices.file_of(tmp_path, "conv2d_act", _choices.device_name(device))

    def write(candidate: str) -> None:
        path.parent.mkdir(exist_ok=True)
        content = {"schema": 1, "op": "conv2d_act", "choices": {SITE: {"2": candidate}}}
        path.write_text(json.dumps(content))
        _choices.forget()

    yield write
    _choices.forget()


def stands_in(device) -> str | None:
    """Return the candidate that runs, None where `conv2d_act` and others are to."""
    seen = []

    def noted(*args):
        seen.append(args[11])
        return module._eager(*args)

    original = module.op
    module.op = noted
    try:
        given = (None if t is None else t.to(device) for t in (X, WEIGHT, None, None))
        found = module.where_ours(*given, "relu", gate=GATE.to(device), **STEPS)
    finally:
        module.op = original
    assert (found is None) == (not seen)
    return seen[0] if seen else None


def test_it_stands_in_where_kernels_of_ours_are_the_fastest(table, device) -> None:
    table("cudnn")
    for _ in range(2):  # the second time by what is remembered
        assert stands_in(device) is None
    table("triton:gather:64x16x16x1:w4:s2")
    for _ in range(2):
        assert stands_in(device) == "triton:gather:64x16x16x1:w4:s2"
    table("triton:tiles:1x1x128x64x16:w4:s2")  # whose tiles mix runs
    assert stands_in(device) == "triton"
    with backend("eager"):
        assert stands_in(device) is None
    with torch.autocast(device.type, torch.bfloat16):
        assert stands_in(device) is None
