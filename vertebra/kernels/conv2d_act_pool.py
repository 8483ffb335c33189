"""`conv2d_act` image by image: x times a gate before it, the means of y behind it.

    y = act(conv2d(x * gate, weight) * scale + bias + residual)
    mean of y[n, k] = sum over t of shares[n, t, k]

It saves the passes over maps of a squeeze and excitation between two convolutions, and of a global
pool behind the last one, whose map nobody else reads. Inference only, as `conv2d_act`.

Shapes   x (N, C, H, W); weight (K, C/groups, R, S); scale, bias (K,) or None; residual, y
         (N, K, P, Q), P and Q as in `conv2d_act`; gate (N, C) or None; shares (N, T, K), T =
         ceil(P Q / 64): parts of 64 pixels, of no order that is promised. What is not asked for
         comes empty, (0,)
Dtypes   as `conv2d_act`; gate and shares in fp32 (fp64 for fp64). One rounding of x * gate, or of
         weight * gate, to x's type before the products; shares are of y as rounded
Layout   any strides; y has x's memory format. Kernels need x and weight in channels_last
Bytes    x, weight and residual once, y once if it is asked for; shares are 1/64 of y, or 1/32
Saves    nothing
Raises   ValueError, TypeError: as `conv2d_act`; shape, dtype or device of gate; nothing asked for
Source   Hu et al. 2018 (arXiv:1709.01507), whose squeeze and scale these are; sums in the epilogue
         as in CUTLASS's reductions (Thakkar et al. 2023). No atomics, so the same bits every time
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _choices
from ._conv2d import RUN, Arguments, Pair, elements_read, memory_format, pair, precision
from ._op import (
    Op,
    Traffic,
    define,
    has_kernels,
    sums_dtype,
    wants_grad,
)
from .conv2d_act import cast_by_autocast, on_kernels
from .conv2d_act import op as conv


def conv2d_act_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
    *,
    gate: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    scale: Tensor | None = None,
    writes: bool = True,
    pools: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return (y, shares), each empty unless it is asked for; the module docstring has the rest.

    Args:
        x: the input.
        weight: the filters.
        bias: of each filter.
        residual: added before the activation.
        act: the activation.
        gate: multiplies x.
        stride: of the window, as `padding` and `dilation` for both dimensions or for each.
        padding: zeros around x * gate.
        dilation: between what the window reads.
        groups: of the channels.
        scale: of each filter.
        writes: y is asked for.
        pools: shares are asked for.

    >>> x, weight = torch.ones(1, 2, 2, 2), torch.eye(2)[:, :, None, None]
    >>> y, shares = conv2d_act_pool(x, weight, gate=torch.tensor([[0.5, 3.0]]))
    >>> shares.sum(1)
    tensor([[0.5000, 3.0000]])
    """
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        x, weight, residual = cast_by_autocast(x, weight, residual)
    steps = (pair("stride", stride), pair("padding", padding), pair("dilation", dilation))
    of_conv = (x, weight, scale, bias, residual, *steps, groups, act, precision(x), "")
    y, shares = op(*of_conv, gate, writes, pools)
    return y, shares


def where_ours(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    *,
    gate: Tensor | None,
    stride: int | Pair,
    padding: int | Pair,
    dilation: int | Pair,
    groups: int,
    writes: bool,
    pools: bool,
) -> tuple[Tensor, Tensor] | None:
    """Return what `conv2d_act_pool` does where kernels of ours would run the convolution alone.

    None elsewhere: cuDNN or oneDNN is better at it than these by more than a pass over a map, as
    far as anybody has measured; or autocast is to cast first.
    """
    if not has_kernels(x) or torch.is_autocast_enabled(x.device.type):
        return None
    steps = (pair("stride", stride), pair("padding", padding), pair("dilation", dilation))
    of_conv = (x, weight, None, bias, residual, *steps, groups, act, precision(x), "")
    candidate = _ours(*of_conv)
    if candidate is None:
        return None
    args = (*of_conv[:-1], candidate, gate, writes, pools)
    if ":" in candidate and _refuses(*args) is not None:  # its tiles mix images
        args = (*of_conv[:-1], "triton", gate, writes, pools)
    y, shares = op(*args)
    return y, shares


_ours = _choices.remembered(on_kernels)


class _Call(NamedTuple):
    """A call: what `conv2d_act` takes, and the rest."""

    of_conv: Arguments
    gate: Tensor | None
    writes: bool
    pools: bool

    @classmethod
    def read(cls, *args: Any) -> _Call:
        return cls(Arguments(*args[:-3]), *args[-3:])

    @property
    def runs(self) -> int:
        """Return how many parts of 64 pixels an image of y has."""
        P, Q = self.of_conv.image
        return -(-P * Q // RUN)


def _check(*args: Any) -> None:
    conv.check(*args[:-3])
    name, call = "conv2d_act_pool", _Call.read(*args)
    x, gate = call.of_conv.x, call.gate
    if not (call.writes or call.pools):
        raise ValueError(f"{name}: nothing is asked for; give writes=True or pools=True")
    if gate is None:
        return
    if gate.shape != x.shape[:2]:
        raise ValueError(
            f"{name}: gate must have shape (N, C) = {tuple(x.shape[:2])}, one value per image and "
            f"channel of x, got {tuple(gate.shape)}; flatten it"
        )
    if gate.dtype != sums_dtype(x):
        raise TypeError(
            f"{name}: gate must be {sums_dtype(x)} where x is {x.dtype}, got {gate.dtype}; "
            "convert it with .to()"
        )
    if gate.device != x.device:
        raise ValueError(
            f"{name}: gate is on {gate.device} and x on {x.device}; move one with .to()"
        )


def _eager(*args: Any) -> tuple[Tensor, Tensor]:
    a, gate, writes, pools = _Call.read(*args)
    if gate is not None:
        a = a._replace(x=(a.x * gate[:, :, None, None]).to(a.x.dtype))
    y: Tensor = conv.eager(*a)
    shares = _shares(y) if pools else _nothing(a.x)
    return (y if writes else y.new_empty(0)), shares


def _shares(y: Tensor) -> Tensor:
    pixels = y.flatten(2).to(sums_dtype(y))
    parts = F.pad(pixels, (0, -pixels.shape[2] % RUN)).unflatten(2, (-1, RUN))
    return (parts.sum(3) / pixels.shape[2]).transpose(1, 2).contiguous()


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=sums_dtype(x))


def _outputs(*args: Any) -> tuple[Tensor, Tensor]:
    return _empty(_Call.read(*args), args[0].device)


def _empty(call: _Call, device: torch.device) -> tuple[Tensor, Tensor]:
    a = call.of_conv
    size = (a.shape[0], call.runs, a.shape[1]) if call.pools else 0
    shares = a.x.new_empty(size, dtype=sums_dtype(a.x), device=device)
    if not call.writes:
        return a.x.new_empty(0, device=device), shares
    wanted = memory_format(a.x)
    y = torch.empty(a.shape, dtype=a.x.dtype, device=device, memory_format=wanted)
    return y, shares


@define(
    "conv2d_act_pool(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str act, str precision, "
    "str candidate, Tensor? gate, bool writes, bool pools) -> (Tensor y, Tensor shares)",
    _outputs,
)
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    from ._triton import conv2d_act_pool as kernels

    outputs = _outputs(*args)
    kernels.forward(*_launched(_Call.read(*args), outputs))
    return outputs


def _launched(call: _Call, outputs: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    """Return a call as the kernels' launcher takes it."""
    from ._triton._conv import Site

    a, gate, writes, pools = call
    y, shares = outputs
    if not writes:  # its shape counts all the same
        y = torch.empty(a.shape, dtype=a.x.dtype, device="meta", memory_format=torch.channels_last)
    # PyTorch's dispatcher makes lists of pairs
    stride, padding, dilation = ((s[0], s[1]) for s in (a.stride, a.padding, a.dilation))
    site = Site(y, a.x, a.weight, a.residual, stride, padding, dilation, a.groups)
    gate = None if gate is None else gate.contiguous()
    site = site._replace(gate=gate, shares=shares if pools else None)
    site = site._replace(writes=writes, run=RUN)
    how = a.candidate.partition(":")[2]
    return site, (a.scale, a.bias), a.act, a.precision or precision(a.x), how


def _refuses(*args: Any) -> str | None:
    call = _Call.read(*args)
    a, gate, _, _ = call
    if wants_grad(gate):
        return "a gradient is wanted (the kernels are for inference)"
    if (reason := conv.refuses(*a._replace(candidate=""))) is not None:
        return reason
    if ":" not in a.candidate or torch.compiler.is_compiling():
        return None
    from ._triton import conv2d_act_pool as kernels

    site, _, _, how, configuration = _launched(call, _empty(call, torch.device("meta")))
    return kernels.refuses(site, how, configuration)


def configurations(*args: Any) -> list[str]:
    """Return what kernels may run a call: analytic choices first. Meta tensors will do."""
    from ._triton import conv2d_act_pool as kernels

    call = _Call.read(*args)
    site, _, _, how, _ = _launched(call, _empty(call, torch.device("meta")))
    return [f"triton:{text}" for text in kernels.configurations(site, how)]


def _traffic(*args: Any) -> Traffic:
    """Count maps alone: a gate and shares are little beside them."""
    call = _Call.read(*args)
    a = call.of_conv
    N, K, P, Q = a.shape
    maps = N * K * P * Q * (call.writes + (a.residual is not None))
    return Traffic((elements_read(a) + a.weight.numel() + maps) * a.x.element_size(), 0)


op = Op("conv2d_act_pool", _check, _eager, _forward, _refuses, _traffic)
