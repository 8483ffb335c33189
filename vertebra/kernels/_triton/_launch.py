"""Launching: one door for every kernel, so that a launch can be looked at instead of run.

`captured()` records what launchers would launch. Launchers are pure functions of shapes, strides
and dtypes, so on meta tensors they yield exactly the kernels, arguments and configs that a GPU
would get: that is what the ahead-of-time gate compiles.
"""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One launch: the jitted kernel, its grid and its keyword arguments (num_warps among them)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


_capture: list[Launch] | None = None


@contextmanager
def captured() -> Generator[list[Launch]]:
    """Record launches instead of running them."""
    global _capture
    outer, _capture = _capture, []
    try:
        yield _capture
    finally:
        _capture = outer


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Run `kernel` on `device`, which need not be the current one."""
    if _capture is not None:
        _capture.append(Launch(kernel, grid, arguments))
        return
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](**arguments)
