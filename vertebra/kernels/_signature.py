"""Signatures: what an op does with a call follows from them, so that it is found out once.

A call's signature is its arguments' types, which are None among them, its flags and names, and the
shapes, strides, dtypes and devices of its tensors, with all that PyTorch's dispatcher heeds about
them (subclasses, transforms, autocast, inference mode, a negation put off). Floats (momentum, eps)
are no part of it unless told otherwise. Nor is the memory that tensors lie in.

PyTorch's own guards, which let compiled code in, compare tensors: one call for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad

MAX_SIGNATURES = 4096  # of one op: a network has tens; more only where image sizes vary

_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # pyright: ignore


class Signature:
    """One signature, and what to do about it, by what else that follows from."""

    __slots__ = ("holds", "plans")

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.plans: dict[Any, Any] = {}
        self.holds = _guard(tensors)
        if not self.holds(*tensors):  # PyTorch's guards take no tensor twice
            each = [_guard((t,)) for t in tensors]

            def all_hold(*tensors: Tensor) -> bool:
                return all(holds(t) for holds, t in zip(each, tensors, strict=True))

            self.holds = all_hold


def _guard(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


class Kind:
    """The calls whose arguments are of certain types: what is where, and their signatures."""

    def __init__(self, args: tuple[Any, ...], with_floats: bool) -> None:
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        self.float_places = [
            i for i, a in enumerate(args) if isinstance(a, float) and not with_floats
        ]
        rest = [
            i
            for i, a in enumerate(args)
            if a is not None and i not in (*tensors, *self.float_places)
        ]
        self.tensors = _picker(tensors)
        self.rest = _picker(rest)
        if list in map(type, args):  # which no dict takes for a key
            pick = self.rest

            def hashable(args: tuple[Any, ...]) -> tuple[Any, ...]:
                return tuple(tuple(v) if isinstance(v, list) else v for v in pick(args))

            self.rest = hashable
        self.signatures: dict[tuple[Any, ...], list[Signature]] = {}


Found = tuple[Signature, Kind, tuple[Tensor, ...]]
"""A call's signature, its kind, and its tensors."""


class Signatures:
    """The signatures of an op's calls; those that PyTorch just runs, nothing tracing them.

    `with_floats`: floats are part of them.
    """

    def __init__(self, *, with_floats: bool = False) -> None:
        self._with_floats = with_floats
        self._kinds: dict[tuple[type, ...], Kind] = {}
        self._noted = 0

    def find(self, args: tuple[Any, ...]) -> Found | None:
        """Return the signature that holds for a call, None where none does."""
        kind = self._kinds.get((*map(type, args),))
        level = forward_ad._current_level  # pyright: ignore[reportPrivateUsage]
        if kind is None or _modes() or level >= 0:
            return None
        tensors = kind.tensors(args)
        for signature in kind.signatures.get((tensors[0].shape, *kind.rest(args)), ()):
            if signature.holds(*tensors):
                return signature, kind, tensors
        return None

    def note(self, args: tuple[Any, ...]) -> Found:
        """Return the signature that holds for a call, a new one where none does."""
        if self._noted == MAX_SIGNATURES:
            self.clear()
        self._noted += 1
        kind = self._kinds.setdefault(tuple(map(type, args)), Kind(args, self._with_floats))
        found = self.find(args)
        if found is None:
            tensors = kind.tensors(args)
            found = Signature(tensors), kind, tensors
            key = (tensors[0].shape, *kind.rest(args))
            kind.signatures.setdefault(key, []).append(found[0])
        return found

    def clear(self) -> None:
        """Drop them all."""
        self._kinds.clear()
        self._noted = 0

    def __iter__(self) -> Iterator[Signature]:
        for kind in self._kinds.values():
            for signatures in kind.signatures.values():
                yield from signatures


def _picker(places: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return a function from a tuple to the tuple of its items at `places`."""
    if len(places) > 1:
        return itemgetter(*places)
    start = places[0] if places else 0
    return itemgetter(slice(start, start + len(places)))
