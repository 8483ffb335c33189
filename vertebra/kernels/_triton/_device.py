"""What configurations have to know about a device."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """A device family, and what one program may use of it.

    `arch` is NVIDIA's compute capability, 90 for an H100; 0 on AMD.
    """

    arch: int
    shared: int
    processors: int


_H100 = Device(90, 227 << 10, 132)
_assumed, _asked = _H100, [False]


@contextmanager
def assumed(device: Device) -> Generator[list[bool]]:
    """Take `device` for the one that meta tensors are on; the list says whether it mattered."""
    global _assumed, _asked
    outer, _assumed, _asked = (_assumed, _asked), device, []
    try:
        yield _asked
    finally:
        _assumed, _asked = outer


def facts(device: torch.device) -> Device:
    """Return the facts about a device; of an H100 where kernels are interpreted."""
    if device.type == "meta":
        _asked.append(True)
        return _assumed
    return _of_gpu(device) if device.type == "cuda" else _H100


@cache
def _of_gpu(device: torch.device) -> Device:
    known = torch.cuda.get_device_properties(device)
    shared = getattr(known, "shared_memory_per_block_optin", known.shared_memory_per_block)
    arch = 0 if torch.version.hip is not None else 10 * known.major + known.minor
    return Device(arch, shared or known.shared_memory_per_block, known.multi_processor_count)
