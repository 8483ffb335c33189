"""The compile gate sees: what it must refuse is planted here, and refused."""

import importlib
import pkgutil
import sys
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from vertebra.kernels import _triton
from vertebra.kernels._triton import _aot
from vertebra.kernels._triton._launch import Launch, limits
from vertebra.testing import aot
from vertebra.testing.cases import OPS, Case, cases, example

pytestmark = pytest.mark.aot

PLANTED = Case("planted", (1, 1, 64, 64))


def build(kernel, target: str, *, num_warps: int = 4, **arguments) -> tuple[aot.Build, _aot.Binary]:
    launch = Launch(kernel, (1,), {**arguments, "num_warps": num_warps})
    built = aot.Build("", target, [(launch, PLANTED)])
    (binary,) = aot.make([built])
    return built, binary


def maps(count: int, *shape: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for _ in range(count)]


@triton.jit
def _copy(y_ptr, x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit(do_not_specialize=["n"])
def _copy_any(y_ptr, x_ptr, n, BLOCK: tl.constexpr):  # the mask may end anywhere
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def _normalise(y_ptr, x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.float32)
    tl.store(y_ptr + i, (x / tl.sum(x, axis=0)).to(y_ptr.dtype.element_ty))


@triton.jit
def _multiply(c_ptr, a_ptr, b_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i), input_precision=PRECISION)
    tl.store(c_ptr + i, product.to(c_ptr.dtype.element_ty))


@pytest.mark.jitted
def test_narrow_accesses_are_refused() -> None:
    y, x = maps(2, 1, 1, 64, 64)
    for target in ("sm_90", "gfx942"):
        good = build(_copy, target, y_ptr=y, x_ptr=x, n=4096, BLOCK=2048)
        assert aot.failures(*good) == []
        assert good[1].loads == {"x_ptr": 128}
        assert good[1].stores == {"y_ptr": 128}
        bad = build(_copy_any, target, y_ptr=y, x_ptr=x, n=4096, BLOCK=2048)
        assert aot.failures(*bad) == [
            f"loads x_ptr, stores y_ptr 16 bits at a time; {PLANTED.id} allows 128"
        ]
        odd = build(_copy, target, y_ptr=y[..., 1:], x_ptr=x[..., 1:], n=4032, BLOCK=2048)
        assert aot.failures(*odd) == []  # nothing better is possible at odd addresses
        assert odd[1].loads == {"x_ptr": 16}


@pytest.mark.jitted
def test_spills_are_refused() -> None:
    y, x = maps(2, 1, 1, 128, 128)
    for target in ("sm_80", "sm_90"):
        built, binary = build(_normalise, target, y_ptr=y, x_ptr=x, BLOCK=16384, num_warps=1)
        assert binary.stack > 0
        assert binary.spills > 0
        assert aot.failures(built, binary)[0].startswith("spills: ")


@pytest.mark.jitted
def test_resources_past_their_limit_are_refused() -> None:
    y, x = maps(2, 1, 1, 64, 64)
    built, binary = build(_copy, "sm_90", y_ptr=y, x_ptr=x, n=4096, BLOCK=2048)
    greedy = binary._replace(shared=1 << 20, widest_store=32, serialized=True)
    with patch.object(sys.modules[_copy.__module__], "REGISTERS", {"_copy": 8}, create=True):
        assert aot.failures(built, greedy) == [
            f"{1 << 20} bytes of shared memory, of {227 << 10}",
            f"{binary.registers} registers, of 8",
            "stores at most 32 bits at a time in the final code: not {'y_ptr': 128}",
            "ptxas has serialized its wgmmas",
        ]


@pytest.mark.jitted
def test_ptxas_is_told_of_a_limit() -> None:
    y, x = maps(2, 1, 1, 64, 64)
    launch = Launch(_copy, (1,), {"y_ptr": y, "x_ptr": x, "n": 4096, "BLOCK": 2048})
    with patch.object(sys.modules[_copy.__module__], "MAXNREG", {"_copy": 24}, create=True):
        assert _aot.specialise(launch, _aot.TARGETS["sm_90"])[1].maxnreg == 24
        assert "maxnreg" not in vars(_aot.specialise(launch, _aot.TARGETS["gfx942"])[1])
        assert limits(_copy, "cuda") == {"maxnreg": 24}  # what a launch adds on a GPU
    assert _aot.specialise(launch, _aot.TARGETS["sm_90"])[1].maxnreg is None


@pytest.mark.jitted
def test_dots_must_be_on_tensor_cores() -> None:
    for target in _aot.TARGETS:
        c, a, b = maps(3, 64, 64)
        built, binary = build(
            _multiply, target, c_ptr=c, a_ptr=a, b_ptr=b, SIZE=64, PRECISION="ieee"
        )
        assert binary.dots == 1
        assert binary.matrix > 0
        assert aot.failures(built, binary) == []
        (failure,) = aot.failures(built, binary._replace(matrix=0))
        assert failure.startswith("1 dots and no matrix instruction")
    c, a, b = maps(3, 64, 64, dtype=torch.float32)
    for precision, dots in (("tf32", 1), ("ieee", 0)):
        _, binary = build(
            _multiply, "sm_90", c_ptr=c, a_ptr=a, b_ptr=b, SIZE=64, PRECISION=precision
        )
        assert binary.dots == dots


def _real(value):
    """Put memory under meta tensors, of the same shapes, strides and offsets."""
    if isinstance(value, tuple):
        return tuple(map(_real, value))
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(value.untyped_storage().nbytes() // value.itemsize, dtype=value.dtype)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.mark.jitted
def test_a_launch_is_specialised_as_by_the_jit() -> None:
    from triton.runtime.driver import driver

    for name in ("sm_90", "gfx942"):
        target = _aot.TARGETS[name]
        device = SimpleNamespace(
            get_current_target=lambda gpu=target.gpu: gpu,
            get_current_device=lambda name=name: name,
            get_current_stream=lambda _: 0,
        )
        driver.set_active(device)
        for op in OPS:
            for layout in ("nhwc", "sliced"):
                case = example(op, shape=(2, 24, 1, 16), dtype=torch.bfloat16, layout=layout)
                for launch in aot.launches(case):
                    jitted = []
                    kernel = launch.kernel
                    kernel.device_caches[name]  # creates what the next line replaces
                    kernel.compile = lambda source, target, options, to=jitted: to.append(
                        (source.hash(), source.signature, source.constants, source.attrs, options)
                    )
                    arguments = {k: _real(v) for k, v in launch.arguments.items()}
                    limit = limits(kernel, target.gpu.backend)
                    kernel.run(grid=launch.grid, warmup=True, **arguments, **limit)
                    source, options = _aot.specialise(launch, target)
                    ours = (source.hash(), source.signature, source.constants, source.attrs)
                    assert jitted == [(*ours, vars(options))]
                    kernel.device_caches.clear()


@pytest.mark.jitted
def test_every_kernel_is_compiled() -> None:
    modules = [
        importlib.import_module(f"{_triton.__name__}.{module.name}")
        for module in pkgutil.iter_modules(_triton.__path__)
        if module.name != "_fma"  # a yardstick, and no op's: tests of ceilings compile it
    ]
    kernels = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    compiled = aot.builds(["sm_90"], aot.declared())
    assert kernels == {build.launch.kernel.__name__ for build in compiled}


@pytest.mark.jitted
def test_a_sample_has_every_kind_of_binary() -> None:
    def kinds(some):
        return {(b.target, *b.row[:2]) for b in some}

    def types(some):
        return {(b.target, b.row, b.functions) for b in some}

    targets = ["sm_80", "sm_90", "gfx942"]
    everything = aot.builds(targets, cases("aot", "batch_norm_act")[::3])
    chosen = list(aot.sample(everything, ["gfx942"], ["sm_90"]))
    whole, typed, sampled = ([b for b in chosen if b.target == target] for target in targets)
    assert whole == [b for b in everything if b.target == "sm_80"]
    assert types(typed) == types(b for b in everything if b.target == "sm_90")
    assert kinds(sampled) == kinds(b for b in everything if b.target == "gfx942")
    assert len(kinds(sampled)) == len(sampled) < len(types(typed)) == len(typed) < len(whole)


@pytest.mark.jitted
def test_the_command_judges_and_a_second_run_compiles_nothing() -> None:
    with TemporaryDirectory() as cache:
        command = ["--targets", "sm_90", "--filter", "_apply_kernel _none", "--cache", cache]
        command += ["--jobs", "1"]  # each is a process that has to import
        some = cases("aot", "scale_bias_act")
        with patch.object(aot, "declared", lambda: some):
            assert aot.main(command) == 0
            with patch.object(aot, "ProcessPoolExecutor", None):
                assert aot.main([*command, "-v"]) == 0
                with patch.object(aot, "failures", lambda *_: ["planted"]):
                    assert aot.main(command) == 1


def test_the_command_refuses_the_interpreter(monkeypatch, capsys) -> None:
    monkeypatch.setattr(aot, "INTERPRETED", True)
    with pytest.raises(SystemExit) as stopped:
        aot.main([])
    assert stopped.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
