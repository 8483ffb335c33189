"""Replaying: what an op's implementation does, done again without being decided again.

An implementation allocates its outputs and launches kernels. What it launches follows from its
arguments' *signature*: shapes, strides, types, devices, which are None, how pointers are aligned,
flags and names. When a signature comes a second time, its launches are recorded, each with the
binary that Triton's JIT chose for it; from the third call on a `Plan` is carried out: allocate,
fill in the pointers and the floats, launch. Nothing is picked, bound, specialised or looked up.

A plan knows every tensor that a launch takes by where its memory comes from: an argument of the op,
an output, or scratch, which it allocates in one piece; views of these are an offset away.

Floats (momentum, eps) are handed on to kernels and are no part of the signature. To know where they
go, and that nothing else follows from them, the implementation is rehearsed, launching nothing,
with other floats; if anything else does, they are part of the signature after all.

What a plan could get wrong takes the ordinary path: an implementation that computes outside of its
kernels, kernels that are interpreted, `captured()`, hooks on launches (profilers), Triton's debug
and instrumentation modes, a view of one of two arguments that share memory.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from ._launch import Launch, capturing, recorded, recording

MAX_SIGNATURES = 4096  # of one op: a network has tens; more only where image sizes vary
ALIGNMENT = 16  # bytes: what the JIT asks of a pointer; torch allocates at multiples of 64 and more
_SCRATCH_ALIGNMENT = 256

_ALLOCATIONS = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)

Picker = Callable[[Sequence[Any]], tuple[Any, ...]]
Scalars = list[dict[str, int]]
"""Launch by launch, which of the op's floats is the argument at a path."""

_replays: list[Replay] = []


def forget() -> None:
    """Drop every plan, as whoever replaces a kernel or what its launcher calls has to."""
    for replay in _replays:
        replay.plans.clear()


class Replay:
    """An op's implementation, repeated by plans.

    `types` are its schema's, in order; `watching.depth` counts the modes that only look on.
    """

    def __init__(
        self, implementation: Callable[..., Any], types: Sequence[str], watching: Any
    ) -> None:
        self.plans: dict[tuple[Any, ...], Plan | str] = {}
        self._implementation, self._watching = implementation, watching
        self._tensors = picker([i for i, t in enumerate(types) if t in _TENSORS])
        self._float_places = [i for i, t in enumerate(types) if t == "float"]
        self._floats = picker(self._float_places)
        self._lists = picker([i for i, t in enumerate(types) if t == "List[int]"])
        keyed = (*_TENSORS, "float", "List[int]")
        self._rest = picker([i for i, t in enumerate(types) if t not in keyed])
        self._floats_decide = False
        _replays.append(self)

    def __call__(self, *args: Any) -> Any:
        """Return what the implementation would."""
        if _is_watched():
            return self._implementation(*args)
        floats = self._floats(args)
        maybe = self._tensors(args)
        tensors = [t for t in maybe if t is not None]
        pointers = [t.data_ptr() for t in tensors]
        key = (
            *self._rest(args),
            *map(tuple, self._lists(args)),
            *map(is_, maybe, repeat(None)),
            *map(_SHAPE, tensors),
            *map(_STRIDE, tensors),
            *map(_DTYPE, tensors),
            *map(_DEVICE, tensors),
            *map(_MISALIGNMENT, pointers),
            *(floats if self._floats_decide else ()),
        )
        plan = self.plans.get(key)
        if isinstance(plan, Plan) and not any(plan.pre_run_hooks):
            return plan.run(pointers, floats)
        if plan is None:
            if len(self.plans) >= MAX_SIGNATURES:
                self.plans.clear()
            self.plans[key] = _SEEN_ONCE
        elif plan is _SEEN_ONCE:
            return self._record(key, args)
        return self._implementation(*args)

    def _record(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        # one tensor passed twice becomes two: they need not be one the next time
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        with _Watch(self._watching) as watch, recorded() as launches:
            outputs = self._implementation(*args)
        scalars = self._rehearse(args, [launch for launch, _ in launches])
        if scalars is None:
            self._floats_decide = True
            self.plans.clear()
            return outputs
        tensors = [a for a in args if isinstance(a, Tensor)]
        made = None
        if not watch.computes:
            made = make_plan(tensors, outputs, launches, scalars, len(self._float_places))
        self.plans[key] = made or _ORDINARY
        return outputs

    def _rehearse(self, args: tuple[Any, ...], launches: list[Launch]) -> Scalars | None:
        """Return where the launches take the op's floats; None if more follows from those."""
        places = self._float_places
        if not places or self._floats_decide:
            return [{} for _ in launches]
        names = [0.40625 + 0.001 * i for i in range(len(places))]  # one for each, to know it by
        first = self._launches_with(names, args)
        if first is None:
            return None
        scalars = [
            {path: names.index(v) for path, v in leaves(launch.arguments) if _is_one_of(v, names)}
            for launch in first
        ]
        mine = [args[place] for place in places]
        for values in (mine, *([probe] * len(places) for probe in _PROBES)):
            found = launches if values is mine else self._launches_with(values, args)
            if found is None or len(found) != len(first):
                return None
            for launch, like, handed in zip(found, first, scalars):
                expected = {path: values[i] for path, i in handed.items()}
                if not _differ_only_in(expected, launch, like):
                    return None
        return scalars

    def _launches_with(self, floats: list[float], args: tuple[Any, ...]) -> list[Launch] | None:
        changed = dict(zip(self._float_places, floats))
        try:
            with recorded(runs=False) as rehearsed:
                self._implementation(*(changed.get(i, a) for i, a in enumerate(args)))
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
_TENSORS = ("Tensor", "Optional[Tensor]")
# mapped over tensors: half of what attributes and methods cost in a loop
_SHAPE: Callable[[Tensor], Any] = inspect.getattr_static(Tensor, "shape").__get__
_DTYPE: Callable[[Tensor], Any] = inspect.getattr_static(Tensor, "dtype").__get__
_STRIDE, _DEVICE = Tensor.stride, Tensor.get_device
_MISALIGNMENT = (ALIGNMENT - 1).__and__
_SEEN_ONCE, _ORDINARY = "seen once", "ordinary"


class Plan(NamedTuple):
    """What to allocate and to launch.

    A launch's arguments are picked, at the speed of C, from one list of values: the stream, the
    pointers of the op's tensors and of `fresh` ones, the op's floats, `offsets` from pointers,
    `constants`, and `tuples` of all these, which kernels take as one argument.
    """

    device: torch.device
    fresh: tuple[Tensor, ...]  # the outputs, then scratch: without memory, to allocate alike
    outputs: int | None  # how many there are; None if there is one that is in no tuple
    offsets: tuple[tuple[int, int], ...]  # a pointer's place in the list, bytes to add
    constants: tuple[Any, ...]
    tuples: tuple[Picker, ...]
    launches: tuple[tuple[Callable[..., None], Picker], ...]
    binaries: tuple[CompiledKernel, ...]  # whose code stays loaded as long as they live
    pre_run_hooks: tuple[list[Any], ...]  # of the kernels, which may get some later

    def run(self, pointers: list[int], floats: tuple[float, ...]) -> Any:
        """Allocate and launch; return the outputs."""
        device = self.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.run(pointers, floats)
        fresh = [torch.empty_like(t) for t in self.fresh]
        active: Any = driver.active
        values = [active.get_current_stream(device.index), *pointers]
        values += [t.data_ptr() for t in fresh]
        values += floats
        for place, offset in self.offsets:
            values.append(values[place] + offset)
        values += self.constants
        for pick in self.tuples:
            values.append(pick(values))
        for enter, pick in self.launches:
            enter(*pick(values))
        return fresh[0] if self.outputs is None else tuple(fresh[: self.outputs])


class _Constant(NamedTuple):
    index: int


def make_plan(
    tensors: list[Tensor],
    outputs: Tensor | tuple[Tensor, ...],
    launches: Sequence[tuple[Launch, Any]],
    scalars: Scalars,
    floats: int,
) -> Plan | None:
    """Return the plan that does what was recorded, or None where it cannot be told.

    Args:
        tensors: what the op was given, each an object of its own.
        outputs: what it returned.
        launches: what it launched, each with its binary.
        scalars: where the launches take the op's floats.
        floats: how many floats it was given.
    """
    returned = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    used = [v for launch, _ in launches for _, v in leaves(launch.arguments) if _is_tensor(v)]
    found = _origins(tensors + returned, used)
    if found is None or not all(isinstance(binary, CompiledKernel) for _, binary in launches):
        return None
    origins, scratch = found
    fresh = [torch.empty_like(t) for t in returned]
    if scratch:
        fresh.append(torch.empty(scratch, dtype=torch.uint8, device=returned[0].device))
    if any(a.stride() != b.stride() for a, b in zip(fresh, returned)):
        return None
    for t in fresh:
        t.untyped_storage().resize_(0)

    first_float = 1 + len(tensors) + len(fresh)
    offsets = sorted({origin for origin in origins.values() if origin[1]})
    constants: list[Any] = []

    def constant(value: Any) -> _Constant:
        constants.append(value)
        return _Constant(len(constants) - 1)

    def place(value: Any, path: str, places: dict[str, int]) -> Any:
        """Return a value's place in the list, a constant, or a list of these for a tuple."""
        if path in places:
            return first_float + places[path]
        if isinstance(value, Tensor):
            origin = origins[id(value)]
            return first_float + floats + offsets.index(origin) if origin[1] else 1 + origin[0]
        if isinstance(value, tuple):
            parts = [place(v, f"{path}.{i}", places) for i, v in enumerate(value)]
            if not all(isinstance(part, _Constant) for part in parts):
                return parts
        return constant(value)

    trees: list[list[Any]] = []
    for (launch, binary), places in zip(launches, scalars):
        grid = (*launch.grid, 1, 1)[:3]
        head = (binary.function, binary.packed_metadata, None, None, None)
        given = (launch.arguments.get(p.name, p.default) for p in launch.kernel.params)
        named = zip(given, (f".{p.name}" for p in launch.kernel.params))
        tree = [*map(constant, grid), 0, *map(constant, head)]
        trees.append(tree + [place(value, path, places) for value, path in named])

    first_constant = first_float + floats + len(offsets)
    tuples: list[Picker] = []

    def index(node: Any) -> int:
        if isinstance(node, _Constant):
            return first_constant + node.index
        if isinstance(node, list):
            tuples.append(picker([index(part) for part in node]))
            return first_constant + len(constants) + len(tuples) - 1
        return node

    picks = [picker([index(node) for node in tree]) for tree in trees]
    return Plan(
        device=returned[0].device,
        fresh=tuple(fresh),
        outputs=None if isinstance(outputs, Tensor) else len(returned),
        offsets=tuple((1 + base, offset) for base, offset in offsets),
        constants=tuple(constants),
        tuples=tuple(tuples),
        launches=tuple((binary.run, pick) for (_, binary), pick in zip(launches, picks)),
        binaries=tuple(binary for _, binary in launches),
        pre_run_hooks=tuple(launch.kernel.pre_run_hooks for launch, _ in launches),
    )


def _origins(
    known: list[Tensor], used: list[Tensor]
) -> tuple[dict[int, tuple[int, int]], int] | None:
    """Return where each tensor lies, by its id: in which of `known` or after them, at which byte.

    What lies in none of them is scratch; its size comes second. None if a view could be of two.
    """
    places = {id(t): i for i, t in enumerate(known)}
    owners: dict[int, list[int]] = defaultdict(list)
    for i, t in enumerate(known):
        owners[t.untyped_storage().data_ptr()].append(i)
    origins: dict[int, tuple[int, int]] = {}
    pieces: dict[int, int] = {}
    size = 0
    for t in used:
        storage = t.untyped_storage()
        memory = storage.data_ptr()
        if id(t) in places:
            origins[id(t)] = places[id(t)], 0
        elif len(owners[memory]) > 1:
            return None
        elif owners[memory]:
            (owner,) = owners[memory]
            origins[id(t)] = owner, t.data_ptr() - known[owner].data_ptr()
        else:
            if memory not in pieces:
                pieces[memory] = size
                size += -(-storage.nbytes() // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT
            origins[id(t)] = len(known), pieces[memory] + t.data_ptr() - memory
    return origins, size


class _Watch(TorchDispatchMode):
    """See whether PyTorch computes anything, beside allocating and taking views."""

    def __init__(self, watching: Any) -> None:
        super().__init__()
        self.computes = False
        self._watching = watching

    def __enter__(self) -> _Watch:
        self._watching.depth += 1
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._watching.depth -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.computes |= func not in _ALLOCATIONS and not func.is_view
        return func(*args, **(kwargs or {}))


def _is_watched() -> bool:
    """Return whether somebody wants each launch to go through the door and Triton's JIT."""
    runtime = knobs.runtime
    return bool(
        capturing()
        or recording()
        or runtime.interpret
        or _callees(runtime.launch_enter_hook)
        or _callees(runtime.launch_exit_hook)
        or runtime.debug
        or knobs.compilation.instrumentation_mode
    )


def _callees(hook: Any) -> Any:
    return getattr(hook, "calls", hook)  # a chain of hooks, or what somebody put in its place


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_like(a: Tensor, b: Any) -> bool:
    if not isinstance(b, Tensor):
        return False
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested tuples and dicts, each with its path."""
    if isinstance(tree, dict | tuple):
        for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(branch, f"{path}.{key}")
    else:
        yield path, tree


def picker(places: Sequence[int]) -> Picker:
    """Return a function from a sequence to the tuple of its items at `places`."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[i] for i in places)
