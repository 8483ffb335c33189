"""Launching: one door for every kernel, so that a launch can be looked at instead of run.

`captured()` records what launchers would launch. Launchers are pure functions of shapes, strides
and dtypes, so on meta tensors they yield exactly the kernels, arguments and configs that a GPU
would get: that is what the ahead-of-time gate compiles.

`recorded()` is the same for one thread, whose launches run or not: what `_replay` makes its plans
from.
"""

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One launch: the jitted kernel, its grid and its keyword arguments (num_warps among them)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class _Record(threading.local):
    """The launches of this thread, each with the binary that served it, None where it did not run.

    Autograd's backward pass has threads of its own, whose launches belong to nobody else's record.
    """

    launches: list[tuple[Launch, Any]] | None = None
    runs: bool = True


_capture: list[Launch] | None = None
_record = _Record()


@contextmanager
def captured() -> Generator[list[Launch]]:
    """Record launches, of every thread, instead of running them."""
    global _capture
    outer, _capture = _capture, []
    try:
        yield _capture
    finally:
        _capture = outer


def observed() -> bool:
    """Return whether launches are looked at instead of run, or this thread's are recorded."""
    return _capture is not None or _record.launches is not None


@contextmanager
def recorded(*, runs: bool = True) -> Generator[list[tuple[Launch, Any]]]:
    """Record this thread's launches, each with the binary that served it; None if not `runs`."""
    outer = _record.launches, _record.runs
    found: list[tuple[Launch, Any]] = []
    _record.launches, _record.runs = found, runs
    try:
        yield found
    finally:
        _record.launches, _record.runs = outer


def granted(kernel: Any, table: str) -> int | None:
    """Return what the table of that name in the kernel's module has for it, if it is there."""
    return getattr(sys.modules[kernel.__module__], table, {}).get(kernel.__name__)


def limits(kernel: Any, backend: str) -> dict[str, int]:
    """Return the option that keeps `kernel` to the registers in `MAXNREG` of its module, if any.

    Left to itself, ptxas aims at an occupancy of its own: a kernel that needs nearly what its
    programs were counted from may get more, or spill. Told, it schedules for all that it may have,
    which for other kernels is what makes it spill. Triton has no such option for AMD.
    """
    most = granted(kernel, "MAXNREG")
    return {} if most is None or backend != "cuda" else {"maxnreg": most}


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Run `kernel` on `device`, which need not be the current one."""
    if _capture is not None:
        _capture.append(Launch(kernel, grid, arguments))
        return
    binary = None
    if _record.runs:
        backend = "cuda" if device.type == "cuda" and torch.version.hip is None else device.type
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            binary = kernel[grid](**arguments, **limits(kernel, backend))
    if _record.launches is not None:
        _record.launches.append((Launch(kernel, grid, arguments), binary))
