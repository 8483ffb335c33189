"""Bytes: what an op declares, what its launches can touch, what eager PyTorch has to move.

Counted are maps, that is (N, C, H, W) tensors in any order of dimensions, on meta tensors, so that
the sizes are those of real models. Ours: every map that a launch is given, once per launch. Eager:
every map that an aten operation reads or writes, once, or as often as it must; that is the least
its separate operations could move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import Traffic, backend
from ..kernels._triton._launch import Launch
from .cases import Case
from .contract import leaves_of
from .launches import launches

NO_TRAFFIC = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach")


def declared_and_launched(case: Case) -> tuple[Traffic, Traffic]:
    """Return what the op declares for `case`, and what its launches can touch."""
    call, forward, backward = launches(case, case.differentiable)
    return call.op.traffic(*call.args), Traffic(launched(forward), launched(backward))


def eager(case: Case) -> Traffic:
    """Return the least that the op's eager definition could move."""
    inputs = case.inputs("meta")
    leaves = leaves_of(case, inputs)
    with backend("eager"):
        with _Counter() as forward:
            y = case.run({**inputs, **leaves})["y"]
        with _Counter() as backward:
            if leaves:
                torch.autograd.grad(y, [*leaves.values()], inputs["dy"])
    return Traffic(forward.bytes, backward.bytes)


def launched(launches: list[Launch]) -> int:
    """Return the bytes that launches can touch.

    A launch that is given one map as two arguments finds it in the cache the second time.
    """
    found = ({id(t): t for t in tensors_in(launch.arguments)} for launch in launches)
    described = (t for launch in launches for t in descriptors(launch.arguments))
    return sum(_bytes(distinct.values()) for distinct in found) + sum(t.nbytes for t in described)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t.dim() == 4)


def descriptors(arguments: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the maps that a launch's tensor descriptors are of: views, of any rank."""
    for argument in arguments.values():
        if isinstance(base := getattr(argument, "base", None), Tensor):
            yield base


def _is_vector(t: Tensor) -> bool:
    """Return whether `t` has one value per sample, channel, or both, or is such a one expanded."""
    varies = (n > 1 and stride > 0 for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.dim() != 4 or sum([*varies][1:]) < 2


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def read_by(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what an operation reads of its arguments, each as often as it has to."""
    return _READS[name](*args) if name in _READS else args


def in_format_of(x: Tensor, result: Any) -> Any:
    """Return the maps of a convolution on meta as a device has them: in channels_last if x is."""
    if isinstance(result, tuple):
        dx, *sums = result
        return (in_format_of(x, dx), *sums)
    if result is None or result.dim() != 4 or x.is_contiguous():
        return result  # an image's gradient, a convolution over channels
    return torch.empty_like(result, memory_format=torch.channels_last)


class _Counter(TorchDispatchMode):
    """Add up what every operation reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            result = in_format_of(args[0], result)
        if name not in NO_TRAFFIC and not func.is_view:
            maps = (t for t in tensors_in((read_by(name, args), result)) if not _is_vector(t))
            self.bytes += _bytes(maps)
        return result


def _batch_norm(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Statistics of the batch have to be known before the first output can be computed."""
    train: bool = rest[4]
    return (x, x) if train else (x,)


def _batch_norm_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """With stored statistics dx is dy times a constant; x is for dweight only."""
    train: bool = rest[5]
    wanted: list[bool] = rest[7]
    if train:
        return (dy, x, dy, x)
    return (dy, x) if wanted[1] else (dy,)


def _max_pool_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Indices say where dy goes; of x only the shape is needed."""
    indices: Tensor = rest[5]
    return (dy, indices)


_READS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
    "max_pool2d_with_indices_backward": _max_pool_backward,
}
