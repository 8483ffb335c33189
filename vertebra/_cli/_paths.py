"""Which ways there are for a network to run here, and for each that there is not, what to do."""

from __future__ import annotations

import importlib.util
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..kernels import backend, current_backend
from ..kernels._op import INTERPRETED, Call, observe
from ..testing.cases import OPS, example
from ..testing.contract import upcast

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class Way(NamedTuple):
    """A way to run: what it is, why it is not here (None if it is), and what to do or to know."""

    name: str
    why_not: str | None
    note: str


def ways(device: torch.device) -> Iterator[Way]:
    """Yield the ways, those that make a network fast first."""
    yield _triton_on_a_gpu()
    yield _interpreter()
    yield Way("plain PyTorch", None, "every op has its definition; what is not on Triton runs it")
    yield _inductor(device)
    if device.type == "cuda":
        yield _cudnn()
        yield _bf16_on_a_gpu(device)
    else:
        yield _onednn()
        yield _bf16_on_a_cpu()
    yield _installed(
        "Hugging Face hub", "huggingface_hub", "hub", "weights by their id, OWNER/NAME"
    )
    yield _installed("photographs", "PIL", "cli", "`vertebra predict`")


def _triton_on_a_gpu() -> Way:
    name = "Triton kernels on a GPU"
    if torch.cuda.is_available():
        if _has("triton"):
            return Way(name, None, "the fast way")
        fix = "pip install triton" if platform.system() == "Linux" else "Triton needs Linux"
        return Way(name, "triton is not installed", fix)
    if torch.version.cuda is None and torch.version.hip is None:
        why = f"torch {torch.__version__} is a build for CPUs"
        return Way(name, why, "on a machine with a GPU: https://pytorch.org/get-started/locally")
    why = f"torch {torch.__version__} finds no GPU"
    return Way(name, why, "see what nvidia-smi says, and CUDA_VISIBLE_DEVICES")


def _interpreter() -> Way:
    name = "Triton's interpreter"
    if not _has("triton"):
        return Way(name, "triton is not installed", "pip install triton, on Linux")
    if INTERPRETED:
        return Way(name, None, "kernels run on tensors of the CPU: for tests, and slow")
    return Way(name, "TRITON_INTERPRET is not set", "TRITON_INTERPRET=1 tests kernels on a CPU")


def _inductor(device: torch.device) -> Way:
    from torch._inductor.cpp_builder import get_cpp_compiler

    name = "torch.compile"
    if device.type == "cuda" and not _has("triton"):
        return Way(name, "Inductor needs triton on a GPU", "pip install triton")
    try:
        compiler = Path(get_cpp_compiler()).name
    except Exception:  # Inductor looks into several places, each with errors of its own
        return Way(name, "Inductor finds no C++ compiler", "apt install g++, or set CXX")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return Way(
            name, "Python.h is missing, which Inductor compiles with", "apt install python3-dev"
        )
    return Way(name, None, f"Inductor, with {compiler}")


def _onednn() -> Way:
    name = "oneDNN convolutions"
    if not torch.backends.mkldnn.is_available():
        return Way(name, "this torch was built without oneDNN", "pip install torch's own wheel")
    return Way(name, None, f"with {torch.backends.cpu.get_cpu_capability()}")


def _bf16_on_a_cpu() -> Way:
    name = "bf16 on this CPU"
    if not _has_onednn_bf16():
        return Way(name, "it has no AVX-512", "fp32 is the faster type here")
    units = {
        "AMX": torch.cpu._is_amx_tile_supported(),  # pyright: ignore[reportPrivateUsage]
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),  # pyright: ignore[reportPrivateUsage]
    }
    found = [unit for unit, has in units.items() if has]
    if not found:
        return Way(name, "it has neither AVX512-BF16 nor AMX", "it works, and fp32 is as fast")
    return Way(name, None, f"channels_last, with {' and '.join(found)}")


def _has_onednn_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _cudnn() -> Way:
    if not torch.backends.cudnn.is_available():
        return Way(
            "cuDNN convolutions",
            "this torch was built without cuDNN",
            "pip install torch's own wheel",
        )
    return Way("cuDNN convolutions", None, f"cuDNN {torch.backends.cudnn.version()}")


def _bf16_on_a_gpu(device: torch.device) -> Way:
    major, minor = torch.cuda.get_device_capability(device)
    if torch.version.cuda and major < 8:
        return Way(
            "bf16 on this GPU",
            f"compute capability {major}.{minor} has none",
            "fp16 is the faster type here",
        )
    return Way("bf16 on this GPU", None, f"compute capability {major}.{minor}")


def _installed(name: str, module: str, extra: str, note: str) -> Way:
    if _has(module):
        return Way(name, None, note)
    return Way(name, f"{module} is not installed", f"pip install 'vertebra[{extra}]'")


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


class _Stopped(Exception):
    """Raised where an op is about to run, with the path it would take."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def refusals(device: torch.device) -> dict[str, dict[str, str | None]]:
    """Return, by op and dtype, why a sample call would not run on Triton; None if it would."""
    return {op: {name: _refusal(op, dtype, device) for name, dtype in DTYPES.items()} for op in OPS}


def _refusal(op: str, dtype: torch.dtype, device: torch.device) -> str | None:
    def stop(call: Call) -> None:
        raise _Stopped(call)

    case = example(op, dtype=dtype)
    # a call that "triton" would refuse is to say why
    setting = "eager" if current_backend() == "eager" else "auto"
    try:
        with observe(stop), backend(setting):
            inputs = case.inputs(device)
            case.run(upcast(inputs) if dtype == torch.float64 else inputs)
    except _Stopped as stopped:
        call = stopped.call
        if call.path == "triton" or setting == "eager":
            return call.reason
        # an op of several candidates says why none of them, or this one: Triton's own reason first
        return call.op.refuses(*call.args) or call.reason
    raise AssertionError(f"{case.id} called no op")
