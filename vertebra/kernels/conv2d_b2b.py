"""Two 1x1 convolutions back to back, each with its epilogue: the map between them is not read back.

    y = act(conv2d(h, weight) + bias + residual)
    z = next_act(conv2d(y, next_weight) + next_bias)

    h = x, or mid_act(conv2d(x, mid_weight, padding=1) + mid_bias), a 3x3

The end of a bottleneck and the beginning of the next one, whose shortcut is y: both y and z are
returned. With the 3x3 in front it is a whole bottleneck, shifted by one convolution, and h is not
written. Inference only: a call that wants a gradient runs the definition, which is differentiable.

Shapes   x (N, B, H, W), B = C without a 3x3; mid_weight (C, B, 3, 3), mid_bias (C,), or None;
         weight (K, C, 1, 1); bias (K,) or None; residual, y (N, K, H, W); next_weight (D, K, 1, 1);
         next_bias (D,) or None; z (N, D, H, W)
Dtypes   as `conv2d_act`; h and y are rounded to x's type before they are multiplied
Layout   any strides; y and z have x's memory format. The kernel needs all maps in channels_last
Bytes    x, the weights, residual, y and z once each
Saves    nothing
Raises   ValueError, TypeError: rank, shape, device or dtype of an argument; unknown act; mid_bias
         or mid_act without mid_weight
Source   back-to-back GEMMs and convolutions of CUTLASS (examples/13), with a map in between that is
         kept. Like calls of `conv2d_act` up to rounding

There are two candidates, by name:

    triton   one kernel of ours, of which a configuration may follow, "triton:128x64:w8:s2"; where
             it does not take a call, and Triton is asked for, one of `conv2d_act` after the other
    apart    two calls of `conv2d_act`, which choose, and are observed, for themselves; of three
             convolutions the 3x3, and then the best for the pair behind it

A call takes the kernel if that takes it. `vertebra.fuse`, which can do without, asks for the "best"
of both: a table of what was measured chooses, as for `conv2d_act`, and where nothing was measured,
arithmetic (`_b2b.advises_against`), which leaves a 3x3 apart.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _choices
from ._b2b import Arguments, advises_against, check, site
from ._conv2d import memory_format, not_channels_last, precision
from ._op import Choice, Op, Traffic, current_backend, define, refuses, wants_grad
from .conv2d_act import op as convolution

Maps = tuple[Tensor, Tensor]


def conv2d_b2b(
    x: Tensor,
    weight: Tensor,
    next_weight: Tensor,
    bias: Tensor | None = None,
    next_bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    next_act: str = "none",
    *,
    mid_weight: Tensor | None = None,
    mid_bias: Tensor | None = None,
    mid_act: str = "none",
) -> Maps:
    """Return `y = act(conv2d(h, weight) + bias + residual)`, and the same of y with the rest.

    >>> x = torch.tensor([1.0, -2.0]).reshape(1, 1, 1, 2)
    >>> double = torch.tensor([2.0]).reshape(1, 1, 1, 1)
    >>> y, z = conv2d_b2b(x, double, double, next_bias=torch.tensor([0.5]), act="relu")
    >>> y.flatten(), z.flatten()
    (tensor([2., 0.]), tensor([4.5000, 0.5000]))
    """
    pair = (x, weight, next_weight, bias, next_bias, residual, act, next_act)
    return op(*_autocast(*pair, mid_weight, mid_bias, mid_act))


def as_one(*args: Any) -> Maps | None:
    """Return what `conv2d_b2b` does where one kernel runs it, else None: apart is as good.

    The arguments are the first of `Arguments`, to `mid_act`.
    """
    a = Arguments(*_autocast(*args))
    if current_backend() == "eager":
        return None
    if torch.compiler.is_compiling():
        # sizes may be symbols there: the registered op chooses when it runs
        one = (_refuses_alone(a) or advises_against(a)) is None
        return op(*a._replace(candidate="best")) if one else None
    name = _best_known(*a) if a.x.numel() else "apart"
    return None if name == "apart" else op(*a._replace(candidate=name))


@_choices.remembered
def _best_known(*args: Any) -> str:
    return _best(Arguments(*args))[0]


def _autocast(x: Tensor, weight: Tensor, next_weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Return the arguments of the op, cast as autocast casts those of convolutions."""
    bias, next_bias, residual, act, next_act, mid_weight, mid_bias, mid_act = rest
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype != torch.float64 and x.is_floating_point():
            x, weight, next_weight = x.to(dtype), weight.to(dtype), next_weight.to(dtype)
            residual = None if residual is None else residual.to(dtype)
            mid_weight = None if mid_weight is None else mid_weight.to(dtype)
    pair = (x, weight, next_weight, bias, next_bias, residual, act, next_act)
    return *pair, mid_weight, mid_bias, mid_act, precision(x), ""


def _eager(*args: Any) -> Maps:
    a = Arguments(*args)
    h = a.x if a.mid_weight is None else convolution.eager(*a.mid)
    y = convolution.eager(*a.first(h))
    return y, convolution.eager(*a.second(y))


def _apart(*args: Any) -> Maps:
    a = Arguments(*args)
    if a.mid_weight is not None:
        return op(*a.behind_mid(convolution(*a.mid))._replace(candidate="best"))
    y = convolution(*a.first(a.x))
    return y, convolution(*a.second(y))


def _outputs(*args: Any) -> Maps:
    a = Arguments(*args)
    return _empty(a, a.x.device)


def _empty(a: Arguments, device: torch.device) -> Maps:
    (N, _, H, W), (_, K, D) = a.x.shape, a.widths
    wanted = memory_format(a.x)
    like: dict[str, Any] = {"dtype": a.x.dtype, "device": device, "memory_format": wanted}
    return torch.empty((N, K, H, W), **like), torch.empty((N, D, H, W), **like)


@define(
    "conv2d_b2b(Tensor x, Tensor weight, Tensor next_weight, Tensor? bias, Tensor? next_bias, "
    "Tensor? residual, str act, str next_act, Tensor? mid_weight, Tensor? mid_bias, str mid_act, "
    "str precision, str candidate) -> (Tensor, Tensor)",
    _outputs,
)
def _forward(*args: Any) -> Maps:
    """Run the candidate that is named, or else that is best for the sizes of this call."""
    from ._triton import conv2d_b2b as kernels

    a = Arguments(*args)
    name = _chosen(a)[0]
    if name == "apart":
        return _apart(*args)
    if name == "triton" and _refuses_as_one(a, name) is not None:
        if a.mid_weight is not None:
            return _triton(*a.behind_mid(convolution.triton(*a.mid)))
        y = convolution.triton(*a.first(a.x))
        return y, convolution.triton(*a.second(y))
    y, z = _outputs(*args)
    kernels.forward(
        _launched(a, y, z),
        (a.mid_bias, a.bias, a.next_bias),
        (a.mid_act, a.act, a.next_act),
        a.precision or precision(a.x),
        name.partition(":")[2],
    )
    return y, z


def _launched(a: Arguments, y: Tensor, z: Tensor) -> Any:
    """Return the tensors of a call as the kernel's launcher takes them."""
    from ._triton.conv2d_b2b import Pair

    return Pair(y, z, a.x, a.mid_weight, a.weight, a.residual, a.next_weight)


# ------------------------------------------------------------------------------ who runs which call


def _refuses(*args: Any) -> str | None:
    """Return why a call does not run on Triton, as one kernel or as several."""
    a = Arguments(*args)
    if ":" in a.candidate and not torch.compiler.is_compiling():
        return _refuses_as_one(a, a.candidate)
    return _refuses_alone(a)


def _refuses_alone(a: Arguments) -> str | None:
    # h has x's layout, so x may stand for it
    reason = convolution.refuses(*a.first(a.x)) or refuses(a.x, a.next_bias)
    if a.mid_weight is not None:
        reason = reason or convolution.refuses(*a.mid)
    if reason is not None:
        return reason
    if wants_grad(a.next_weight, a.next_bias):
        return "a gradient is wanted (the kernels are for inference)"
    (_, _, H, W), (_, K, _) = a.x.shape, a.widths
    name = "x" if H * W > 1 and memory_format(a.x) == torch.contiguous_format else ""
    name = "next_weight" if a.next_weight.stride(1) != 1 else name
    if K > 1 and name:
        return not_channels_last(name)
    return None


def _refuses_as_one(a: Arguments, name: str) -> str | None:
    """Return why a call does not run as one kernel, by the candidate `name`."""
    from ._triton import conv2d_b2b as kernels

    kind, _, configuration = name.partition(":")
    if kind != "triton":
        return f"no candidate {name!r} (one of triton, apart)"
    if not a.x.is_meta and (reason := _refuses_alone(a)) is not None:
        return reason
    pair = _launched(a, *_empty(a, torch.device("meta")))
    return kernels.refuses(pair, a.precision or precision(a.x), configuration)


def _best(a: Arguments) -> tuple[str, str]:
    """Return the best candidate for a call, and why."""
    from ._triton import conv2d_b2b as kernels

    if current_backend() == "triton":
        reason = _refuses_as_one(a, "triton")
        return ("triton", "asked for") if reason is None else ("apart", reason)
    device = _choices.device_name(a.x.device)
    measured = _choices.best(op.name, device, site(a), a.x.shape[0])
    if measured == "apart" or (measured and _refuses_as_one(a, measured) is None):
        return measured, f"measured to be the fastest on {device}"
    reason = advises_against(a) or _refuses_as_one(a, "triton")
    if reason is None and not kernels.fills(_launched(a, *_empty(a, torch.device("meta")))):
        reason = "fewer tiles than multiprocessors"
    return ("triton", "arithmetic") if reason is None else ("apart", reason)


def _choose(*args: Any) -> Choice:
    """Return how "auto" runs a call."""
    a = Arguments(*args)
    if a.candidate not in ("", "best", "apart"):
        reason = _refuses_as_one(a, a.candidate)
        if reason is not None:
            raise NotImplementedError(f"conv2d_b2b cannot run as {a.candidate!r}: {reason}")
        return Choice("triton", _forward, None)
    reason = _refuses_alone(a)
    if reason is not None:
        return Choice("eager", _eager, reason, lasts=True)
    if torch.compiler.is_compiling():
        return Choice("triton", _forward, None)
    name, reason = _chosen(a)
    if name == "apart":
        return Choice("apart", _apart, reason)
    return Choice("triton", partial(_run_as, name), None)


def _chosen(a: Arguments) -> tuple[str, str]:
    """Return the candidate that runs a call which is not refused, and why."""
    if a.candidate == "best":
        return _best(a)
    if a.candidate:
        return a.candidate, "asked for"
    reason = _refuses_as_one(a, "triton")
    return ("triton", "one kernel takes it") if reason is None else ("apart", reason)


def _run_as(name: str, *args: Any) -> Maps:
    return _forward(*args[:-1], name)


def _triton(*args: Any) -> Maps:
    return _forward(*args[:-1], args[-1] or "triton")


def candidates(*args: Any) -> list[str]:
    """Return the candidates for a call of the op, configurations and all: what to measure.

    Any of them, as the last argument, runs the call.
    """
    a = Arguments(*args)
    return ["apart", *(configurations(*args) if _refuses_as_one(a, "triton") is None else ())]


def configurations(*args: Any) -> list[str]:
    """Return what the kernel may run a call as: the analytic choice first. Meta tensors will do."""
    from ._triton import conv2d_b2b as kernels

    a = Arguments(*args)
    pair = _launched(a, *_empty(a, torch.device("meta")))
    return [f"triton:{text}" for text in kernels.configurations(pair)]


def _traffic(*args: Any) -> Traffic:
    a = Arguments(*args)
    _, K, D = a.widths
    pixels = a.x.numel() // a.x.shape[1]
    maps = a.x.numel() + pixels * (K * (1 if a.residual is None else 2) + D)
    weights = sum(w.numel() for w in (a.mid_weight, a.weight, a.next_weight) if w is not None)
    return Traffic((maps + weights) * a.x.element_size(), 0)


op = Op("conv2d_b2b", check, _eager, _triton, _refuses, _traffic, _choose)
