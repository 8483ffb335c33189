"""Modules on CPUs whose calls of PyTorch's ops are recorded, and run again without the modules.

What a module calls follows from its state, from the shape, the strides and the type of x, and from
how PyTorch is set. When all that comes a second time the calls are recorded
(`vertebra.kernels._recording`); from the third time on they are run, if a comparison with the state
then finds nothing else: every attribute of every module, every parameter and where it lies, hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards
from torch.nn.modules import module as torch_modules

from ..kernels._onednn import is_packed
from ..kernels._op import is_observed, is_plain
from ..kernels._recording import Run, record
from ..kernels._signature import Signatures
from ..kernels.conv2d_act import runs_on_onednn
from ._act import has_hooks

# each keeps the weights that oneDNN has packed for it
_MOST_SHAPES = 4

_of: weakref.WeakKeyDictionary[nn.Module, _Recordings] = weakref.WeakKeyDictionary()


def recorded(module: nn.Module, forward: Run, x: Any) -> Any:
    """Return forward(x), which is `module`'s, by what was recorded of it if that can be.

    That is, if x is a tensor, and what comes back one, or a list or tuple of some.
    """
    if not _is_ordinary(x):
        return forward(x)
    recordings = _of.get(module)
    if recordings is None or not recordings.hold():
        _of[module] = recordings = _Recordings(module)
    return recordings.run(forward, x)


def forget(module: nn.Module) -> None:
    """Drop what was recorded of a module."""
    _of.pop(module, None)


def _is_ordinary(x: Any) -> bool:
    """Return whether oneDNN runs convolutions of x, and nobody looks on or has a part in it."""
    return (
        type(x) is Tensor
        and runs_on_onednn(x)
        and not is_observed()
        and not torch.is_autocast_enabled("cpu")
        and not torch_modules._has_any_global_hook()  # pyright: ignore
        and is_plain((x,))
    )


def _is_known(module: nn.Module) -> bool:
    """Return whether a call of `module` comes to calls of ops that follow from its state.

    A class of another library is known to do so by REPEATS.
    """
    kind = type(module)
    ours = kind.forward.__module__.startswith(("torch.nn.modules.", "vertebra."))
    return (ours or hasattr(kind, "REPEATS")) and not has_hooks(module)


class _Recordings:
    """The recordings of one module in one state, by what x is like."""

    def __init__(self, module: nn.Module) -> None:
        _, *inside = module.modules()
        unknown = next((m for m in inside if not _is_known(m)), None)
        self._unknown = None if unknown is None else weakref.ref(unknown)
        self._state = _State(module) if unknown is None else None
        self._signatures = Signatures()

    def hold(self) -> bool:
        """Return whether the module's state is what it was, or still has what keeps it from here.

        Then that is all that is asked: the stages inside compare their states, too.
        """
        if self._state is not None:
            return self._state.holds()
        unknown = None if self._unknown is None else self._unknown()
        return unknown is not None and not _is_known(unknown)

    def run(self, forward: Run, x: Tensor) -> Any:
        """Return forward(x)."""
        if self._state is None:
            return forward(x)
        found = self._signatures.find((x,))
        if found is None:
            if len([*self._signatures]) == _MOST_SHAPES:
                self._signatures.clear()
            self._signatures.note((x,))[0].plans[()] = _SEEN_ONCE
            return forward(x)
        plan = found[0].plans[()]
        if plan is _SEEN_ONCE:
            noted = record(forward, x, self._state.has)
            text = noted.text
            found[0].plans[()] = _ORDINARY if text is None else text.compiled()
            return noted.y
        return forward(x) if plan is _ORDINARY else plan(x)


_SEEN_ONCE, _ORDINARY = "seen once", "ordinary"


# what is in a module of PyTorch beside what its calls follow from
_OF_NO_CALL = frozenset(
    {
        *("_state_dict_hooks", "_state_dict_pre_hooks"),
        *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
        # say more of hooks that others hold
        *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
        "_forward_hooks_always_called",
    }
)


class _State:
    """All that the calls of a module follow from, but what it is given.

    It is compared before every call, when the last one has just driven it out of the caches: a
    comparison costs the memory that it looks at.
    """

    def __init__(self, module: nn.Module) -> None:
        self._attributes = [vars(m) for m in module.modules()]
        self._as_they_were = [dict(attributes) for attributes in self._attributes]
        dicts = [
            v
            for attributes in self._attributes
            for name, v in attributes.items()
            if isinstance(v, dict) and name not in _OF_NO_CALL
        ]
        self._empty = [d for d in dicts if not d]  # hooks, above all
        self._held = [d for d in dicts if d]
        self._things = self._contents()
        tensors = {id(v): v for v in self._things if isinstance(v, Tensor)}
        self._tensors, self._ids = list(tensors.values()), tensors.keys()
        guards = TensorGuards(*self._tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        self._like: Callable[..., bool] = guards.check
        # where a tensor has no version, nothing is packed of it
        self._written = [t for t in self._tensors if not t.is_inference()]
        self._places, self._versions = self._where(), self._how_often()

    def has(self, t: Tensor) -> bool:
        """Return whether a tensor stays as long as the state: a parameter, or its packed copy."""
        return id(t) in self._ids or t.is_mkldnn or is_packed(t)

    def holds(self) -> bool:
        """Return whether all is as it was."""
        things = self._contents()
        return (
            not any(self._empty)
            and len(things) == len(self._things)
            and all(map(is_, things, self._things))
            and self._where() == self._places
            and self._how_often() == self._versions
            and self._like(*self._tensors)
            and self._attributes == self._as_they_were
        )

    def _contents(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._held))]

    def _where(self) -> list[int]:
        """Return where the tensors lie."""
        return [*map(Tensor.data_ptr, self._tensors)]

    def _how_often(self) -> list[int]:
        """Return how often the tensors were written to."""
        return [t._version for t in self._written]
