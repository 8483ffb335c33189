"""Schedules: the kernels that a network runs as, each with its bytes and operations.

    floor of a kernel = max(bytes / bandwidth, tensor operations / rate, other operations / rate)
    floor of a schedule = the sum over its kernels

No launch gaps, no cache between kernels, no halos, no optimizer. What eager PyTorch runs, and what
our ops make of it, is observed (`tracing`); what one could write is constructed (`construction`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .anatomy import Conv

Way = Literal["eager", "ops", "conv", "shared", "block"]
Bound = Literal["memory", "tensor", "fma"]
"""What a kernel waits for."""


class Rates(NamedTuple):
    """What a machine does per second: bytes moved, tensor operations, other operations."""

    bytes: float
    tensor: float
    fma: float


class Kernel(NamedTuple):
    """One kernel on a whole batch."""

    part: str
    name: str
    bytes: float
    tensor_flops: float = 0.0
    fma_flops: float = 0.0

    def bounds(self, rates: Rates) -> dict[Bound, float]:
        """Return the seconds that each resource alone would take."""
        return {
            "memory": self.bytes / rates.bytes,
            "tensor": self.tensor_flops / rates.tensor,
            "fma": self.fma_flops / rates.fma,
        }

    def floor(self, rates: Rates) -> float:
        """Return the least seconds it can take."""
        return max(self.bounds(rates).values())

    def bound(self, rates: Rates) -> Bound:
        """Return which resource it waits for."""
        bounds = self.bounds(rates)
        return max(bounds, key=bounds.__getitem__)

    @property
    def flops(self) -> float:
        """Operations, on tensor cores and off them."""
        return self.tensor_flops + self.fma_flops


@dataclass
class Schedule:
    """All kernels of one pass over a batch, and the bytes that are kept for the backward pass."""

    way: Way
    training: bool
    batch: int
    itemsize: int
    kernels: list[Kernel] = field(default_factory=list[Kernel])
    saved_bytes: float = 0.0

    def add(
        self,
        part: str,
        name: str,
        read: float,
        write: float = 0,
        convs: Iterable[Conv] = (),
        *,
        times: int = 1,
        weights: int = 1,
        again: Iterable[Conv] = (),
    ) -> None:
        """Add a kernel.

        Args:
            part: that it belongs to.
            name: of the kernel.
            read: elements of maps, of one image.
            write: likewise.
            convs: the convolutions that it computes.
            times: how often: a gradient costs what the forward pass costs.
            weights: how often it reads or writes their weights.
            again: those that it computes once more.
        """
        convs = list(convs)
        moved = self.batch * (read + write) + weights * sum(c.weight for c in convs)
        work = [*(times * convs), *again]
        tensor = self.batch * sum(c.tensor_flops for c in work)
        fma = self.batch * sum(c.fma_flops for c in work)
        self.kernels.append(Kernel(part, name, self.itemsize * moved, tensor, fma))

    def save(self, elements: float) -> None:
        """Count what is kept for the backward pass."""
        self.saved_bytes += self.itemsize * self.batch * elements

    @property
    def bytes(self) -> float:
        """Bytes moved."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> float:
        """Operations, on tensor cores and off them."""
        return sum(kernel.flops for kernel in self.kernels)

    def floor(self, rates: Rates) -> float:
        """Return the least seconds the batch can take."""
        return sum(kernel.floor(rates) for kernel in self.kernels)
