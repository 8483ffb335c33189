"""The memory that a call holds at its peak."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

_profiler: Any = importlib.import_module("torch._C._profiler")
_autograd: Any = importlib.import_module("torch._C._autograd")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes held at once of all that a call allocates on `device`.

    Whatever PyTorch's allocator hands out counts, whether or not it becomes a tensor: outputs,
    copies inside of operations, the scratch memory of libraries. What was there before, as weights
    and their packed copies, does not. On a CPU it is what the calling thread allocates.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    for size in _allocations(call):
        held += size
        peak = max(peak, held)
    return peak


def _allocations(call: Callable[[], object]) -> list[int]:
    """Return what a call takes from the CPU's allocator and, as negative numbers, gives back.

    By the profiler without Kineto. `torch.profiler`, which is with it, takes seconds to start and
    writes two lines to stderr each time.
    """
    with_memory_alone = (False, True, False, False, False)
    _autograd._enable_profiler_legacy(
        _profiler.ProfilerConfig(
            _profiler.ProfilerState.CPU, *with_memory_alone, _profiler._ExperimentalConfig()
        )
    )
    try:
        call()
    finally:
        threads = _autograd._disable_profiler_legacy()
    events = [event for thread in threads for event in thread]
    return [event.cpu_memory_usage() for event in events if event.kind() == "memory_alloc"]
