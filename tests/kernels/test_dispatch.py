"""Which path an op takes, and what it says about it."""

import io
import json
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

import vertebra
from vertebra.kernels import _op, backend, current_backend, layer_norm_2d, scale_bias_act
from vertebra.testing.cases import OPS, example


def paths(call) -> list[tuple[str, str | None]]:
    """Run `call` and return the path and reason of every op call in it."""
    seen: list[tuple[str, str | None]] = []
    with _op.observe(lambda c: seen.append((c.path, c.reason))):
        call()
    return seen


def test_backend_nests_and_restores_after_an_error() -> None:
    before = current_backend()
    with backend("triton"):
        with backend("eager"):
            assert current_backend() == "eager"
        assert current_backend() == "triton"
        with pytest.raises(RuntimeError, match="inside"), backend("eager"):
            raise RuntimeError("inside")
        assert current_backend() == "triton"
    assert current_backend() == before


def test_backend_decorates_and_can_be_reused() -> None:
    eager = backend("eager")
    with eager, eager:
        assert current_backend() == "eager"
    assert eager(current_backend)() == "eager"
    assert current_backend() == "auto"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"must be one of auto, triton, eager; got 'cuda'"):
        backend("cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "expected"), [("eager", 0), ("fast", 1)])
def test_environment_sets_the_initial_backend(value: str, expected: int) -> None:
    code = "import vertebra.kernels as k; print(k.current_backend())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "VERTEBRA_BACKEND": value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == expected
    assert (
        value if expected == 0 else "VERTEBRA_BACKEND must be one of"
    ) in run.stdout + run.stderr


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_triton_here(op: str, device: torch.device) -> None:
    case = example(op)
    assert paths(lambda: case.run(case.inputs(device))) == [("triton", None)]


@pytest.mark.parametrize("op", OPS)
def test_refusals(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that Triton refuses runs in eager under auto; forced, it raises with op and reason."""
    case = example(op)
    meta = case.inputs("meta")
    empty = example(op, shape=(0, 3, 4, 5)).inputs(device)
    for inputs, words in ((meta, "device meta"), (empty, "empty input")):
        ((path, reason),) = paths(lambda case=case, inputs=inputs: case.run(inputs))
        assert path == "eager"
        assert words in str(reason)
        with backend("triton"), pytest.raises(NotImplementedError, match=f"{op}.*{words}"):
            case.run(inputs)
    monkeypatch.setattr(_op, "_TRITON_INSTALLED", False)
    assert paths(lambda: case.run(case.inputs(device))) == [("eager", "triton is not installed")]


@pytest.mark.parametrize("op", OPS)
def test_vectors_with_strides(op: str, device: torch.device) -> None:
    """Kernels index vectors densely; others are refused, or made dense, and give the same."""
    case = example(op)
    inputs = case.inputs(device)
    strided = {
        k: torch.stack([v, v], 1)[:, 0] if v is not None and v.dim() == 1 else v
        for k, v in inputs.items()
    }
    with backend("eager"):
        expected = case.run(inputs)["y"]
    seen = paths(lambda: torch.testing.assert_close(case.run(strided)["y"], expected))
    if any(v is not None and v.dim() == 1 and k != "noise" for k, v in inputs.items()):
        assert seen == [("eager", "a vector that is not contiguous")]


def test_what_is_not_plain_goes_through_the_dispatcher(device: torch.device) -> None:
    """A negation that PyTorch has put off is made up for before a kernel reads the memory."""
    case = example("scale_bias_act")
    inputs = case.inputs(device)
    x = inputs["x"]
    assert x is not None
    inputs["x"] = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert inputs["x"].is_neg()
    torch.testing.assert_close(case.run(inputs)["y"], case.run(case.inputs(device))["y"])


def test_forward_mode_runs_in_eager(device: torch.device) -> None:
    """No kernel drops a tangent, not even where nothing else wants a gradient."""
    x, tangent = torch.randn(2, 2, 4, 3, 3, device=device).unbind()
    layer_norm_2d(x)
    with forward_ad.dual_level():
        y = layer_norm_2d(forward_ad.make_dual(x, tangent))
        primal, found = forward_ad.unpack_dual(y)
        with backend("triton"), pytest.raises(NotImplementedError, match="forward-mode"):
            layer_norm_2d(forward_ad.make_dual(x, tangent))
    assert found is not None
    step = 1e-3
    with backend("eager"):
        ends = [layer_norm_2d(x.double() + s * step * tangent.double()) for s in (1, -1)]
    torch.testing.assert_close(
        found.double(), (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(primal, layer_norm_2d(x))


def test_a_map_past_32_bits_is_refused() -> None:
    """2^31 pixels and more do not fit the kernels' pixel index; offsets themselves are 64-bit."""

    class Huge(torch.Tensor):
        def numel(self):
            return 2**31 * 3

    x = torch.ones(1, 3, 2, 2).as_subclass(Huge)
    if torch.cuda.is_available():
        x = x.cuda()
    assert "32-bit" in str(_op.refuses(x))


def test_compiled_code_guards_on_the_backend(device: torch.device) -> None:
    torch._dynamo.reset()
    counters.clear()
    case = example("scale_bias_act")
    inputs = case.inputs(device)
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    on_triton = compiled(inputs)["y"]
    with backend("eager"):
        in_eager = compiled(inputs)["y"]
        plain = case.run(inputs)["y"]
    again = compiled(inputs)["y"]
    assert torch.equal(in_eager, plain)
    assert torch.equal(on_triton, again)
    assert counters["stats"]["unique_graphs"] == 2


def test_backend_inside_compiled_code(device: torch.device) -> None:
    torch._dynamo.reset()
    x, scale = torch.randn(2, 3, 4, 5, device=device), torch.rand(3, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x: torch.Tensor) -> torch.Tensor:
        with backend("eager"):
            return scale_bias_act(x, scale, None, act="relu")

    assert torch.equal(f(x), torch.relu(x * scale[:, None, None]))
    assert current_backend() == "auto"


def test_through_inductor(device: torch.device) -> None:
    torch._dynamo.reset()
    case = example("batch_norm_act", layout="nhwc")
    compiled = torch.compile(lambda i: case.run(i)["y"].sin().sum(), fullgraph=True)

    def gradients(call) -> tuple[torch.Tensor, ...]:
        inputs = case.inputs(device)
        leaves = [inputs[n].requires_grad_() for n in ("x", "weight", "bias", "residual")]
        return torch.autograd.grad(call(inputs), leaves)

    plain = gradients(lambda i: case.run(i)["y"].sin().sum())
    for found, expected in zip(gradients(compiled), plain, strict=True):
        torch.testing.assert_close(found, expected)


def test_explain_changes_nothing(device: torch.device) -> None:
    model = torch.nn.Sequential(
        vertebra.nn.ConvNormAct(3, 8, 3, device=device),
        torch.nn.Dropout(),
        vertebra.nn.ConvNormAct(8, 4, 1, device=device),
    )
    x = torch.randn(2, 3, 6, 6, device=device)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    sites = vertebra.explain(model, x)
    assert [(s.module, s.op) for s in sites] == [
        ("0.bn", "batch_norm_act"),
        ("2.bn", "batch_norm_act"),
    ]
    assert sites[0].bytes == 3 * 2 * 8 * 6 * 6 * 4
    assert sites[0].floor_us > 0
    assert "2 of 2 sites on Triton" in str(sites)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with backend("eager"):
        assert {s.reason for s in vertebra.explain(model.eval(), x)} == {"backend is set to eager"}


def test_explain_says_what_is_left_alone(device: torch.device) -> None:
    model = torch.nn.Sequential(
        vertebra.nn.ConvNormAct(3, 8, 3), torch.nn.Conv2d(8, 8, 1), torch.nn.BatchNorm2d(8)
    ).to(device)
    found = vertebra.explain(model, torch.randn(2, 3, 6, 6, device=device), bandwidth=1e9)
    assert [(site.name, site.cls) for site in found.left] == [
        ("2", "torch.nn.modules.batchnorm.BatchNorm2d")
    ]
    assert "left alone: BatchNorm2d (2): no block here fuses it" in str(found)
    data = found.to_dict()
    assert [site["module"] for site in data["sites"]] == ["0.bn"]
    assert json.loads(json.dumps(data)) == data


def test_explain_prints_with_rich(device: torch.device) -> None:
    rich = pytest.importorskip("rich.console")
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), vertebra.nn.BatchNormAct2d(3)).to(device)
    out = io.StringIO()
    x = torch.randn(2, 3, 6, 6, device=device)
    rich.Console(width=120, file=out).print(vertebra.explain(model, x, bandwidth=1e9))
    assert "batch_norm_act" in out.getvalue()
    assert "left alone: BatchNorm2d (0): no block here fuses it" in out.getvalue()
