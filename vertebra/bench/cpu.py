"""A CPU as a place to measure: threads that pay, and memory that a process keeps once it has it."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time

import torch
import torch.nn.functional as F

_THREADS = torch.get_num_threads()  # what torch chose, or OMP_NUM_THREADS

# of glibc's malloc.h: what mallopt can be told
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def settle() -> None:
    """Make times in this process depend on what is computed in it."""
    _keep_memory()
    _settle_threads()


def _keep_memory() -> None:
    """Have freed memory used again by this process, where the C library is glibc.

    It goes back to the system when it happens to lie at the end of the heap, or beyond a threshold
    that moves. Then every call of one provider waits for thousands of new pages and its neighbour's
    for none, by where their weights lie.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if tune is not None:
        tune(_M_MMAP_MAX, 0)
        tune(_M_TRIM_THRESHOLD, -1)


def _settle_threads() -> None:
    """Use no more threads than pay now: all wait for the one whose core is busy elsewhere.

    On two cores, one of them taken, two threads were five times as slow as one.
    """
    x, weight = torch.randn(4, 64, 56, 56), torch.randn(64, 64, 3, 3)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        times: list[float] = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(5):
                F.conv2d(x, weight).relu_()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    halves = [_THREADS >> i for i in range(_THREADS.bit_length())]
    torch.set_num_threads(min(halves, key=seconds))
