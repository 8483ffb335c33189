"""Two 1x1 convolutions back to back, each with its epilogue: the map between them is not read back.

    y = act(conv2d(x, weight) + bias + residual)
    z = next_act(conv2d(y, next_weight) + next_bias)

The end of a bottleneck and the beginning of the next one, whose shortcut is y: both y and z are
returned. Inference only: a call that wants a gradient runs the definition, which is differentiable.

Shapes   x (N, C, H, W); weight (K, C, 1, 1); bias (K,) or None; residual, y (N, K, H, W);
         next_weight (D, K, 1, 1); next_bias (D,) or None; z (N, D, H, W)
Dtypes   as `conv2d_act`; y is rounded to x's type before it is multiplied
Layout   any strides; y and z have x's memory format. The kernel needs all maps in channels_last
Bytes    x, the weights, residual, y and z once each
Saves    nothing
Raises   ValueError, TypeError: rank, shape, device or dtype of an argument; unknown act
Source   back-to-back GEMMs and convolutions of CUTLASS (examples/13), with a map in between that is
         kept. Like two calls of `conv2d_act` up to rounding

There are two candidates, by name:

    triton   one kernel of ours, of which a configuration may follow, "triton:128x64:w8:s2"; where
             it does not take a call, and Triton is asked for, two kernels of `conv2d_act`
    apart    two calls of `conv2d_act`, which choose, and are observed, for themselves

A call takes the kernel if that takes it. `vertebra.fuse`, which can do without, asks for the "best"
of both: a table of what was measured chooses, as for `conv2d_act`, and where nothing was measured,
arithmetic, see `_advises_against`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _choices
from ._act import check_act
from ._check import check_image, check_parameters, check_residual
from ._conv2d import memory_format, precision
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
) -> Maps:
    """Return `y = act(conv2d(x, weight) + bias + residual)`, and the same of y with the rest.

    >>> x = torch.tensor([1.0, -2.0]).reshape(1, 1, 1, 2)
    >>> double = torch.tensor([2.0]).reshape(1, 1, 1, 1)
    >>> y, z = conv2d_b2b(x, double, double, next_bias=torch.tensor([0.5]), act="relu")
    >>> y.flatten(), z.flatten()
    (tensor([2., 0.]), tensor([4.5000, 0.5000]))
    """
    return op(*_autocast(x, weight, next_weight, bias, next_bias, residual, act, next_act))


def as_one(*args: Any) -> Maps | None:
    """Return what `conv2d_b2b` does where one kernel runs it, else None: two calls are as good."""
    a = Arguments(*_autocast(*args))
    if current_backend() == "eager":
        return None
    if torch.compiler.is_compiling():
        # sizes may be symbols there: the registered op chooses when it runs
        one = (_refuses_alone(a) or _advises_against(a)) is None
        return op(*a._replace(candidate="best")) if one else None
    name = _best(a)[0]
    return None if name == "apart" else op(*a._replace(candidate=name))


def _autocast(x: Tensor, weight: Tensor, next_weight: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Return the arguments of the op, cast as autocast casts those of convolutions."""
    bias, next_bias, residual, act, next_act = rest
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype != torch.float64 and x.is_floating_point():
            x, weight, next_weight = x.to(dtype), weight.to(dtype), next_weight.to(dtype)
            residual = None if residual is None else residual.to(dtype)
    biases = (bias, next_bias)
    return x, weight, next_weight, *biases, residual, act, next_act, precision(x), ""


class Arguments(NamedTuple):
    """A call, as its implementations get it; `precision` and `candidate` as in `conv2d_act`."""

    x: Tensor
    weight: Tensor
    next_weight: Tensor
    bias: Tensor | None
    next_bias: Tensor | None
    residual: Tensor | None
    act: str
    next_act: str
    precision: str
    candidate: str

    @property
    def widths(self) -> tuple[int, int, int]:
        """C, K and D: channels of x, y and z."""
        return self.x.shape[1], self.weight.shape[0], self.next_weight.shape[0]

    @property
    def first(self) -> tuple[Any, ...]:
        """The first convolution, as arguments of `conv2d_act`'s op."""
        return _alone(self.x, self.weight, self.bias, self.residual, self.act, self.precision)

    def second(self, y: Tensor) -> tuple[Any, ...]:
        """The second one."""
        rest = (self.next_bias, None, self.next_act, self.precision)
        return _alone(y, self.next_weight, *rest)


def _alone(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    precision: str,
) -> tuple[Any, ...]:
    return x, weight, None, bias, residual, (1, 1), (0, 0), (1, 1), 1, act, precision, ""


def _check(*args: object) -> None:
    name, a = "conv2d_b2b", Arguments(*args)  # pyright: ignore[reportArgumentType]
    check_image(name, a.x)
    _check_weight(name, a.x, "weight", a.weight, a.x.shape[1])
    _check_weight(name, a.x, "next_weight", a.next_weight, a.weight.shape[0])
    check_parameters(name, a.x, bias=a.bias, next_bias=a.next_bias)
    for label, v, of in (("bias", a.bias, a.weight), ("next_bias", a.next_bias, a.next_weight)):
        if v is not None and v.shape != of.shape[:1]:
            raise ValueError(
                f"{name}: {label} must have shape ({of.shape[0]},), one value per filter of "
                f"{tuple(of.shape)}; got {tuple(v.shape)}"
            )
    check_act(name, a.act)
    check_act(name, a.next_act)
    N, _, H, W = a.x.shape
    check_residual(name, a.x, a.residual, shape=(N, a.weight.shape[0], H, W))


def _check_weight(op: str, x: Tensor, label: str, weight: Tensor, channels: int) -> None:
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
    if isinstance(shape, str) or shape[1:] != (channels, 1, 1) or not shape[0]:
        raise ValueError(
            f"{op}: {label} must have shape (filters, {channels}, 1, 1), as what it reads has "
            f"{channels} channels; got {shape}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(
            f"{op}: {label} must have x's dtype {x.dtype}, got {weight.dtype}; "
            "convert the module or the input with .to(dtype)"
        )
    if weight.device != x.device:
        raise ValueError(f"{op}: {label} is on {weight.device} and x on {x.device}; use .to()")


def _eager(*args: Any) -> Maps:
    a = Arguments(*args)
    y = convolution.eager(*a.first)
    return y, convolution.eager(*a.second(y))


def _apart(*args: Any) -> Maps:
    a = Arguments(*args)
    y = convolution(*a.first)
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
    "Tensor? residual, str act, str next_act, str precision, str candidate) -> (Tensor, Tensor)",
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
        y = convolution.triton(*a.first)
        return y, convolution.triton(*a.second(y))
    y, z = _outputs(*args)
    kernels.forward(
        _launched(a, y, z),
        (a.bias, a.next_bias),
        (a.act, a.next_act),
        a.precision or precision(a.x),
        name.partition(":")[2],
    )
    return y, z


def _launched(a: Arguments, y: Tensor, z: Tensor) -> Any:
    """Return the tensors of a call as the kernel's launcher takes them."""
    from ._triton.conv2d_b2b import Pair

    return Pair(y, z, a.x, a.weight, a.residual, a.next_weight)


# ------------------------------------------------------------------------------ who runs which call


def _refuses(*args: Any) -> str | None:
    """Return why a call does not run on Triton, as one kernel or as two."""
    a = Arguments(*args)
    if ":" in a.candidate and not torch.compiler.is_compiling():
        return _refuses_as_one(a, a.candidate)
    return _refuses_alone(a)


def _refuses_alone(a: Arguments) -> str | None:
    reason = convolution.refuses(*a.first) or refuses(a.x, a.next_bias)
    if reason is not None:
        return reason
    if wants_grad(a.next_weight, a.next_bias):
        return "a gradient is wanted (the kernels are for inference)"
    (_, _, H, W), (_, K, _) = a.x.shape, a.widths
    name = "x" if H * W > 1 and memory_format(a.x) == torch.contiguous_format else ""
    name = "next_weight" if a.next_weight.stride(1) != 1 else name
    if K > 1 and name:
        return f"{name} is not in channels_last (.to(memory_format=torch.channels_last))"
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


def _advises_against(a: Arguments) -> str | None:
    """Return why two kernels may be as fast as one, by what follows from type and channels.

    One saves memory traffic: of C + 3 K + D channels that two move per pixel (with a residual) it
    moves C + 2 K + D, and against cuDNN with an epilogue of its own, C + 5 K + 3 D, it is less than
    half. That is time where memory is what is waited for. An H200 multiplies and adds 184 times per
    byte that it moves, so 367 times per channel of 16 bits; a kernel that reaches 0.6 of its peak
    waits for memory below 220. ResNet-50 comes to 102 in stage 1, to 204 in stage 2, and to 409 in
    stage 3, where two kernels have all registers for one product each. In 32 bits a program fills a
    multiprocessor, and nothing hides its first loads.
    """
    if a.x.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {a.x.dtype} (one kernel pays in 16 bits)"
    C, K, D = (_padded(n) for n in a.widths)
    moved = a.x.shape[1] + 2 * a.weight.shape[0] + a.next_weight.shape[0]
    products = 2 * K * (C + D) // moved
    if products > 220:
        return f"{products} products per channel moved (one kernel pays up to 220)"
    return None


def _padded(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())


def _site(a: Arguments) -> str:
    """Return what tuning tables call a pair: all of a call but its batch and activations."""
    (C, K, D), (H, W) = a.widths, a.x.shape[2:]
    words = [f"{C}x{H}x{W} > {K} > {D}", str(a.x.dtype).removeprefix("torch.")]
    words += ["ieee"] if a.precision == "ieee" else []
    words += ["channels first"] if memory_format(a.x) == torch.contiguous_format else []
    return " ".join(words + (["residual"] if a.residual is not None else []))


def _best(a: Arguments) -> tuple[str, str]:
    """Return the best candidate for a call, and why."""
    from ._triton import conv2d_b2b as kernels

    if current_backend() == "triton":
        reason = _refuses_as_one(a, "triton")
        return ("triton", "asked for") if reason is None else ("apart", reason)
    device = _choices.device_name(a.x.device)
    measured = _choices.best(op.name, device, _site(a), a.x.shape[0])
    if measured == "apart" or (measured and _refuses_as_one(a, measured) is None):
        return measured, f"measured to be the fastest on {device}"
    reason = _advises_against(a) or _refuses_as_one(a, "triton")
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
    return Traffic((maps + a.weight.numel() + a.next_weight.numel()) * a.x.element_size(), 0)


op = Op("conv2d_b2b", _check, _eager, _triton, _refuses, _traffic, _choose)
