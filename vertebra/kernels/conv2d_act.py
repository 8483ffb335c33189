"""Convolution with everything behind it: scale, bias, residual and activation in its epilogue.

    y = act(conv2d(x, weight) * scale + bias + residual)

Inference only: a call that wants a gradient runs the eager definition, which is differentiable.

Shapes   x (N, C, H, W); weight (K, C/groups, R, S); scale, bias (K,) or None;
         residual, y (N, K, P, Q), P = (H + 2 padding - dilation (R - 1) - 1) // stride + 1, Q alike
Dtypes   x fp16 | bf16 | fp32 | fp64, weight, residual and y as x; scale and bias as x or fp32; sums
         and epilogue in fp32 (fp64 for fp64), one rounding, to y. fp32 is multiplied as fp32 or
         TF32, as `torch.backends.cudnn.conv.fp32_precision` says. Under autocast all is cast to its
         type
Layout   any strides; y has x's memory format. Kernels of ours need x and weight in channels_last
Bytes    x, weight, residual and y once each; where steps are longer than the window, of x only the
         pixels that a window has
Saves    nothing
Raises   ValueError, TypeError: rank, shape, groups, step, device or dtype of an argument; unknown
         act
Source   Chetlur et al. 2014 (arXiv:1410.0759), implicit GEMM. Like aten up to rounding: aten rounds
         after the convolution, the scale, the bias and the add

There are several implementations, the *candidates*, by name:

    triton        one kernel of ours; a configuration may follow, "triton:gather:128x64x64x1:w4:s3"
    cudnn         PyTorch's convolution, and one kernel of ours for the rest
    cudnn_fused   cuDNN's own convolution + bias (+ residual) + relu
    onednn        oneDNN's, on CPUs, with weights packed once (`_onednn`)
    onednn_linear oneDNN's linear layer, where all there is of a window is 1x1
    mkl           MKL's product, alike, and PyTorch's ops for the rest

and the eager definition. `_choose` is where they compete.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _choices, _onednn
from ._act import finish
from ._conv2d import (
    Arguments,
    Pair,
    check,
    elements_read,
    memory_format,
    not_channels_last,
    pair,
    precision,
    site,
)
from ._op import (
    Choice,
    Op,
    Traffic,
    current_backend,
    define,
    has_kernels,
    refuses,
    wants_grad,
)


def conv2d_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    scale: Tensor | None = None,
) -> Tensor:
    """Return `act(conv2d(x, weight) * scale + bias + residual)`; the module docstring has the rest.

    >>> x = torch.tensor([1.0, -2.0, 3.0]).reshape(1, 1, 1, 3)
    >>> weight = torch.tensor([1.0, 1.0]).reshape(1, 1, 1, 2)
    >>> conv2d_act(x, weight, torch.tensor([0.5]), act="relu").flatten()
    tensor([0.0000, 1.5000])
    """
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        x, weight, residual = cast_by_autocast(x, weight, residual)
    steps = (pair("stride", stride), pair("padding", padding), pair("dilation", dilation))
    return op(x, weight, scale, bias, residual, *steps, groups, act, precision(x), "")


def cast_by_autocast(
    x: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast casts the arguments of a convolution."""
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x, weight, residual
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if residual is None else residual.to(dtype)


def _eager(*args: Any) -> Tensor:
    a = Arguments(*args)
    own = None if a.bias is None or a.scale is not None else a.bias.to(a.x.dtype)
    y = F.conv2d(a.x, a.weight, own, a.stride, a.padding, a.dilation, a.groups)
    if a.scale is not None:
        y = y * a.scale[:, None, None]
        y = y if a.bias is None else y + a.bias[:, None, None]
    y = y.to(a.x.dtype).contiguous(memory_format=memory_format(a.x))
    return finish(y, a.residual, a.act)


def _output(*args: Any) -> Tensor:
    a = Arguments(*args)
    return _empty(a, a.x.device)


def _empty(a: Arguments, device: torch.device) -> Tensor:
    wanted = memory_format(a.x)
    return torch.empty(a.shape, dtype=a.x.dtype, device=device, memory_format=wanted)


@define(
    "conv2d_act(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str act, str precision, "
    "str candidate) -> Tensor",
    _output,
)
def _forward(*args: Any) -> Tensor:
    """Run the candidate that is named, or else that is best for the sizes of this call."""
    ranked = (name for name, _ in _ranked(Arguments(*args)))
    name = args[-1] or next(name for name in ranked if _refuses_as(name, *args) is None)
    return _candidate(name).compute(_as(name, *args))


# ---------------------------------------------------------------------------------- the candidates


class Candidate(NamedTuple):
    """An implementation: the path that `explain` shows, what computes it, why it leaves a call.

    One without a kernel of ours needs no registered op: `bound` returns what runs all calls of a
    signature, given the op's arguments.
    """

    path: str
    compute: Callable[[Arguments], Tensor]
    refuses: Callable[[Arguments], str | None]
    bound: Callable[[Arguments], Callable[..., Tensor]] | None = None


def _on_triton(a: Arguments) -> Tensor:
    from ._triton import conv2d_act as kernels

    y = _output(*a)
    kernels.forward(*_launched(a, y))
    return y


def _launched(a: Arguments, y: Tensor) -> tuple[Any, ...]:
    """Return a call as the kernels' launcher takes it."""
    from ._triton._conv import Site

    # PyTorch's dispatcher makes lists of pairs
    stride, padding, dilation = ((s[0], s[1]) for s in (a.stride, a.padding, a.dilation))
    site = Site(y, a.x, a.weight, a.residual, stride, padding, dilation, a.groups)
    how = a.candidate.partition(":")[2]
    return site, (a.scale, a.bias), a.act, a.precision or precision(a.x), how


def _refuses_triton(a: Arguments) -> str | None:
    if (reason := _refuses_kernels(a)) is not None:
        return reason
    if a.x.dtype == torch.float64:
        return "dtype torch.float64 (convolution in double precision)"
    if a.x.dtype == torch.bfloat16 and not a.x.is_cuda:
        return "dtype torch.bfloat16 (the interpreter multiplies it wrongly)"
    if a.groups > 1 and a.weight.shape[1] == 1:
        return "depthwise: one channel a group, nothing for matrix units"
    for name, t in (("x", a.x), ("weight", a.weight)):
        if t.shape[1] > 1 and t.stride(1) != 1:
            return not_channels_last(name)
    if ":" not in a.candidate or torch.compiler.is_compiling():
        return None
    from ._triton import conv2d_act as kernels

    site, _, _, how, configuration = _launched(a, _empty(a, torch.device("meta")))
    return kernels.refuses(site, how, configuration)


def _on_cudnn(a: Arguments) -> Tensor:
    from ._triton import conv2d_act as kernels

    z = F.conv2d(a.x, a.weight, None, a.stride, a.padding, a.dilation, a.groups)
    wanted = memory_format(a.x)
    # in place, as nobody else holds z, unless its memory format has to change on the way
    same = z.is_contiguous(memory_format=wanted)
    y = z if same else torch.empty_like(z, memory_format=wanted)
    kernels.epilogue(y, z, a.scale, a.bias, a.residual, a.act)
    return y


def _on_cudnn_fused(a: Arguments) -> Tensor:
    steps = (a.stride, a.padding, a.dilation, a.groups)
    if a.residual is None:
        return torch.cudnn_convolution_relu(a.x, a.weight, a.bias, *steps)
    return torch.cudnn_convolution_add_relu(a.x, a.weight, a.residual, 1.0, a.bias, *steps)


def _refuses_cudnn_fused(a: Arguments) -> str | None:
    """Return why cuDNN's own fusion does not take a call; or does, but copies an argument."""
    if (reason := _refuses_kernels(a)) is not None:
        return reason
    if not a.x.is_cuda or torch.version.hip is not None:
        return f"no cuDNN on device {a.x.device.type}"
    if a.act != "relu":
        return f"act {a.act} (cuDNN fuses relu)"
    if a.scale is not None:
        return "a scale (fold it into weight)"
    if a.x.dtype == torch.float64:
        return f"dtype {a.x.dtype}"
    if a.bias is not None and a.bias.dtype != a.x.dtype:
        return f"bias in {a.bias.dtype}, not in x's dtype"
    for name, t in (("x", a.x), ("weight", a.weight), ("residual", a.residual)):
        if t is not None and not t.is_contiguous(memory_format=torch.channels_last):
            return not_channels_last(name)
    return None


def _for_cpus(
    path: str,
    bound: Callable[[Arguments], Callable[..., Tensor]],
    refuses: Callable[[Arguments], str | None],
) -> Candidate:
    """Return a candidate whose weights are packed."""

    def compute(a: Arguments) -> Tensor:
        return bound(a)(*a)

    def refused(a: Arguments) -> str | None:
        if wants_grad(*a[:5]):
            return "a gradient is wanted (packed weights are for inference)"
        return refuses(a)

    return Candidate(path, compute, refused, bound)


def _refuses_kernels(a: Arguments) -> str | None:
    """Return why no candidate that runs kernels of ours takes a call."""
    if wants_grad(*a[:5]):
        return "a gradient is wanted (the kernels are for inference)"
    return refuses(a.x, a.scale, a.bias)


CANDIDATES = {
    "triton": Candidate("triton", _on_triton, _refuses_triton),
    "cudnn": Candidate("cudnn", _on_cudnn, _refuses_kernels),
    "cudnn_fused": Candidate("cudnn", _on_cudnn_fused, _refuses_cudnn_fused),
    "onednn": _for_cpus("onednn", _onednn.bound, _onednn.refuses),
    "onednn_linear": _for_cpus("onednn", _onednn.bound_linear, _onednn.refuses_rows),
    "mkl": _for_cpus("mkl", _onednn.bound_mkl, _onednn.refuses_mkl),
}


# ------------------------------------------------------------------------------ who runs which call


def _refuses_as(name: str, *args: Any) -> str | None:
    """Return why the candidate `name` does not take a call."""
    if name.partition(":")[0] not in CANDIDATES:
        return f"no candidate {name!r} (one of {', '.join(CANDIDATES)})"
    return _candidate(name).refuses(_as(name, *args))


def _candidate(name: str) -> Candidate:
    return CANDIDATES[name.partition(":")[0]]


def _as(name: str, *args: Any) -> Arguments:
    return Arguments(*args)._replace(candidate=name)


def _ranked(a: Arguments) -> list[tuple[str, str]]:
    """Return the candidates for a call, best first, each with what speaks for it."""
    default = default_for(a.x)
    if torch.compiler.is_compiling() or not all(isinstance(n, int) for n in a.x.shape):
        return [(default, "the default for sizes that may change")]
    device = _choices.device_name(a.x.device)
    measured = _choices.best(op.name, device, site(a), a.x.shape[0])
    if measured is None:
        return [(default, f"the default, as nothing is measured on {device}")]
    return [(measured, f"measured to be the fastest on {device}"), (default, "the default")]


def default_for(x: Tensor) -> str:
    """Return the candidate for convolutions of x where nothing is measured."""
    if x.is_cuda:
        return "cudnn"
    return "onednn" if x.is_cpu and not has_kernels(x) else "triton"


def _choose(*args: Any) -> Choice:
    """Return how "auto" runs a call: the one place where candidates compete."""
    x, given = args[0], args[-1]
    if x.is_cuda and not given and torch.compiler.is_compiling():
        # sizes may be symbols there: the registered op chooses when it runs
        reason = _refuses_kernels(Arguments(*args))
        return Choice("eager", _eager, reason) if reason else Choice("cudnn", _forward, None)
    reasons: list[str] = []
    for name, merit in [(given, "asked for")] if given else _ranked(Arguments(*args)):
        if (reason := _refuses_as(name, *args)) is None:
            path, _, _, bound = _candidate(name)
            why = "; ".join([*reasons, f"{name}: {merit}"])
            if bound is not None:
                return Choice(path, _while_enabled(bound(Arguments(*args))), why, True)
            return Choice(path, partial(_run_as, name), None if path == "triton" else why)
        reasons.append(reason)
    if given:
        raise NotImplementedError(f"conv2d_act cannot run as {given!r}: {reasons[0]}")
    return Choice("eager", _eager, reasons[0])


def runs_on_onednn(x: Tensor) -> bool:
    """Return whether convolutions of x, without a scale, run as oneDNN's unless told otherwise."""
    return (
        isinstance(x, Tensor)
        and x.is_cpu
        and not has_kernels(x)
        and current_backend() == "auto"
        and not wants_grad(x)
        and _onednn.refuses_map(x) is None
    )


def _while_enabled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `run`, but the definition where oneDNN is switched off after all."""

    def call(*args: Any) -> Tensor:
        return run(*args) if torch.backends.mkldnn.enabled else _eager(*args)

    return call


def _run_as(name: str, *args: Any) -> Tensor:
    return _forward(*args[:-1], name)


def _triton(*args: Any) -> Tensor:
    return _forward(*args[:-1], args[-1] or "triton")


def _refuses(*args: Any) -> str | None:
    return _refuses_as(args[-1] or "triton", *args)


def on_kernels(*args: Any) -> str | None:
    """Return the candidate by which kernels of ours run a call, None where something else does."""
    if args[0].is_cuda and torch.compiler.is_compiling():
        return None  # the registered op chooses when it runs
    if current_backend() == "eager" or not has_kernels(args[0]):
        return None
    given = "triton" if current_backend() == "triton" else args[-1]
    for name in [given] if given else [name for name, _ in _ranked(Arguments(*args))]:
        if _refuses_as(name, *args) is None:
            return name if _candidate(name).path == "triton" else None
    return None


def candidates(*args: Any) -> list[str]:
    """Return the candidates that take a call of the op, configurations and all: what to measure.

    Any of them, as the last argument, runs the call. The first is what runs without a table.
    """
    x: Tensor = args[0]
    found = [name for name in CANDIDATES if _refuses_as(name, *args) is None]
    if "triton" in found:
        found = [name for name in found if name != "triton"] + configurations(*args)
    return sorted(found, key=lambda name: name.partition(":")[0] != default_for(x))


def configurations(*args: Any) -> list[str]:
    """Return what kernels of ours may run a call: analytic choices first. Meta tensors will do."""
    from ._triton import conv2d_act as kernels

    a = _as("triton", *args)
    site, _, _, how, _ = _launched(a, _empty(a, torch.device("meta")))
    return [f"triton:{text}" for text in kernels.configurations(site, how)]


def _traffic(*args: Any) -> Traffic:
    a = Arguments(*args)
    N, K, P, Q = a.shape
    y = N * K * P * Q * (1 if a.residual is None else 2)
    return Traffic((elements_read(a) + a.weight.numel() + y) * a.x.element_size(), 0)


op = Op("conv2d_act", check, _eager, _triton, _refuses, _traffic, _choose)
