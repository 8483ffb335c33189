"""Replaying: what an op's implementation does, done again without being decided again.

An implementation allocates its outputs and launches kernels. What it launches follows from its
call's *signature* (`_signature`) and from how its pointers are aligned. When both come a second
time, the launches are recorded, each with the binary that Triton's JIT chose for it; from the third
call on a `Plan` (`_plan`) is carried out: allocate, fill in the pointers and the floats, launch.
Nothing is picked, bound, specialised or looked up.

Floats (momentum, eps) are handed on to kernels and are no part of the signature. To know where they
go, and that nothing else follows from them, the implementation is rehearsed, launching nothing,
with other floats; if anything else does, they are part of the signature after all.

What a plan could get wrong takes the ordinary path: an implementation that computes outside of its
kernels, kernels that are interpreted or take tensor descriptors, `captured()`, hooks on launches
(profilers), Triton's debug and instrumentation modes, a view of one of two arguments that share
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from .._signature import Found, Signatures
from .._watch import Watch
from ._launch import Launch, observed, recorded
from ._plan import Plan, Scalars, leaves, make_plan

ALIGNMENT = 16  # bytes: what the JIT asks of a pointer; torch allocates at multiples of 64 and more

_ALLOCATIONS = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)

_replays: list[Replay] = []


def forget() -> None:
    """Drop every plan, as whoever replaces a kernel or what its launcher calls has to."""
    for replay in _replays:
        replay.forget()


def repeated(
    implementation: Callable[..., Any], is_plain: Callable[[tuple[Any, ...]], bool]
) -> Callable[..., Any]:
    """Return `implementation`, replayed where kernels are compiled."""
    if knobs.runtime.interpret:
        return implementation
    return Replay(implementation, is_plain)


class Replay:
    """An op's implementation, repeated by plans.

    `is_plain` tells whether PyTorch just runs what a call asks for.
    """

    def __init__(
        self, implementation: Callable[..., Any], is_plain: Callable[[tuple[Any, ...]], bool]
    ) -> None:
        self._implementation, self._is_plain = implementation, is_plain
        self._signatures = Signatures()
        _replays.append(self)

    def __call__(self, *args: Any) -> Any:
        """Return what the implementation would."""
        found = self._signatures.find(args)
        if found is None or _is_watched():
            return self._meet(args)
        signature, _, tensors = found
        pointers = [*map(_POINTER, tensors)]
        plan = signature.plans.get(misalignment(pointers))
        if isinstance(plan, Plan) and not any(plan.pre_run_hooks):
            return plan.run(pointers, args)
        if plan is _SEEN_ONCE:
            return self._record(found, args)
        return self._meet(args) if plan is None else self._implementation(*args)

    @property
    def plans(self) -> list[Plan | str]:
        """What to do about each signature."""
        return [plan for signature in self._signatures for plan in signature.plans.values()]

    def forget(self) -> None:
        """Drop every plan."""
        self._signatures.clear()

    def _meet(self, args: tuple[Any, ...]) -> Any:
        """Run the implementation on a call of which nothing is known, and note its signature."""
        if self._is_plain(args) and not _is_watched():
            signature, _, tensors = self._signatures.note(args)
            signature.plans[misalignment([*map(_POINTER, tensors)])] = _SEEN_ONCE
        return self._implementation(*args)

    def _record(self, found: Found, args: tuple[Any, ...]) -> Any:
        # one tensor passed twice becomes two: they need not be one the next time
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        with _Watch() as watch, recorded() as launches:
            outputs = self._implementation(*args)
        signature, kind, tensors = found
        scalars = self._rehearse(kind.float_places, args, [launch for launch, _ in launches])
        if scalars is None:
            self._signatures = Signatures(with_floats=True)
            return outputs
        made = None
        if not watch.computes:
            made = make_plan(kind.tensors(args), outputs, launches, scalars)
        signature.plans[misalignment([*map(_POINTER, tensors)])] = made or _ORDINARY
        return outputs

    def _rehearse(
        self, places: list[int], args: tuple[Any, ...], launches: list[Launch]
    ) -> Scalars | None:
        """Return where the launches take the op's floats; None if more follows from those."""
        if not places:
            return [{} for _ in launches]
        names = [0.40625 + 0.001 * i for i in range(len(places))]  # one for each, to know it by
        first = self._launches_with(dict(zip(places, names)), args)
        if first is None:
            return None
        scalars = [
            {
                path: places[names.index(v)]
                for path, v in leaves(launch.arguments)
                if _is_one_of(v, names)
            }
            for launch in first
        ]
        mine = {place: args[place] for place in places}
        for floats in (mine, *(dict.fromkeys(places, probe) for probe in _PROBES)):
            found = launches if floats is mine else self._launches_with(floats, args)
            if found is None or len(found) != len(first):
                return None
            for launch, like, handed in zip(found, first, scalars):
                expected = {path: floats[place] for path, place in handed.items()}
                if not _differ_only_in(expected, launch, like):
                    return None
        return scalars

    def _launches_with(
        self, floats: dict[int, float], args: tuple[Any, ...]
    ) -> list[Launch] | None:
        try:
            with recorded(runs=False) as rehearsed:
                self._implementation(*(floats.get(i, a) for i, a in enumerate(args)))
        except (ArithmeticError, ValueError):
            return None  # it computes with them
        return [launch for launch, _ in rehearsed]


def _is_one_of(value: Any, names: list[float]) -> bool:
    return isinstance(value, float) and value in names


def _differ_only_in(expected: dict[str, float], a: Launch, b: Launch) -> bool:
    """Return whether `a` is `b` with the `expected` arguments in place of its own."""
    if a.kernel is not b.kernel or a.grid != b.grid:
        return False
    theirs = dict(leaves(b.arguments)) | expected
    mine = dict(leaves(a.arguments))
    return mine.keys() == theirs.keys() and all(
        _is_like(value, theirs[path]) if isinstance(value, Tensor) else value == theirs[path]
        for path, value in mine.items()
    )


_PROBES = (0.0, 1.0, -1.0, 1e-9, 1e9)  # what a branch would tell apart
_POINTER: Callable[[Tensor], int] = Tensor.data_ptr
_SEEN_ONCE, _ORDINARY = "seen once", "ordinary"


def misalignment(pointers: Sequence[int]) -> tuple[int, ...]:
    """Return how far each pointer is from where the JIT calls it aligned, () if all are there."""
    if gcd(ALIGNMENT, *pointers) == ALIGNMENT:
        return ()
    return tuple(pointer % ALIGNMENT for pointer in pointers)


class _Watch(Watch):
    """See whether PyTorch computes anything, beside allocating and taking views."""

    computes = False

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.computes |= func not in _ALLOCATIONS and not func.is_view


def _is_watched() -> bool:
    """Return whether somebody wants each launch to go through the door and Triton's JIT."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        observed()
        or getattr(enter, "calls", enter)  # of a chain; or else what somebody put in its place
        or getattr(leave, "calls", leave)
        or runtime.debug
        or knobs.compilation.instrumentation_mode
    )


def _is_like(a: Tensor, b: Any) -> bool:
    if not isinstance(b, Tensor):
        return False
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
