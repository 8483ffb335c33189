"""What a network runs as it is: every operation of PyTorch a kernel, or our ops in their place.

A pass over a batch on the meta device, operation by operation, forward and backward. An operation
reads its arguments and writes its results once, or as often as it must (`testing.traffic`); what a
backward operation belongs to, autograd's graph tells.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import backend
from ..kernels._op import Op, observe
from ..testing.traffic import NO_TRAFFIC, in_format_of, read_by, tensors_in
from .anatomy import Anatomy, Conv, on_meta
from .places import Places
from .schedules import Kernel, Schedule


def trace(
    model: nn.Module | str,
    anatomy: Anatomy,
    way: Literal["eager", "ops"],
    *,
    training: bool,
    batch: int,
    dtype: torch.dtype,
) -> Schedule:
    """Return what the model runs: in eager PyTorch, or with each of our ops as one kernel a pass.

    The bytes of an op are those it declares (`Op.traffic`), which tests hold its launches to.
    """
    network = on_meta(model).train(training).to(dtype).to(memory_format=torch.channels_last)
    size = anatomy.image_size
    images = torch.empty(batch, network.in_chans, size, size, dtype=dtype, device="meta")
    images = images.to(memory_format=torch.channels_last)
    schedule = Schedule(way, training, batch, dtype.itemsize)
    tracer = _Tracer(network, anatomy, schedule)
    with ExitStack() as stack:
        stack.enter_context(backend("eager" if way == "eager" else "auto"))
        stack.enter_context(tracer.places.followed())
        if way == "ops":
            stack.enter_context(tracer.fused())
        stack.enter_context(torch.set_grad_enabled(training))
        with _saving(network, images, schedule), tracer:
            logits = network(images)
        if training:
            with tracer:
                logits.backward(torch.empty_like(logits))
    return schedule


@contextmanager
def _saving(network: nn.Module, images: Tensor, schedule: Schedule) -> Generator[None]:
    """Count the memory that autograd keeps, once each; parameters and images are there anyway."""
    mine = {_identity(t) for t in (*network.parameters(), images)}
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        if _identity(t) not in mine:
            kept[_identity(t)] = t.untyped_storage()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        yield
    schedule.saved_bytes = float(sum(storage.nbytes() for storage in kept.values()))


def _identity(t: Tensor) -> int:
    """Return what tells a storage without an address from others."""
    return t.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


class _Tracer(TorchDispatchMode):
    """Adds a kernel to the schedule for every operation."""

    def __init__(self, network: nn.Module, anatomy: Anatomy, schedule: Schedule) -> None:
        super().__init__()
        self.places = Places(network, anatomy, self._entered, self._claim)
        self._schedule = schedule
        # of each node of autograd's graph: its part, or the kernel that an op's backward pass is
        self._of: dict[Any, str | int] = {}
        self._within: int | None = None  # the kernel of the op that runs

    def _entered(self, name: str, args: Any, outer: str) -> None:
        self._claim(args, outer)

    def _claim(self, values: Any, part: str | int) -> None:
        """Give the nodes that led to `values`, and have no part yet, to `part`."""
        rest = [t.grad_fn for t in tensors_in(values) if t.grad_fn is not None]
        while rest:
            node = rest.pop()
            if node not in self._of:
                self._of[node] = part
                rest += [parent for parent, _ in node.next_functions if parent is not None]

    @contextmanager
    def fused(self) -> Generator[None]:
        """Take every call of an op as one kernel a pass."""
        run = Op.__call__

        def whole(op: Op, *args: Any) -> Any:
            if self._within is not None:
                return run(op, *args)
            part = self.places.part
            self._claim(args, part)
            forward, backward = op.traffic(*args)
            self._within = self._add(Kernel(part, op.name, forward))
            y = run(op, *args)
            self._within = None
            if any(t.requires_grad for t in tensors_in(y)):
                self._claim(y, self._add(Kernel(part, f"{op.name} backward", backward)))
            return y

        with patch.object(Op, "__call__", whole), observe(lambda _: None):  # nothing is replayed
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("convolution"):
            x = args[1] if name == "convolution_backward" else args[0]
            result = in_format_of(x, result)
        if name in _FREE or func.is_view:
            return result
        place = self._place()
        for kind, tensors, conv, batch in _SPLIT.get(name, _whole)(name, args, result):
            tensor, fma = (0, 0) if conv is None else (conv.tensor_flops, conv.fma_flops)
            if isinstance(place, str):
                moved = sum(map(_bytes, tensors))
                self._add(Kernel(place, kind, moved, batch * tensor, batch * fma))
            else:
                self._work(place, batch * tensor, batch * fma)
        return result

    def _place(self) -> str | int:
        """Return the part of the operation that runs, or the kernel that it is within."""
        if self._within is not None:
            return self._within
        node: Any = torch._C._current_autograd_node()  # pyright: ignore
        return self.places.part if node is None else self._of.get(node, self.places.part)

    def _add(self, kernel: Kernel) -> int:
        """Add a kernel and return its place."""
        self._schedule.kernels.append(kernel)
        return len(self._schedule.kernels) - 1

    def _work(self, place: int, tensor_flops: float, fma_flops: float) -> None:
        """Let a kernel compute more."""
        kernel = self._schedule.kernels[place]
        self._schedule.kernels[place] = kernel._replace(
            tensor_flops=kernel.tensor_flops + tensor_flops,
            fma_flops=kernel.fma_flops + fma_flops,
        )


_FREE = (*NO_TRAFFIC, "_unsafe_view")


_Kernels = Iterator[tuple[str, list[Tensor], "Conv | None", int]]
"""Of each kernel of an operation: its name, what it moves, what it convolves, how many images."""


def _bytes(t: Tensor) -> int:
    """Return the bytes of a tensor that is read or written: what is expanded is there once."""
    there = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
    return prod(there) * t.element_size()


def _whole(name: str, args: tuple[Any, ...], result: Any) -> _Kernels:
    yield name, [*tensors_in((read_by(name, args), result))], None, 0


def _convolved(x: Tensor, weight: Tensor, y: Tensor, groups: int) -> Conv:
    return Conv("", tuple(x.shape[1:]), tuple(y.shape[1:]), tuple(weight.shape[2:]), groups)


def _used(x: Tensor, conv: Conv) -> Tensor:
    """Return as much of a map as a convolution uses of it."""
    return x.flatten()[: x.shape[0] * conv.read]


def _convolution(name: str, args: tuple[Any, ...], y: Tensor) -> _Kernels:
    x, weight, bias, *_, groups = args
    conv = _convolved(x, weight, y, groups)
    yield name, [*tensors_in((_used(x, conv), weight, bias, y))], conv, len(x)


def _convolution_backward(name: str, args: tuple[Any, ...], result: Any) -> _Kernels:
    dy, x, weight, *_, groups, _ = args
    dx, dweight, dbias = result
    conv = _convolved(x, weight, dy, groups)
    if dx is not None:
        yield f"{name} dx", [dy, weight, dx], conv, len(x)
    if dweight is not None:
        yield f"{name} dweight", [dy, _used(x, conv), dweight], conv, len(x)
    if dbias is not None:
        yield f"{name} dbias", [dy, dbias], None, 0


def _layer_norm_backward(name: str, args: tuple[Any, ...], result: Any) -> _Kernels:
    dy, x = args[:2]
    dx, *sums = (t for t in result if t is not None)
    yield f"{name} dx", [dy, x, dx], None, 0
    if sums:
        yield f"{name} dweight", [dy, x, *sums], None, 0


def _product(name: str, args: tuple[Any, ...], y: Tensor) -> _Kernels:
    rows, inner = args[-2].shape
    conv = Conv("", (inner, rows, 1), (y.shape[1], rows, 1))
    yield name, [*tensors_in((args, y))], conv, 1


_SPLIT: dict[str, Callable[..., _Kernels]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_layer_norm_backward": _layer_norm_backward,
    "mm": _product,
    "addmm": _product,
}
