"""What a case would launch on a GPU, found out on meta tensors, so at any size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import backend
from ..kernels._op import Call, observe
from ..kernels._triton._launch import Launch, captured
from .cases import Case


class Launches(NamedTuple):
    """The call that a case makes of its op, and the launches of its two passes."""

    call: Call
    forward: list[Launch]
    backward: list[Launch]


class _OnMeta(TorchDispatchMode):
    """Give meta tensors the implementation that a GPU would run, not the fake one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "vertebra":
            return func(*args, **(kwargs or {}))
        keys = torch.DispatchKeySet(torch.DispatchKey.CPU)
        return torch.library.get_kernel(func, "CPU").call_boxed(keys, *args)


def launches(case: Case, wanted: tuple[str, ...]) -> Launches:
    """Return the launches of `case`, the inputs named in `wanted` wanting a gradient."""
    with torch.device("meta"):
        inputs = case.inputs("meta")
    arguments = {
        name: None if t is None else t.detach().requires_grad_(name in wanted)
        for name, t in inputs.items()
    }
    calls: list[Call] = []
    with backend("eager"), observe(calls.append):
        case.run(arguments)
    (call,) = calls
    with _OnMeta():
        with captured() as forward:
            result = call.op.triton(*call.args)
            y = result if isinstance(result, Tensor) else result[0]
        with captured() as backward:
            if isinstance(y, Tensor) and y.requires_grad:
                y.backward(inputs["dy"])
    return Launches(call, _detached(forward), _detached(backward))


def _detached(found: list[Launch]) -> list[Launch]:
    """Cut off autograd's graph, which cannot follow a launch into another process."""
    return [launch._replace(arguments=_cut(launch.arguments, {})) for launch in found]


def _cut(value: Any, seen: dict[int, Tensor]) -> Any:
    if isinstance(value, dict):
        return {k: _cut(v, seen) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_cut(v, seen) for v in value)
    if isinstance(value, Tensor):  # one tensor in two places stays one
        return seen.setdefault(id(value), value.detach())
    return value
