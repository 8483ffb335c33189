"""Plans: what a call allocated and launched, written down as a function that does it again.

A plan is made of one recorded call. Its text is Python, compiled once, and reads like this:

    def run(pointers, args):
        (p0, p1, p2, ) = pointers
        stream = driver.active.get_current_stream(0)
        t0 = allocate((2, 12, 5, 6), (360, 30, 6, 1), dtype2)
        p3 = t0.data_ptr()
        enter3(2, 1, 1, stream, 94036, (2, 1, 0), None, None, None, p3, p0, (p1, p2 + 64), args[3])
        return t0

A plan knows every tensor that a launch takes by where its memory comes from: an argument of the op,
an output, or scratch, which it allocates in one piece; views of these are an offset away. The op's
floats it takes from the call's arguments. All else is as it was, literally or by a name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import Launch

_SCRATCH_ALIGNMENT = 256  # bytes

# what Inductor's code allocates with, on the current device: a third faster than torch.empty_like
_ALLOCATE: dict[str, Callable[..., Tensor]] = {
    "cpu": guards._empty_strided_cpu,  # pyright: ignore
    "cuda": guards._empty_strided_cuda,  # pyright: ignore
}

Scalars = list[dict[str, int]]
"""Launch by launch, the place among the op's arguments of the float that is handed on, by path."""


class Plan(NamedTuple):
    """What a call comes to; `run` takes where its tensors lie, and its arguments."""

    run: Callable[[list[int], tuple[Any, ...]], Any]
    text: str
    binaries: tuple[CompiledKernel, ...]  # whose code stays loaded as long as they live
    pre_run_hooks: tuple[list[Any], ...]  # of the kernels, which may get some later


def make_plan(
    tensors: Sequence[Tensor],
    outputs: Tensor | tuple[Tensor, ...],
    launches: Sequence[tuple[Launch, Any]],
    scalars: Scalars,
) -> Plan | None:
    """Return the plan that does what was recorded, or None where it cannot be told.

    Args:
        tensors: what the op was given, each an object of its own.
        outputs: what it returned.
        launches: what it launched, each with its binary.
        scalars: where the launches take the op's floats.
    """
    returned = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    taken = [v for launch, _ in launches for _, v in leaves(launch.arguments)]
    if any(isinstance(v, TensorDescriptor) for v in taken):
        return None  # the driver encodes pointers into it
    used = [v for v in taken if isinstance(v, Tensor)]
    absent = [t for t in returned if not t.numel() and id(t) not in map(id, used)]
    present = [t for t in returned if id(t) not in map(id, absent)]
    known = [*tensors, *present]
    found = _origins(known, used)
    if found is None or not all(isinstance(binary, CompiledKernel) for _, binary in launches):
        return None
    origins, scratch = found

    text = _Text(returned[0].device, len(tensors))
    for t in present:
        text.allocate(tuple(t.shape), t.stride(), t.dtype)
    if scratch:
        text.allocate((scratch,), (1,), torch.uint8)
    for (launch, binary), places in zip(launches, scalars):
        text.enter(launch, binary, origins, places)
    made = {id(t): f"t{i}" for i, t in enumerate(present)}
    made |= {id(t): text.value(t) for t in absent}  # nothing can be written to them
    names = [made[id(t)] for t in returned]
    text.lines.append(f"return {names[0] if isinstance(outputs, Tensor) else _tuple(names)}")
    return Plan(
        *text.compiled(),
        binaries=tuple(binary for _, binary in launches),
        pre_run_hooks=tuple(launch.kernel.pre_run_hooks for launch, _ in launches),
    )


class _Varying(str):
    """An expression, in the place of a value that is another one in each call."""


class _Text:
    """The text of a plan, and the objects that it names.

    Pointers are p0, p1, ...: those to the call's tensors and then to the allocated ones, t0, t1...
    """

    def __init__(self, device: torch.device, pointers: int) -> None:
        self.lines = [f"{_tuple([f'p{i}' for i in range(pointers)])} = pointers"]
        self._names: dict[str, Any] = {"driver": driver, "allocate": _ALLOCATE[device.type]}
        self._given, self._made = pointers, 0
        if device.type == "cuda":
            self._names |= {"current": torch.cuda.current_device, "on": torch.cuda.device}
            self.lines += [
                f"if current() != {device.index}:",
                f"    with on({device.index}):",
                "        return run(pointers, args)",
            ]
        self.lines.append(f"stream = driver.active.get_current_stream({device.index})")

    def value(self, value: Any) -> str:
        """Return what stands for a value: an expression, a literal or a name."""
        if isinstance(value, _Varying):
            return value
        if _is_literal(value):
            return repr(value)
        if isinstance(value, tuple) and any(isinstance(v, _Varying) for _, v in leaves(value)):
            return _tuple([self.value(v) for v in value])
        return self._name("c", value)

    def _name(self, stem: str, value: Any) -> str:
        name = f"{stem}{len(self._names)}"
        self._names[name] = value
        return name

    def allocate(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> None:
        """Add an allocation."""
        i, self._made = self._made, self._made + 1
        self.lines.append(f"t{i} = allocate({shape}, {stride}, {self._name('dtype', dtype)})")
        self.lines.append(f"p{self._given + i} = t{i}.data_ptr()")

    def enter(
        self,
        launch: Launch,
        binary: CompiledKernel,
        origins: dict[int, tuple[int, int]],
        places: dict[str, int],
    ) -> None:
        """Add a launch, whose tensors lie at `origins` and whose floats come from `places`."""

        def varying(value: Any, path: str) -> Any:
            if path in places:
                return _Varying(f"args[{places[path]}]")
            if isinstance(value, Tensor):
                pointer, offset = origins[id(value)]
                return _Varying(f"p{pointer} + {offset}" if offset else f"p{pointer}")
            if isinstance(value, tuple):
                return tuple(varying(v, f"{path}.{i}") for i, v in enumerate(value))
            return value

        grid = (*launch.grid, 1, 1)[:3]
        head = (_Varying("stream"), binary.function, binary.packed_metadata, None, None, None)
        given = ((p.name, launch.arguments.get(p.name, p.default)) for p in launch.kernel.params)
        arguments = (*grid, *head, *(varying(value, f".{name}") for name, value in given))
        function, handed = _seen_through(binary.run, arguments)
        call = ", ".join(map(self.value, handed))
        self.lines.append(f"{self._name('enter', function)}({call})")

    def compiled(self) -> tuple[Callable[[list[int], tuple[Any, ...]], Any], str]:
        """Return the function and its text."""
        text = "\n    ".join(["def run(pointers, args):", *self.lines])
        exec(compile(text, "<a plan>", "exec"), self._names)
        return self._names["run"], text


def _tuple(parts: Sequence[str]) -> str:
    return f"({''.join(f'{part}, ' for part in parts)})"


def _is_literal(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_literal, value))
    return value is None or type(value) in (bool, int)


def _seen_through(
    run: Callable[..., None], arguments: tuple[Any, ...]
) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return what a binary's launcher calls when it is given `arguments`, and with what.

    Triton's launcher for CUDA is Python around a function in C, and does no more than allocate
    scratch where a kernel asks for it, and put what it was given in order: that is seen here once.
    """
    if not isinstance(run, CudaLauncher) or run.global_scratch_size or run.profile_scratch_size:
        return run, arguments
    seen: list[tuple[Any, ...]] = []
    double = copy(run)
    double.launch = lambda *handed: seen.append(handed)
    double(*arguments)
    return run.launch, seen[0]


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


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested tuples and dicts, each with its path."""
    if isinstance(tree, dict | tuple):
        for key, branch in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(branch, f"{path}.{key}")
    else:
        yield path, tree
