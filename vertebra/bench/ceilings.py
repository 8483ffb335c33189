"""What a machine can do at best, measured in the run that is compared with it.

* a copy, larger than any cache: bytes read and written per second;
* a square matrix product in each dtype, by whatever library PyTorch has for it;
* fp32 multiply-adds outside of tensor cores, which bound depthwise convolutions: a kernel of
  nothing else on a GPU, the fp32 product on a CPU.

Each is the best of several samples: a ceiling that something else held down would flatter us.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .clock import Clock, Step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SAMPLES = 10
_LONG_S = 5e-3


@dataclass(frozen=True)
class Ceilings:
    """Rates per second; a multiply-add is two floating-point operations.

    Attributes:
        copy_bytes_per_s: read and written.
        matmul_flops_per_s: by dtype: "fp32", "bf16", "fp16", and on a GPU "tf32", which is what
            cuDNN computes fp32 convolutions in unless it is told otherwise.
        fma_flops_per_s: in fp32, outside of tensor cores.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]
    fma_flops_per_s: float

    def floor_ms(self, bytes: float = 0.0, flops: float = 0.0, dtype: str = "fp32") -> float:
        """Return the least time for moving `bytes` while `flops` are done as matrix products."""
        moving, computing = bytes / self.copy_bytes_per_s, 0.0
        if flops:
            rates = self.matmul_flops_per_s
            computing = flops / rates["tf32" if dtype == "fp32" and "tf32" in rates else dtype]
        return 1e3 * max(moving, computing)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON; `Ceilings(**data)` is the way back."""
        return asdict(self)


def measure(
    device: torch.device,
    dtypes: Sequence[str] = ("fp32", "bf16", "fp16"),
    *,
    tiny: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Ceilings:
    """Measure the ceilings of `device`.

    Args:
        device: a GPU takes about five seconds, a CPU two.
        dtypes: of matrix products; fp32 is always there, and on a GPU tf32.
        tiny: sizes that fit the cache, for a quick try; the rates then mean nothing.
        say: told what comes next.
    """
    gpu = device.type == "cuda"
    say("ceilings: copy")
    copy = _copy(device, 2**20 if tiny else 2**30 if gpu else 2**28)
    sizes = (64,) if tiny else (8192,) if gpu else (128, 256, 512, 1024)
    rates: dict[str, float] = {}
    always = ("fp32", "tf32") if gpu else ("fp32",)
    for name in (*always, *(name for name in dtypes if name not in always)):
        say(f"ceilings: matrix product, {name}")
        rates[name] = _matmul(device, name, sizes)
    say("ceilings: multiply-adds")
    return Ceilings(copy, rates, _multiply_adds(device, tiny) if gpu else rates["fp32"])


def _copy(device: torch.device, size: int) -> float:
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda _: {"copy": target.copy_(source)}, device)


def _matmul(device: torch.device, name: str, sizes: Sequence[int]) -> float:
    """Return the best rate up to the first size whose product takes long."""
    dtype = DTYPES.get(name, torch.float32)
    rate = 0.0
    with _fp32_products_in("tf32" if name == "tf32" else "ieee"):
        for size in sizes:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            seconds = _seconds(lambda _, a=a, b=b: {"y": a @ b}, device)
            rate = max(rate, 2 * size**3 / seconds)
            if seconds > _LONG_S:
                break
    return rate


def _multiply_adds(device: torch.device, tiny: bool = False) -> float:
    from ..kernels._triton import _fma

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs, rounds = (processors, 8) if tiny else (64 * processors, 128)
    x, y = _fma.inputs(programs, device)
    flops = _fma.repeat(y, x, 0.999, 0.001, rounds)

    def step(_: int) -> dict[str, torch.Tensor]:
        _fma.repeat(y, x, 0.999, 0.001, rounds)
        return {"y": y}

    return flops / _seconds(step, device)


def _seconds(step: Step, device: torch.device) -> float:
    """Return the seconds of a call in the fastest sample."""
    clock = Clock(device, short=True)
    with clock.stream(), torch.no_grad():
        step(0)
        timer = clock.timer(step)
        return min(timer.sample(0) for _ in range(_SAMPLES)) / 1e3


@contextmanager
def _fp32_products_in(precision: str) -> Generator[None]:
    """Let cuBLAS compute fp32 matrix products in "ieee" or "tf32"."""
    outer = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = outer
