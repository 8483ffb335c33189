"""What runs here: every way that can be missing, with what to do about it; the report as data."""

import sysconfig
from functools import partial
from typing import Any

import pytest
import torch

import vertebra
from vertebra._cli import _paths
from vertebra._cli._paths import DTYPES, refusals, ways
from vertebra.bench import ceilings
from vertebra.kernels import _op
from vertebra.kernels.layer_norm_2d import op as norm
from vertebra.testing.cases import OPS

CPU = torch.device("cpu")


def found(device: torch.device = CPU) -> dict[str, Any]:
    return {way.name: way for way in ways(device)}


@pytest.fixture
def without(monkeypatch):
    """Hide packages."""

    def hide(*names: str) -> None:
        monkeypatch.setattr(_paths, "_has", lambda module: module not in names)

    return hide


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(ceilings, "measure", partial(ceilings.measure, tiny=True))


# ------------------------------------------------------------------------------------ the ways


def test_plain_pytorch_is_always_there() -> None:
    assert found()["plain PyTorch"].why_not is None


def test_every_way_says_something() -> None:
    names = [way.name for way in ways(CPU)]
    assert len(names) == len(set(names))
    assert all(way.note for way in ways(CPU))


def test_no_triton(without) -> None:
    without("triton")
    assert found()["Triton's interpreter"].why_not == "triton is not installed"


@pytest.mark.parametrize(
    ("cuda", "said"), [(None, "is a build for CPUs"), ("13.0", "finds no GPU")]
)
def test_no_gpu(cuda: str | None, said: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    way = found()["Triton kernels on a GPU"]
    assert way.why_not is not None
    assert way.why_not.endswith(said)


@pytest.mark.parametrize(
    ("system", "fix"), [("Linux", "pip install triton"), ("Darwin", "Triton needs Linux")]
)
def test_a_gpu_without_triton(system: str, fix: str, without, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_paths.platform, "system", lambda: system)
    assert found()["Triton kernels on a GPU"].why_not is None
    without("triton")
    assert found()["Triton kernels on a GPU"][1:] == ("triton is not installed", fix)
    assert _paths._inductor(torch.device("cuda")).why_not == "Inductor needs triton on a GPU"


def test_the_interpreter_is_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(_paths, "INTERPRETED", True)
    assert found()["Triton's interpreter"].why_not is None
    monkeypatch.setattr(_paths, "INTERPRETED", False)
    assert found()["Triton's interpreter"].why_not == "TRITON_INTERPRET is not set"


def test_no_compiler(monkeypatch) -> None:
    from torch._inductor import cpp_builder

    def refuse() -> str:
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert found()["torch.compile"][1:] == (
        "Python.h is missing, which Inductor compiles with",
        "apt install python3-dev",
    )
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", refuse)
    assert found()["torch.compile"].why_not == "Inductor finds no C++ compiler"


def test_a_compiler(monkeypatch, tmp_path) -> None:
    from torch._inductor import cpp_builder

    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert found()["torch.compile"][1:] == (None, "Inductor, with c++")


def test_no_onednn(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert found()["oneDNN convolutions"].why_not == "this torch was built without oneDNN"


@pytest.mark.parametrize(
    ("supported", "amx", "avx512", "why_not", "note"),
    [
        (False, False, False, "it has no AVX-512", "fp32 is the faster type here"),
        (True, False, False, "it has neither AVX512-BF16 nor AMX", "it works, and fp32 is as fast"),
        (True, False, True, None, "channels_last, with AVX512-BF16"),
        (True, True, True, None, "channels_last, with AMX and AVX512-BF16"),
    ],
)
def test_bf16_on_a_cpu(supported, amx, avx512, why_not, note, monkeypatch) -> None:
    monkeypatch.setattr(_paths, "_has_onednn_bf16", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert found()["bf16 on this CPU"][1:] == (why_not, note)


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu(capability: tuple[int, int], has: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    on_gpu = found(torch.device("cuda"))
    assert (on_gpu["bf16 on this GPU"].why_not is None) == has
    assert on_gpu["cuDNN convolutions"].why_not == "this torch was built without cuDNN"
    assert "oneDNN convolutions" not in on_gpu


@pytest.mark.parametrize(
    ("name", "module", "fix"),
    [
        ("Hugging Face hub", "huggingface_hub", "pip install 'vertebra[hub]'"),
        ("photographs", "PIL", "pip install 'vertebra[cli]'"),
    ],
)
def test_what_is_to_install(name: str, module: str, fix: str, without) -> None:
    without(module)
    assert found()[name][1:] == (f"{module} is not installed", fix)


# ------------------------------------------------------------------------------------- the ops


def test_ops_say_what_they_refuse(device) -> None:
    with vertebra.backend("auto"):
        free = refusals(device)
    assert list(free) == list(OPS)
    assert {tuple(by_dtype) for by_dtype in free.values()} == {tuple(DTYPES)}
    assert all(by_dtype[name] is None for by_dtype in free.values() for name in ("fp32", "fp16"))
    refusing_bf16 = RefusingBf16(norm.refuses)
    object.__setattr__(norm, "refuses", refusing_bf16)  # an op is frozen
    try:
        with vertebra.backend("triton"):  # which would raise, and here says why
            refused = refusals(device)
    finally:
        object.__setattr__(norm, "refuses", refusing_bf16.refuses)
    free["layer_norm_2d"]["bf16"] = "bf16 is refused"
    assert refused == free


class RefusingBf16:
    """What an op refuses, and bf16."""

    def __init__(self, refuses) -> None:
        self.refuses = refuses

    def __call__(self, x: torch.Tensor, *rest: Any) -> str | None:
        return "bf16 is refused" if x.dtype == torch.bfloat16 else self.refuses(x, *rest)


def test_ops_are_set_to_eager() -> None:
    with vertebra.backend("eager"):
        said = {reason for by_dtype in refusals(CPU).values() for reason in by_dtype.values()}
    assert said == {"backend is set to eager"}


def test_where_no_kernel_runs_every_op_says_the_same(monkeypatch) -> None:
    """And not what keeps a call from some other candidate."""
    monkeypatch.setattr(_op, "INTERPRETED", False)
    with vertebra.backend("auto"):
        found = refusals(CPU)
    said = {reason for by_dtype in found.values() for reason in by_dtype.values()}
    assert len(said) == 1
    assert "device cpu" in str(said.pop())


# ------------------------------------------------------------------------------- the command


def test_what_json_has(read, quick) -> None:
    report = read("env", "--device", "cpu")
    assert list(report) == ["environment", "gpus", "ways", "ops", "ceilings"]
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["vertebra"] == vertebra.__version__
    assert {"python", "system", "triton", "timm", "device", "backend"} <= set(report["environment"])
    assert {tuple(way) for way in report["ways"]} == {("name", "why_not", "note")}
    assert set(report["ops"]) == set(OPS)
    assert set(report["ceilings"]["matmul_flops_per_s"]) == {"fp32", "bf16", "fp16"}
    assert read("env", "--device", "cpu", "--no-measure")["ceilings"] is None


def test_people_read_it(run, quick) -> None:
    text = run("env", "--device", "cpu").stdout
    rows = [line.split() for line in text.splitlines()]
    assert ["torch", torch.__version__] in rows
    assert ["backend", "eager,", "by", "VERTEBRA_BACKEND"] in rows
    for way in ways(CPU):
        row = next(line for line in text.splitlines() if way.name in line)
        assert row.split()[0] == ("yes" if way.why_not is None else "no")
        assert way.note in " ".join(text.split())  # it may be wrapped
    for op in OPS:
        assert [op, *["PyTorch", "1"] * len(DTYPES)] in rows
    assert "1  not on Triton: backend is set to eager" in text
    assert "matrix product, bf16" in text
    assert "matrix product" not in run("env", "--device", "cpu", "--no-measure").stdout


def test_a_speed_that_cannot_be_measured_is_said(read, run, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ceilings, "measure", fail)
    assert read("env", "--device", "cpu")["ceilings"] == "RuntimeError: out of memory"
    text = run("env", "--device", "cpu").stdout
    assert "The speed cannot be measured: RuntimeError: out of memory" in text


def test_gpus_are_named(run, monkeypatch) -> None:
    from types import SimpleNamespace

    gpu = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 * 2**30
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    text = run("env", "--device", "cpu", "--no-measure").stdout
    for i in (0, 1):
        assert f"GPU {i}" in text
    assert text.count("NVIDIA H200, 140 GiB, 132 multiprocessors, capability 9.0") == 2


def test_a_device_that_is_not_there(refused) -> None:
    assert "device must be like cpu, cuda or cuda:1; got 'gpu'" in refused("env", "--device", "gpu")
