"""What is special about `conv2d_act`: its arguments, its candidates, the choice among them."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from vertebra.kernels import _choices, backend, conv2d_act
from vertebra.kernels._op import observe
from vertebra.kernels._triton._conv import block, covered
from vertebra.testing.budget import assert_within_budget
from vertebra.testing.cases import example

module = sys.modules["vertebra.kernels.conv2d_act"]
CL = torch.channels_last
X = torch.randn(2, 8, 6, 5).to(memory_format=CL)
WEIGHT = torch.randn(12, 4, 3, 3).to(memory_format=CL)
VECTOR = torch.randn(12)

BAD = {
    "rank": ({"x": X[0]}, ValueError, r"\(N, C, H, W\), got \(8, 6, 5\)"),
    "weight rank": ({"weight": WEIGHT[0]}, ValueError, r"weight must have shape \(K, C/groups, R"),
    "not a weight": ({"weight": 3}, ValueError, r"weight must have shape.*got int"),
    "channels": ({"groups": 1}, ValueError, r"groups must divide.*\(2, 8, 6, 5\), groups 1.*check"),
    "groups": ({"groups": 3}, ValueError, r"groups must divide C and K.*groups 3"),
    "weight dtype": ({"weight": WEIGHT.half()}, TypeError, r"weight must have x's dtype.*float16"),
    "weight device": ({"weight": WEIGHT.to("meta")}, ValueError, r"weight is on meta and x on cpu"),
    "bias": ({"bias": VECTOR[:8]}, ValueError, r"bias must have shape \(12,\), one.*\(8,\)"),
    "scale": ({"scale": VECTOR[:, None]}, ValueError, r"scale must have shape \(12,\)"),
    "scale dtype": ({"scale": VECTOR.double()}, TypeError, r"scale must have x's dtype"),
    "residual": ({"residual": X}, ValueError, r"y's shape \(2, 12, 4, 3\), got \(2, 8, 6, 5\)"),
    "stride": (
        {"stride": 0},
        ValueError,
        r"stride, dilation and groups must be posi.*\(0, 0\)",
    ),
    "padding": ({"padding": (0, -1)}, ValueError, r"padding not negative.*\(0, -1\)"),
    "padding by name": ({"padding": "same"}, TypeError, r"padding must be an integer.*'same'"),
    "no window": (
        {"dilation": 3},
        ValueError,
        r"must hold one window.*dilation \(3, 3\); pad",
    ),
    "activation": ({"act": "tanh"}, ValueError, r"act must be one of none.*got 'tanh'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changed, error, words = BAD[name]
    arguments = {"x": X, "weight": WEIGHT, "bias": VECTOR, "groups": 2, **changed}
    with pytest.raises(error, match=f"conv2d_act: .*{words}"):
        conv2d_act(**arguments)


def run(*args, **kwargs) -> tuple[torch.Tensor, str, str | None]:
    """Return what a call returns, the path it took and the reason."""
    seen = []
    with observe(seen.append):
        y = conv2d_act(*args, **kwargs)
    (call,) = seen
    return y, call.path, call.reason


def test_a_gradient_runs_in_eager_and_is_right(device) -> None:
    x, bias = X.to(device), VECTOR.to(device)
    weight = WEIGHT.to(device).clone().requires_grad_()
    y, path, reason = run(x, weight, bias, act="silu", groups=2)
    assert (path, reason) == ("eager", "a gradient is wanted (the kernels are for inference)")
    with backend("triton"), pytest.raises(NotImplementedError, match="a gradient is wanted"):
        conv2d_act(x, weight, bias, groups=2)
    (found,) = torch.autograd.grad(y.sum(), weight)
    (wanted,) = torch.autograd.grad(F.silu(F.conv2d(x, weight, bias, groups=2)).sum(), weight)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        assert run(x, weight, bias, groups=2)[1] != "eager"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": X.contiguous()}, "x is not in channels_last"),
        ({"weight": WEIGHT.contiguous()}, "weight is not in channels_last"),
        ({"x": X.double(), "weight": WEIGHT.double(), "bias": None}, "float64"),
        ({"weight": WEIGHT[:8, :1], "bias": VECTOR[:8], "groups": 8}, "depthwise"),
    ],
    ids=["x", "weight", "float64", "depthwise"],
)
def test_what_our_kernels_refuse(changes, words, device) -> None:
    given = {"x": X, "weight": WEIGHT, "bias": VECTOR, "groups": 2, **changes}
    x, weight, bias = (None if t is None else t.to(device) for t in list(given.values())[:3])
    groups = given["groups"]
    with backend("triton"), pytest.raises(NotImplementedError, match=words):
        conv2d_act(x, weight, bias, groups=groups)
    torch.testing.assert_close(
        conv2d_act(x, weight, bias, groups=groups), F.conv2d(x, weight, bias, groups=groups)
    )


@pytest.mark.parametrize(("channels", "refused"), [(8, True), (24, True), (16, False), (48, False)])
def test_a_product_takes_16_channels_of_a_window(channels: int, refused: bool) -> None:
    """Triton does not compile one of fewer, which the interpreter would run."""
    from vertebra.kernels._triton._conv import Site
    from vertebra.kernels._triton._conv_kernels import configurations

    shapes = ((1, 64, 4, 4), (1, channels, 4, 4), (64, channels, 3, 3))
    maps = (torch.empty(s, device="meta", memory_format=CL) for s in shapes)
    found = configurations(Site(*maps, None, (1, 1), (1, 1), (1, 1), 1), "tf32")
    assert found
    assert all(name.startswith("gather") for name in found) == refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
def test_the_interpreter_does_not_multiply_bf16() -> None:
    x, weight = X.bfloat16(), WEIGHT.bfloat16()
    y, path, reason = run(x, weight, groups=2)
    assert path == "eager"
    assert "bfloat16" in str(reason)
    assert y.dtype == torch.bfloat16


def test_autocast_casts_as_a_convolution_does(device) -> None:
    x, weight, bias = X.to(device), WEIGHT.to(device), VECTOR.to(device)
    residual = torch.randn(2, 12, 4, 3, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = conv2d_act(x, weight, bias, residual, groups=2)
    assert y.dtype == torch.bfloat16
    wanted = F.conv2d(x, weight, bias, groups=2) + residual
    torch.testing.assert_close(y.float(), wanted, atol=0.1, rtol=0.1)


def test_empty_batch(device) -> None:
    x = X.to(device)[:0]
    y, path, reason = run(x, WEIGHT.to(device), VECTOR.to(device), groups=2)
    assert y.shape == (0, 12, 4, 3)
    assert (path, reason) == ("eager", "empty input")


def test_nan_passes_through_relu(device) -> None:
    """It reaches the windows that have it, and no others."""
    x, weight = (torch.randn(n, 16, *s, device=device) for n, s in ((2, (6, 5)), (12, (3, 3))))
    x, weight = x.to(memory_format=CL), weight.to(memory_format=CL)
    x[1, 2, 3, 4] = float("nan")
    for name in ("triton:tiles", "triton:gather"):
        y = module.op(x, weight, *[None] * 3, *[(1, 1)] * 3, 1, "relu", "tf32", name)
        wanted = torch.zeros(2, 6, 5, dtype=torch.bool, device=device)
        wanted[1, 2:5, 3:5] = True
        assert torch.equal(y.isnan(), wanted[:, None].expand_as(y)), name


# ------------------------------------------------------------------------------------- candidates


def arguments(device, act: str = "relu") -> tuple:
    case = example("conv2d_act", shape=(2, 32, 6, 6), options=("k=40", "3x3", "pad=1"))
    inputs = case.inputs(device)
    return *inputs.values(), (1, 1), (1, 1), (1, 1), 1, act, "tf32", ""


def test_every_candidate_computes_the_same(device) -> None:
    args = arguments(device)
    names = module.candidates(*args)
    assert len(names) == len(set(names)) > 4
    assert "cudnn" in names
    assert {name.split(":")[1] for name in names if ":" in name} == {"tiles", "gather"}
    eager = module._eager(*args)
    truth = module._eager(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    for name in names:
        y = module.op(*args[:-1], name)
        assert_within_budget(name, y, eager, truth, 9 * 32)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("onemkl", "no candidate 'onemkl' .one of triton, cudnn"),
        ("triton:tiles:64", "'tiles:64' is no configuration"),
        ("triton:spirals", "'spirals' is no configuration; give tiles or gather"),
        ("triton:tiles:1x8x8x64x64:w4:s4", "channels are not blocks of 64"),
        ("triton:gather:64x64x32x2:w4:s3", "a bundle of 2 groups of 32 channels in 32"),
    ],
)
def test_a_candidate_that_cannot_run(name: str, words: str, device) -> None:
    with pytest.raises(NotImplementedError, match=words):
        module.op(*arguments(device)[:-1], name)


def test_blocks() -> None:
    """Half the block where that saves a quarter of the work."""
    found = {n: block(n, 128) for n in (3, 24, 40, 96, 112, 192, 448)}
    assert found == {3: 16, 24: 32, 40: 64, 96: 128, 112: 128, 192: 64, 448: 128}
    assert covered(112, 64) == 128


# ---------------------------------------------------------------------------------------- choices


@pytest.fixture
def table(device, tmp_path, monkeypatch):
    """Write a user's table, with what is given changed."""
    monkeypatch.setattr(_choices, "user_folder", lambda: tmp_path)
    name = _choices.device_name(device)
    path = _choices.file_of(tmp_path, "conv2d_act", name)

    def write(choices: object, **changes: object) -> None:
        content = {"schema": 1, "op": "conv2d_act", "choices": choices, **changes}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        _choices.forget()

    _choices.forget()
    yield write
    _choices.forget()


SITE = "8x6x5 > 12 3x3 groups 2 float32"


def chosen(device, N: int = 2, **kwargs) -> tuple[str, str | None]:
    x = torch.randn(N, 8, 6, 5, device=device).to(memory_format=CL)
    return run(x, WEIGHT.to(device), VECTOR.to(device), groups=2, **kwargs)[1:]


def test_what_is_measured_is_chosen(table, device) -> None:
    before = chosen(device)
    table({SITE: {"2": "cudnn", "64": "triton:gather:64x16x16x1:w4:s2"}})
    assert chosen(device)[0] == chosen(device, 8)[0] == "cudnn"
    assert "cudnn: measured to be the fastest on" in str(chosen(device)[1])
    assert chosen(device, 16) == ("triton", None)
    residual = torch.zeros(2, 12, 4, 3, device=device)
    assert chosen(device, residual=residual) == before  # another site


def test_what_cannot_run_is_passed_over(table, device) -> None:
    before = chosen(device)
    for name in ("triton:tiles:1x8x8x64x64:w4:s4", "triton:cubes", "gone"):
        table({SITE: {"2": name}})
        assert chosen(device)[0] == before[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2}, "its schema is 2, not 1"),
        ({"op": "conv3d"}, "it has no choices for conv2d_act"),
        ({"choices": {SITE: "cudnn"}}, "it has no candidates by batch"),
        ({"choices": {SITE: {"two": "cudnn"}}}, "a batch is no number"),
        ({"choices": {SITE: {"0": "cudnn"}}}, "a batch is not positive"),
    ],
)
def test_a_table_that_cannot_be_used_is_reported_and_ignored(changes, words, table, device) -> None:
    before = chosen(device)
    table(**{"choices": {}, **changes})
    with pytest.warns(RuntimeWarning, match=f"ignores the tuning table .*{words}. Tune again"):
        assert chosen(device) == before
    assert chosen(device) == before  # reported once


def test_a_corrupt_table_is_reported_and_ignored(table, device, tmp_path) -> None:
    table({})
    (path,) = tmp_path.glob("*/*.json")
    for content in (b"{", b"\xff\xfe", b"[]"):
        path.write_bytes(content)
        _choices.forget()
        with pytest.warns(RuntimeWarning, match="ignores the tuning table"):
            chosen(device)


def test_a_table_is_written_beside_what_it_has(table, device, tmp_path) -> None:
    name = _choices.device_name(device)
    for choices in ({SITE: {2: "triton"}}, {SITE: {4: "cudnn"}, "other": {1: "cudnn"}}):
        path = _choices.write("conv2d_act", name, choices, {"torch": torch.__version__})
    found = json.loads(path.read_text())
    assert found["choices"] == {SITE: {"2": "triton", "4": "cudnn"}, "other": {"1": "cudnn"}}
    assert [p.suffix for p in path.parent.iterdir()] == [".json"]
    assert chosen(device, 4)[0] == "cudnn"


def test_shipped_tables_are_read(device) -> None:
    for path in _choices.shipped_folder().glob("*/*.json"):
        assert _choices._read(path, path.parent.name)
