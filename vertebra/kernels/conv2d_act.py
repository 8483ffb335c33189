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

    triton        one kernel of ours; a configuration may follow the name (see `_triton/conv2d_act`)
    cudnn         PyTorch's convolution and one kernel of ours for the rest
    cudnn_fused   cuDNN's own convolution + bias (+ residual) + relu
    onednn        oneDNN's, on CPUs, with weights packed once (`_onednn`)
    eager         the definition

`_choose` is where they compete.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _onednn
from ._act import check_act, finish
from ._check import check_image, check_parameters, check_residual
from ._op import INTERPRETED, Choice, Op, Traffic, define, refuses, wants_grad

Pair = tuple[int, int]


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
        x, weight, residual = _autocast(x, weight, residual)
    steps = (_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation))
    return op(x, weight, scale, bias, residual, *steps, groups, act, "")


def _autocast(
    x: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast casts the arguments of a convolution."""
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x, weight, residual
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if residual is None else residual.to(dtype)


def _pair(name: str, value: int | Pair) -> Pair:
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise TypeError(
            f"conv2d_act: {name} must be an integer or a pair of them, got {value!r}; "
            "pad by hand where both sides differ"
        )
    return pair


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
    candidate: str,
) -> None:
    name = "conv2d_act"
    check_image(name, x)
    if min(*stride, *dilation, groups) < 1 or min(padding) < 0:
        raise ValueError(
            f"{name}: stride, dilation and groups must be positive and padding not negative; got "
            f"stride {stride}, padding {padding}, dilation {dilation}, groups {groups}"
        )
    _check_weight(x, weight, groups)
    check_parameters(name, x, scale=scale, bias=bias)
    K = weight.shape[0]
    for label, v in (("scale", scale), ("bias", bias)):
        if v is not None and v.shape != (K,):
            raise ValueError(
                f"{name}: {label} must have shape ({K},), one value per filter of weight "
                f"{tuple(weight.shape)}; got {tuple(v.shape)}"
            )
    check_act(name, act)
    P, Q = _image(x, weight, stride, padding, dilation)
    if P < 1 or Q < 1:
        raise ValueError(
            f"{name}: the padded image must hold one window: x {tuple(x.shape)}, weight "
            f"{tuple(weight.shape)}, padding {padding}, dilation {dilation}; pad more"
        )
    check_residual(name, x, residual, shape=(x.shape[0], K, P, Q))


def _check_weight(x: Tensor, weight: Tensor, groups: int) -> None:
    C = x.shape[1]
    if not isinstance(weight, Tensor) or weight.dim() != 4 or not weight.numel():
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"conv2d_act: weight must have shape (K, C/groups, R, S), got {got}")
    if C % groups or weight.shape[0] % groups or weight.shape[1] * groups != C:
        raise ValueError(
            f"conv2d_act: groups must divide C and K, and weight have shape (K, C/groups, R, S): "
            f"x {tuple(x.shape)}, groups {groups}, weight {tuple(weight.shape)}; "
            "check the layer's channels and groups"
        )
    if weight.dtype != x.dtype:
        raise TypeError(
            f"conv2d_act: weight must have x's dtype {x.dtype}, got {weight.dtype}; "
            "convert the module or the input with .to(dtype)"
        )
    if weight.device != x.device:
        raise ValueError(
            f"conv2d_act: weight is on {weight.device} and x on {x.device}; move one with .to()"
        )


def _image(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Return the size (P, Q) of the output's images."""
    (H, W), (R, S) = x.shape[2:], weight.shape[2:]
    return (
        (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1,
        (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1,
    )


def _format(x: Tensor) -> torch.memory_format:
    """Return x's memory format; channels first where it has both."""
    if x.is_contiguous():
        return torch.contiguous_format
    dense = x if x.is_contiguous(memory_format=torch.channels_last) else torch.empty_like(x)
    channels_last = dense.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _eager(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
    candidate: str,
) -> Tensor:
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if scale is not None:
        y = y * scale[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    return finish(y.to(x.dtype).contiguous(memory_format=_format(x)), residual, act)


def _output(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *_: Any,
) -> Tensor:
    size = (x.shape[0], weight.shape[0], *_image(x, weight, stride, padding, dilation))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_format(x))


@define(
    "conv2d_act(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str act, str candidate) -> Tensor",
    _output,
)
def _forward(*args: Any) -> Tensor:
    """Run one of the candidates with kernels of ours; "" is what `_ranked` says when it runs."""
    name = args[-1] or next(
        name for name in _ranked(*args) if CANDIDATES[name.partition(" ")[0]].refuses(*args) is None
    )
    return _IMPLEMENTATIONS[name.partition(" ")[0]](*args[:-1], name)


def _run_triton(*args: Any) -> Tensor:
    from ._triton import conv2d_act as kernels

    y = _output(*args)
    kernels.forward(y, *args)
    return y


def _run_cudnn(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
    candidate: str,
) -> Tensor:
    from ._triton import conv2d_act as kernels

    z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    # in place: nobody else holds z, unless it has to change its memory format on the way
    wanted = _format(x)
    same = z.is_contiguous(memory_format=wanted)
    y = z if same else torch.empty_like(z, memory_format=wanted)
    kernels.epilogue(y, z, scale, bias, residual, act)
    return y


def _run_cudnn_fused(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
    candidate: str,
) -> Tensor:
    steps = (stride, padding, dilation, groups)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *steps)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *steps)


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "triton": _run_triton,
    "cudnn": _run_cudnn,
    "cudnn_fused": _run_cudnn_fused,
}


# ------------------------------------------------------------------------- who takes which call


def _refuses(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *_: Any,
) -> str | None:
    """Return why our own convolution does not take a call."""
    reason = _refuses_kernels(x, weight, scale, bias, residual)
    if reason is not None:
        return reason
    if True:
        return "its kernels are not written yet"
    if x.dtype == torch.float64:
        return "dtype torch.float64 (convolution in double precision)"
    for name, t in (("x", x), ("weight", weight)):
        if t.shape[1] > 1 and t.stride(1) != 1:
            return f"{name} is not in channels_last (.to(memory_format=torch.channels_last))"
    return None


def _refuses_kernels(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *_: Any,
) -> str | None:
    """Return why no candidate with a kernel of ours takes a call."""
    if wants_grad(x, weight, scale, bias, residual):
        return "a gradient is wanted (the kernels are for inference)"
    return refuses(x, scale, bias)


def _refuses_fused(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
    candidate: str,
) -> str | None:
    """Return why cuDNN's own fusion does not take a call: where it would copy an argument, too."""
    reason = _refuses_kernels(x, weight, scale, bias, residual)
    if reason is not None:
        return reason
    if not x.is_cuda or torch.version.hip is not None:
        return f"no cuDNN on device {x.device.type}"
    if act != "relu":
        return f"act {act} (cuDNN fuses relu)"
    if scale is not None:
        return "a scale (fold it into weight)"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {x.dtype}"
    if bias is not None and bias.dtype != x.dtype:
        return f"bias in {bias.dtype}, not x's dtype"
    for name, t in (("x", x), ("weight", weight), ("residual", residual)):
        if t is not None and not t.is_contiguous(memory_format=torch.channels_last):
            return f"{name} is not in channels_last (.to(memory_format=torch.channels_last))"
    return None


def _refuses_onednn(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    act: str,
    candidate: str,
) -> str | None:
    """Return why oneDNN does not take a call."""
    if wants_grad(x, weight, scale, bias, residual):
        return "a gradient is wanted (oneDNN's epilogue is for inference)"
    if scale is not None:
        return "a scale (fold it into weight)"
    return _onednn.refuses(x, weight, bias, residual, act)


def _run_onednn(*args: Any) -> Tensor:
    y = _onednn.conv2d(*args) if torch.backends.mkldnn.enabled else _eager(*args)
    return y.contiguous(memory_format=_format(args[0]))


class Candidate(NamedTuple):
    """An implementation: the path that `explain` shows, what runs it, why it leaves a call."""

    path: str
    run: Callable[..., Tensor]
    refuses: Callable[..., str | None]


CANDIDATES = {
    "triton": Candidate("triton", _forward, _refuses),
    "cudnn": Candidate("cudnn", _forward, _refuses_kernels),
    "cudnn_fused": Candidate("cudnn", _forward, _refuses_fused),
    "onednn": Candidate("onednn", _run_onednn, _refuses_onednn),
}


def _run_as(name: str, *args: Any) -> Tensor:
    return CANDIDATES[name.partition(" ")[0]].run(*args[:-1], name)


def _ranked(x: Tensor, *_: Any) -> tuple[str, ...]:
    """Return the candidates for a call, best first; the first that does not refuse it runs it."""
    if x.is_cuda:
        return ("cudnn",)
    return ("triton",) if INTERPRETED else ("onednn",)


def _choose(*args: Any) -> Choice:
    """Return how "auto" runs a call: the one place where candidates compete."""
    x, given = args[0], args[-1]
    if x.is_cuda and not given and torch.compiler.is_compiling():
        # sizes may be symbols there: the registered op chooses when it runs
        reason = _refuses_kernels(*args)
        return Choice("eager", _eager, reason) if reason else Choice("cudnn", _forward, None)
    reasons: list[str] = []
    for name in (given,) if given else _ranked(*args):
        candidate = CANDIDATES[name.partition(" ")[0]]
        reason = candidate.refuses(*args)
        if reason is None:
            why = "; ".join([*reasons, f"{name} is the default until others are measured"])
            reason = None if candidate.path == "triton" else why
            if name == "onednn":
                return Choice("onednn", _run_onednn, reason, lasts=True)
            return Choice(candidate.path, partial(_run_as, name), reason)
        reasons.append(reason)
    if given:
        raise NotImplementedError(f"conv2d_act cannot run as {given!r}: {reasons[0]}")
    return Choice("eager", _eager, reasons[0] if reasons else _refuses(*args))


def _triton(*args: Any) -> Tensor:
    return _forward(*args[:-1], args[-1] or "triton")


def _traffic(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *_: Any,
) -> Traffic:
    P, Q = _image(x, weight, stride, padding, dilation)
    N, K = x.shape[0], weight.shape[0]
    y = N * K * P * Q
    read = x.numel() + weight.numel()
    moved = read + y * (2 if residual is not None else 1)
    return Traffic(moved * x.element_size(), 0)


op = Op("conv2d_act", _check, _eager, _triton, _refuses, _traffic, _choose)
