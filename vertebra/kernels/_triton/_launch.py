"""Launching: one door for every kernel, so that a launch can be looked at instead of run.

`captured()` records what launchers would launch. Launchers are pure functions of shapes, strides
and dtypes, so on meta tensors they yield exactly the kernels, arguments and configs that a GPU
would get: that is what the ahead-of-time gate compiles.

`recorded()` is the same for one thread, whose launches run or not: what `_replay` makes its plans
from.
"""

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


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Run `kernel` on `device`, which need not be the current one."""
    if _capture is not None:
        _capture.append(Launch(kernel, grid, arguments))
        return
    binary = None
    if _record.runs:
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            binary = kernel[grid](**arguments)
    if _record.launches is not None:
        _record.launches.append((Launch(kernel, grid, arguments), binary))
