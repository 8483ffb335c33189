"""The arguments of two convolutions back to back, and what follows from their shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._act import check_act
from ._check import check_image, check_parameters, check_residual
from ._conv2d import memory_format


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


def check(*args: object) -> None:
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


def advises_against(a: Arguments) -> str | None:
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


def site(a: Arguments) -> str:
    """Return what tuning tables call a pair: all of a call but its batch and activations."""
    (C, K, D), (H, W) = a.widths, a.x.shape[2:]
    words = [f"{C}x{H}x{W} > {K} > {D}", str(a.x.dtype).removeprefix("torch.")]
    words += ["ieee"] if a.precision == "ieee" else []
    words += ["channels first"] if memory_format(a.x) == torch.contiguous_format else []
    return " ".join(words + (["residual"] if a.residual is not None else []))
