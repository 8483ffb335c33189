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
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import backend
from ..kernels._op import Op, observe
from ..testing.traffic import NO_TRAFFIC, read_by, tensors_in
from .anatomy import Anatomy, Conv, on_meta
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
    tracer = _Tracer(network, [part.name for part in anatomy.parts], schedule)
    with ExitStack() as stack:
        stack.enter_context(backend("eager" if way == "eager" else "auto"))
        stack.enter_context(tracer.placed())
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


_FUSED = ""  # the part of autograd's nodes that an op has in its own backward pass


class _Tracer(TorchDispatchMode):
    """Adds a kernel to the schedule for every operation."""

    def __init__(self, network: nn.Module, parts: list[str], schedule: Schedule) -> None:
        super().__init__()
        self._names = {module: name for name, module in network.named_modules()}
        self._parts, self._schedule = parts, schedule
        self._path = [parts[0]]
        self._of: dict[Any, str] = {}  # the part of each node of autograd's graph
        self._muted = 0

    @contextmanager
    def placed(self) -> Generator[None]:
        """Follow which part runs, and which nodes of autograd's graph it leaves."""
        hooks = [  # no module's own: one that has its own is not fused
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._claim(args, self._path[-1])
        name = self._names[module]
        inside = (p for p in self._parts if name == p or name.startswith(f"{p}."))
        self._path.append(next(inside, None) or self._beside(module))

    def _beside(self, module: nn.Module) -> str:
        """Return the part of a module that lies in no block."""
        outer = self._path[-1]
        if outer in self._names.values():
            return outer  # within a block
        is_new = isinstance(module, nn.Linear) and outer != self._parts[0]
        return self._parts[-1] if is_new else outer

    def _leave(self, module: nn.Module, args: Any, y: Any) -> None:
        part = self._path.pop()
        self._claim(y, part)
        if part in self._names.values() and self._path[-1] == self._parts[0]:
            self._path[:] = [self._parts[-1]] * len(self._path)  # behind the first block

    def _claim(self, values: Any, part: str) -> None:
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
            part = self._path[-1]
            self._claim(args, part)
            self._muted += 1
            y = run(op, *args)
            self._muted -= 1
            forward, backward = op.traffic(*args)
            self._add(part, op.name, forward)
            if any(t.requires_grad for t in tensors_in(y)):
                self._add(part, f"{op.name} backward", backward)
            self._claim(y, _FUSED)
            return y

        with patch.object(Op, "__call__", whole), observe(lambda _: None):  # nothing is replayed
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("convolution"):
            result = _in_channels_last(result)
        part = self._part()
        if name not in _FREE and not func.is_view and not self._muted and part != _FUSED:
            split = _SPLIT.get(name, _whole)
            for kind, tensors, conv, batch in split(name, args, result):
                self._add(part, kind, sum(map(_bytes, tensors)), conv, batch)
        return result

    def _part(self) -> str:
        node: Any = torch._C._current_autograd_node()  # pyright: ignore
        return self._path[-1] if node is None else self._of.get(node, self._path[-1])

    def _add(
        self, part: str, name: str, moved: float, conv: Conv | None = None, batch: int = 0
    ) -> None:
        flops = (0.0, 0.0) if conv is None else (conv.tensor_flops, conv.fma_flops)
        self._schedule.kernels.append(Kernel(part, name, moved, *(batch * n for n in flops)))


_FREE = (*NO_TRAFFIC, "_unsafe_view")


def _in_channels_last(result: Any) -> Any:
    """Return maps as a GPU would, whose convolutions keep channels_last; those of meta do not."""
    if isinstance(result, tuple):
        dx, *rest = result
        return (None if dx is None else _in_channels_last(dx), *rest)
    return torch.empty_like(result, memory_format=torch.channels_last)


_Kernels = Iterator[tuple[str, list[Tensor], "Conv | None", int]]
"""Of each kernel of an operation: its name, what it moves, what it convolves, how many images."""


def _bytes(t: Tensor) -> int:
    """Return the bytes of a tensor that is read or written: what is expanded is there once."""
    there = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
    return prod(there) * t.element_size()


def _whole(name: str, args: tuple[Any, ...], result: Any) -> _Kernels:
    yield name, [*tensors_in((read_by(name, args), result))], None, 0


def _convolved(x: Tensor, weight: Tensor, y: Tensor, stride: Any, groups: int) -> Conv:
    kernel: Any = tuple(weight.shape[2:])
    x_shape: Any = tuple(x.shape[1:])
    y_shape: Any = tuple(y.shape[1:])
    return Conv("", x_shape, y_shape, kernel, tuple(stride), groups)


def _used(x: Tensor, conv: Conv) -> Tensor:
    """Return as much of a map as a convolution uses of it."""
    return x.flatten()[: x.shape[0] * conv.read]


def _convolution(name: str, args: tuple[Any, ...], y: Tensor) -> _Kernels:
    x, weight, bias, stride, *_, groups = args
    conv = _convolved(x, weight, y, stride, groups)
    yield name, [*tensors_in((_used(x, conv), weight, bias, y))], conv, len(x)


def _convolution_backward(name: str, args: tuple[Any, ...], result: Any) -> _Kernels:
    dy, x, weight, _, stride, *_, groups, _ = args
    dx, dweight, dbias = result
    conv = _convolved(x, weight, dy, stride, groups)
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
