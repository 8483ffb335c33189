"""Replaying: what an op's implementation does, done again without being decided again.

An implementation allocates its outputs and launches kernels. What it launches follows from its
call's *signature* (`_signature`) and from how its pointers are aligned. When both come a second
time, the launches are recorded, each with the binary that Triton's JIT chose for it; from the third
call on a `Plan` is carried out: allocate, fill in the pointers and the floats, launch. Nothing is
picked, bound, specialised or looked up.

A plan knows every tensor that a launch takes by where its memory comes from: an argument of the op,
an output, or scratch, which it allocates in one piece; views of these are an offset away.

Floats (momentum, eps) are handed on to kernels and are no part of the signature. To know where they
go, and that nothing else follows from them, the implementation is rehearsed, launching nothing,
with other floats; if anything else does, they are part of the signature after all.

What a plan could get wrong takes the ordinary path: an implementation that computes outside of its
kernels, kernels that are interpreted or take tensor descriptors, `captured()`, hooks on launches
(profilers), Triton's debug and instrumentation modes, a view of one of two arguments that share
memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import starmap
from math import gcd
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import Launch, observed, recorded
from ._signature import Found, Signatures

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

# what Inductor's code allocates with, on the current device: a third faster than torch.empty_like
_ALLOCATE: dict[str, Callable[..., Tensor]] = {
    "cpu": guards._empty_strided_cpu,  # pyright: ignore
    "cuda": guards._empty_strided_cuda,  # pyright: ignore
}

Picker = Callable[[Sequence[Any]], tuple[Any, ...]]
Scalars = list[dict[str, int]]
"""Launch by launch, which of the op's floats is the argument at a path."""

_replays: list[Replay] = []


def forget() -> None:
    """Drop every plan, as whoever replaces a kernel or what its launcher calls has to."""
    for replay in _replays:
        replay.forget()


def repeated(
    implementation: Callable[..., Any], is_plain: Callable[[tuple[Any, ...]], bool], watching: Any
) -> Callable[..., Any]:
    """Return `implementation`, replayed where kernels are compiled."""
    if knobs.runtime.interpret:
        return implementation
    return Replay(implementation, is_plain, watching)


class Replay:
    """An op's implementation, repeated by plans.

    `is_plain` tells whether PyTorch just runs what a call asks for; `watching.depth` counts the
    modes that only look on.
    """

    def __init__(
        self,
        implementation: Callable[..., Any],
        is_plain: Callable[[tuple[Any, ...]], bool],
        watching: Any,
    ) -> None:
        self._implementation, self._is_plain, self._watching = implementation, is_plain, watching
        self._signatures = Signatures()
        _replays.append(self)

    def __call__(self, *args: Any) -> Any:
        """Return what the implementation would."""
        found = self._signatures.find(args)
        if found is None or _is_watched():
            return self._meet(args)
        signature, kind, tensors = found
        pointers = [*map(_POINTER, tensors)]
        plan = signature.plans.get(misalignment(pointers))
        if isinstance(plan, Plan) and not any(plan.pre_run_hooks):
            return plan.run(pointers, kind.floats(args))
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
        with _Watch(self._watching) as watch, recorded() as launches:
            outputs = self._implementation(*args)
        signature, kind, tensors = found
        scalars = self._rehearse(kind.float_places, args, [launch for launch, _ in launches])
        if scalars is None:
            self._signatures = Signatures(with_floats=True)
            return outputs
        made = None
        if not watch.computes:
            floats = len(kind.float_places)
            made = make_plan(kind.tensors(args), outputs, launches, scalars, floats)
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
            {path: names.index(v) for path, v in leaves(launch.arguments) if _is_one_of(v, names)}
            for launch in first
        ]
        mine = [args[place] for place in places]
        for values in (mine, *([probe] * len(places) for probe in _PROBES)):
            changed = dict(zip(places, values))
            found = launches if values is mine else self._launches_with(changed, args)
            if found is None or len(found) != len(first):
                return None
            for launch, like, handed in zip(found, first, scalars):
                expected = {path: values[i] for path, i in handed.items()}
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


class Plan(NamedTuple):
    """What to allocate and to launch.

    A launch's arguments are picked, at the speed of C, from one list of values: the stream, the
    pointers of the op's tensors and of `fresh` ones, the op's floats, `offsets` from pointers,
    `constants`, and `tuples` of all these, which kernels take as one argument.
    """

    gpu: int | None  # None where there is none
    allocate: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
    fresh: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]  # what to allocate
    absent: tuple[Tensor, ...]  # outputs without elements, which nothing can be written to
    outputs: Callable[[list[Tensor]], Any]  # picks them from what was allocated and is absent
    offsets: tuple[tuple[int, int], ...]  # a pointer's place in the list, bytes to add
    constants: tuple[Any, ...]
    tuples: tuple[Picker, ...]
    launches: tuple[tuple[Callable[..., None], Picker], ...]
    binaries: tuple[CompiledKernel, ...]  # whose code stays loaded as long as they live
    pre_run_hooks: tuple[list[Any], ...]  # of the kernels, which may get some later

    def run(self, pointers: list[int], floats: tuple[float, ...]) -> Any:
        """Allocate and launch; return the outputs."""
        gpu = self.gpu
        if gpu is not None and gpu != torch.cuda.current_device():
            with torch.cuda.device(gpu):
                return self.run(pointers, floats)
        fresh = [*starmap(self.allocate, self.fresh)]
        active: Any = driver.active
        values = [active.get_current_stream(gpu), *pointers, *map(_POINTER, fresh), *floats]
        for place, offset in self.offsets:
            values.append(values[place] + offset)
        values += self.constants
        for pick in self.tuples:
            values.append(pick(values))
        for enter, pick in self.launches:
            enter(*pick(values))
        fresh += self.absent
        return self.outputs(fresh)


def misalignment(pointers: Sequence[int]) -> tuple[int, ...]:
    """Return how far each pointer is from where the JIT calls it aligned, () if all are there."""
    if gcd(ALIGNMENT, *pointers) == ALIGNMENT:
        return ()
    return tuple(pointer % ALIGNMENT for pointer in pointers)


class _Constant(NamedTuple):
    index: int


def make_plan(
    tensors: Sequence[Tensor],
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
    absent = [t for t in returned if not t.numel() and id(t) not in map(id, used)]
    present = [t for t in returned if id(t) not in map(id, absent)]
    found = _origins([*tensors, *present], used)
    if any(isinstance(v, TensorDescriptor) for la, _ in launches for _, v in leaves(la.arguments)):
        return None  # the driver encodes pointers into it
    if found is None or not all(isinstance(binary, CompiledKernel) for _, binary in launches):
        return None
    origins, scratch = found
    device = returned[0].device
    fresh = [(tuple(t.shape), t.stride(), t.dtype) for t in present]
    if scratch:
        fresh.append(((scratch,), (1,), torch.uint8))
    order = [id(t) for t in present] + [0] * bool(scratch) + [id(t) for t in absent]
    pick_outputs = picker([order.index(id(t)) for t in returned])

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

    entries: list[Callable[..., None]] = []
    trees: list[list[Any]] = []
    for (launch, binary), places in zip(launches, scalars):
        grid = (*launch.grid, 1, 1)[:3]
        head = (binary.function, binary.packed_metadata, None, None, None)
        given = (launch.arguments.get(p.name, p.default) for p in launch.kernel.params)
        named = zip(given, (f".{p.name}" for p in launch.kernel.params))
        tree = [*map(constant, grid), 0, *map(constant, head)]
        tree += [place(value, path, places) for value, path in named]
        enter, handed = entry(binary.run, len(tree))
        entries.append(enter)
        trees.append(_substituted(handed, tree, constant))

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
        gpu=device.index if device.type == "cuda" else None,
        allocate=_ALLOCATE[device.type],
        fresh=tuple(fresh),
        absent=tuple(absent),
        outputs=itemgetter(0) if isinstance(outputs, Tensor) else pick_outputs,
        offsets=tuple((1 + base, offset) for base, offset in offsets),
        constants=tuple(constants),
        tuples=tuple(tuples),
        launches=tuple(zip(entries, picks)),
        binaries=tuple(binary for _, binary in launches),
        pre_run_hooks=tuple(launch.kernel.pre_run_hooks for launch, _ in launches),
    )


class _Argument(NamedTuple):
    index: int


def entry(run: Callable[..., None], count: int) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return what a binary's launcher calls, and with what: its own arguments, by index, and more.

    Triton's launcher for CUDA is Python around a function in C, and does no more than allocate
    scratch where a kernel asks for it, and put what it was given in order: that is seen here once.
    """
    arguments = tuple(map(_Argument, range(count)))
    if not isinstance(run, CudaLauncher) or run.global_scratch_size or run.profile_scratch_size:
        return run, arguments
    seen: list[tuple[Any, ...]] = []
    double = copy(run)
    double.launch = lambda *handed: seen.append(handed)
    double(*arguments)
    return run.launch, seen[0]


def _substituted(handed: Any, tree: list[Any], constant: Callable[[Any], _Constant]) -> list[Any]:
    """Return a launch's arguments: nodes of `tree`, constants, and lists of these for tuples."""

    def node(value: Any) -> Any:
        if isinstance(value, _Argument):
            return tree[value.index]
        if isinstance(value, tuple) and any(isinstance(v, _Argument) for v in value):
            return _substituted(value, tree, constant)
        return constant(value)

    return [node(value) for value in handed]


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
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        observed()
        or getattr(enter, "calls", enter)  # of a chain; or else what somebody put in its place
        or getattr(leave, "calls", leave)
        or runtime.debug
        or knobs.compilation.instrumentation_mode
    )


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
