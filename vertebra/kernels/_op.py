"""Dispatch: the one place that chooses how an op runs, and the only one that reads the environment.

An op has two implementations of one contract. `eager` is the definition, in plain PyTorch:
autograd, Inductor and every device know what to do with it. `triton` is the fast path.
`Op.__call__` takes the fast path unless the op *refuses*, and a refusal is a sentence, so that
`vertebra.explain` can show it and `backend("triton")` can raise it. An op with more implementations
than these two *chooses* among them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Generator
from contextlib import ContextDecorator, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from ._signature import Signatures
from ._watch import watching

__all__ = [
    "INTERPRETED",
    "Call",
    "Choice",
    "Op",
    "Registered",
    "Traffic",
    "backend",
    "current_backend",
    "define",
    "has_kernels",
    "is_observed",
    "is_plain",
    "observe",
    "refuses",
    "sums_dtype",
    "wants_grad",
]

Backend = Literal["auto", "triton", "eager"]
_BACKENDS: tuple[str, ...] = ("auto", "triton", "eager")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
"""Whether Triton kernels run in the Triton interpreter, which makes them serve CPU tensors."""


def _checked(name: str, source: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(_BACKENDS)}; got {name!r}")
    return name


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


_TRITON_INSTALLED = _has_triton()
_forced: str = _checked(os.environ.get("VERTEBRA_BACKEND", "auto"), "VERTEBRA_BACKEND")
_observer: Callable[[Call], None] | None = None


class backend(ContextDecorator):
    """Choose the implementation of every op inside a `with` block (or a decorated function).

    * `"auto"`: Triton where it applies, eager elsewhere; `vertebra.explain` says which and why.
    * `"triton"`: Triton, or `NotImplementedError` naming the op and the reason.
    * `"eager"`: plain PyTorch.

    The setting is one value for the process, as `torch.backends` flags are; `VERTEBRA_BACKEND` sets
    the initial one. A compiled function guards on it and recompiles when it changes.

    >>> with backend("eager"):
    ...     current_backend()
    'eager'
    """

    def __init__(self, name: Backend) -> None:
        self.name = _checked(name, "backend")
        self._outer: list[str] = []

    def __enter__(self) -> None:
        global _forced
        self._outer.append(_forced)
        _forced = self.name

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._outer.pop()


def current_backend() -> str:
    """Return the backend in force: `"auto"`, `"triton"` or `"eager"`."""
    return _forced


class Traffic(NamedTuple):
    """Bytes of memory one call has to move: each input read once, each output written once."""

    forward: int
    backward: int


class Choice(NamedTuple):
    """How a call runs: the path that `explain` shows, the implementation, why it is not Triton.

    `lasts`: calls of the same signature run so without being asked about, or checked, again.
    """

    path: str
    run: Callable[..., Any]
    reason: str | None
    lasts: bool = False


class Call(NamedTuple):
    """One call of an op, as `observe` reports it."""

    op: Op
    args: tuple[Any, ...]
    path: str
    reason: str | None


_lasting: list[Signatures] = []


def forget_choices() -> None:
    """Let every op choose anew."""
    for chosen in _lasting:
        chosen.clear()


@dataclass(frozen=True, eq=False)
class Op:
    """One contract and its implementations, all with the same positional arguments.

    `check` raises for arguments that break the contract, by their types, shapes, devices and flags
    alone: a call of the signature of an earlier one (`_signature`) has passed it already.
    `choose` is for an op that has more than the two implementations: how "auto" runs a call.
    """

    name: str
    check: Callable[..., None]
    eager: Callable[..., Any]
    triton: Callable[..., Any]
    refuses: Callable[..., str | None]
    traffic: Callable[..., Traffic]
    choose: Callable[..., Choice] | None = None

    def __call__(self, *args: Any) -> Any:
        x = args[0]
        if (
            isinstance(x, Tensor)
            and (x.is_cuda or INTERPRETED)
            # what is replayed is what "auto" chose
            and (_forced == "auto" or (_forced == "triton" and self.choose is None))
            and _observer is None
            and not torch.compiler.is_compiling()
        ):
            if not (torch.is_grad_enabled() and any(map(_requires_grad, args))):
                return self._replay(*args)
            if self._passed.find(args) is not None:
                return self.triton(*args)
            if is_plain(args):
                self.check(*args)
                if self.refuses(*args) is None:
                    self._passed.note(args)
        elif isinstance(x, Tensor) and _forced == "auto" and _observer is None:
            found = None if torch.compiler.is_compiling() else self._chosen.find(args)
            run = None if found is None else found[0].plans.get(torch.is_grad_enabled())
            if run is not None:
                return run(*args)
        return self._run(*args)

    @cached_property
    def _replay(self) -> Callable[..., Any]:
        return _repeated(self._run)

    @cached_property
    def _passed(self) -> Signatures:
        """The signatures of calls with gradients that passed the check and are not refused."""
        return Signatures()

    @cached_property
    def _chosen(self) -> Signatures:
        """The signatures of calls of which the choice lasts; the plan by grad mode is what runs."""
        chosen = Signatures()
        _lasting.append(chosen)
        return chosen

    def _run(self, *args: Any) -> Any:
        self.check(*args)
        choice = self._choice(*args)
        if choice.lasts and is_plain(args):
            self._chosen.note(args)[0].plans[torch.is_grad_enabled()] = choice.run
        if _observer is not None:
            _observer(Call(self, args, choice.path, choice.reason))
        return choice.run(*args)

    def _choice(self, *args: Any) -> Choice:
        if _forced == "eager":
            return Choice("eager", self.eager, "backend is set to eager")
        if _forced == "auto" and self.choose is not None:
            return self.choose(*args)
        reason = self.refuses(*args)
        if reason is None:
            return Choice("triton", self.triton, None)
        if _forced == "triton":
            raise NotImplementedError(
                f"{self.name} cannot run on Triton: {reason}. "
                f'Use backend("auto") to let such calls run in eager PyTorch.'
            )
        return Choice("eager", self.eager, reason, lasts=True)


@contextmanager
def observe(callback: Callable[[Call], None]) -> Generator[None]:
    """Report every op call inside the block to `callback`."""
    global _observer
    outer, _observer = _observer, callback
    try:
        yield
    finally:
        _observer = outer


def is_observed() -> bool:
    """Return whether somebody wants to hear of every call."""
    return _observer is not None


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_PIXELS = 2**31 - 2**16
_EMPTY = "empty input"


def has_kernels(x: Tensor) -> bool:
    """Return whether kernels run where x is."""
    return x.is_cuda or (INTERPRETED and x.is_cpu)


def refuses(x: Tensor, *rest: Any) -> str | None:
    """Return why no kernel takes a call with these arguments: the limits that all ops have."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if forward_ad._current_level >= 0:  # pyright: ignore[reportPrivateUsage]
        return "forward-mode differentiation, which kernels have no rule for"
    if not has_kernels(x):
        return f"device {x.device.type} (Triton needs a GPU, or TRITON_INTERPRET=1 on the CPU)"
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype}"
    if (reason := _refuses_size(x)) is not None:
        return reason
    for v in rest:
        if isinstance(v, Tensor) and v.dim() == 1 and not v.is_contiguous():
            return "a vector that is not contiguous"
    return None


def _refuses_size(x: Tensor) -> str | None:
    is_so: Callable[[Any], bool] = bool
    if torch.compiler.is_exporting():
        # asked about, a size that is not known yet would be limited to what answers like this one
        from torch.fx.experimental.symbolic_shapes import statically_known_true as is_so
    numel = x.numel()
    if is_so(numel == 0):
        return _EMPTY
    if is_so(numel >= _MAX_PIXELS) and is_so(numel // x.shape[1] >= _MAX_PIXELS):
        return "N*H*W does not fit a 32-bit pixel index"
    return None


_library = torch.library.Library("vertebra", "FRAGMENT")


def define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Registered]:
    """Register a device implementation as the functional torch op `vertebra::<schema>`.

    Plain `define`/`impl` with the `autograd.Function` outside costs a quarter of what
    `torch.library.custom_op` costs per call.
    """
    name = schema.partition("(")[0]

    def register(impl: Callable[..., Any]) -> Registered:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        registered = Registered(getattr(torch.ops.vertebra, name).default, impl, fake)
        _library.impl(name, registered.dispatched, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vertebra::{name}", fake, lib=_library)
        return registered

    return register


class Registered:
    """A registered op, which plain eager calls reach without PyTorch's dispatcher."""

    def __init__(self, op: Any, impl: Callable[..., Any], allocate: Callable[..., Any]) -> None:
        self.op = op
        self._impl = self._direct = impl
        self._allocate = allocate

    def __call__(self, *args: Any) -> Any:
        return self.op(*args) if torch.compiler.is_compiling() else self._replay(*args)

    def in_place(self, impl: Callable[..., Any]) -> Callable[..., Any]:
        """Make `impl` what plain eager calls run, which may write to arguments of the op."""
        self._direct = impl
        return impl

    def dispatched(self, *args: Any) -> Any:
        """Run for PyTorch's dispatcher: of an exported program the first to know all sizes."""
        reason = _refuses_size(args[0])
        if reason == _EMPTY:
            return tree_map_only(Tensor, torch.zero_, self._allocate(*args))  # sums of nothing
        if reason is not None:
            raise NotImplementedError(
                f"{self.op} cannot run: {reason}. Give the program smaller batches."
            )
        return self._dispatched_replay(*args)

    def _run(self, *args: Any) -> Any:
        return self._direct(*args) if is_plain(args) else self.op(*args)

    @cached_property
    def _replay(self) -> Callable[..., Any]:
        return _repeated(self._run)

    @cached_property
    def _dispatched_replay(self) -> Callable[..., Any]:
        return _repeated(self._impl)


def _repeated(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Return `implementation` as repeated by `_triton._replay`, which the first call imports."""
    if not _TRITON_INSTALLED:
        return implementation
    from ._triton._replay import repeated

    return repeated(implementation, is_plain)


_PLAIN = {Tensor, torch.nn.Parameter, torch.Size, type(None), bool, int, float, str, list, tuple}


def is_plain(args: tuple[Any, ...]) -> bool:
    """Return whether PyTorch just runs what it is told: nothing traces, transforms or wraps it.

    Nor has it put off a negation, which its dispatcher would make up for.
    """
    if torch.compiler.is_compiling():
        return False
    return not (
        torch._C._len_torch_dispatch_stack() > watching.depth  # pyright: ignore
        or torch._C._are_functorch_transforms_active()  # pyright: ignore
        or not _PLAIN.issuperset(map(type, args))
        or any([a.is_neg() for a in args if isinstance(a, Tensor)])
    )


def sums_dtype(x: Tensor) -> torch.dtype:
    """Return what statistics, sums and whatever else is computed from `x` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _requires_grad(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


def wants_grad(*tensors: Tensor | None) -> bool:
    """Return whether autograd will ask for a gradient of any of `tensors`."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
