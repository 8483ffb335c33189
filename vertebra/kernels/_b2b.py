"""The arguments of convolutions back to back, and what follows from their shapes."""

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
    mid_weight: Tensor | None
    mid_bias: Tensor | None
    mid_act: str
    precision: str
    candidate: str

    @property
    def widths(self) -> tuple[int, int, int]:
        """C, K and D: channels of h, y and z."""
        return self.weight.shape[1], self.weight.shape[0], self.next_weight.shape[0]

    @property
    def mid(self) -> tuple[Any, ...]:
        """The 3x3, where there is one, as arguments of `conv2d_act`'s op."""
        assert self.mid_weight is not None
        return self._alone(self.x, self.mid_weight, self.mid_bias, None, self.mid_act, 1)

    def first(self, h: Tensor) -> tuple[Any, ...]:
        """The first 1x1 of h, which is x where there is no 3x3."""
        return self._alone(h, self.weight, self.bias, self.residual, self.act, 0)

    def second(self, y: Tensor) -> tuple[Any, ...]:
        """The second one."""
        return self._alone(y, self.next_weight, self.next_bias, None, self.next_act, 0)

    def behind_mid(self, h: Tensor) -> Arguments:
        """The two 1x1s, as a call of their own."""
        return self._replace(x=h, mid_weight=None, mid_bias=None, mid_act="none")

    def _alone(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        act: str,
        padding: int,
    ) -> tuple[Any, ...]:
        steps = ((1, 1), (padding, padding), (1, 1))
        return x, weight, None, bias, residual, *steps, 1, act, self.precision, ""


def check(*args: object) -> None:
    name, a = "conv2d_b2b", Arguments(*args)  # pyright: ignore[reportArgumentType]
    check_image(name, a.x)
    C = a.x.shape[1]
    if a.mid_weight is not None:
        C = _check_weight(name, a.x, "mid_weight", a.mid_weight, C, 3)
    elif a.mid_bias is not None or a.mid_act != "none":
        raise ValueError(f"{name}: mid_bias and mid_act are a 3x3's; give its mid_weight too")
    K = _check_weight(name, a.x, "weight", a.weight, C, 1)
    D = _check_weight(name, a.x, "next_weight", a.next_weight, K, 1)
    biases = {"mid_bias": (a.mid_bias, C), "bias": (a.bias, K), "next_bias": (a.next_bias, D)}
    check_parameters(name, a.x, **{label: v for label, (v, _) in biases.items()})
    for label, (v, filters) in biases.items():
        if v is not None and v.shape != (filters,):
            raise ValueError(
                f"{name}: {label} must have shape ({filters},), one value per filter of its "
                f"convolution; got {tuple(v.shape)}"
            )
    for act in (a.mid_act, a.act, a.next_act):
        check_act(name, act)
    N, _, H, W = a.x.shape
    check_residual(name, a.x, a.residual, shape=(N, K, H, W))


def _check_weight(op: str, x: Tensor, label: str, weight: Tensor, channels: int, side: int) -> int:
    """Return how many filters there are."""
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
    if isinstance(shape, str) or shape[1:] != (channels, side, side) or not shape[0]:
        raise ValueError(
            f"{op}: {label} must have shape (filters, {channels}, {side}, {side}), as what it "
            f"reads has {channels} channels; got {shape}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(
            f"{op}: {label} must have x's dtype {x.dtype}, got {weight.dtype}; "
            "convert the module or the input with .to(dtype)"
        )
    if weight.device != x.device:
        raise ValueError(f"{op}: {label} is on {weight.device} and x on {x.device}; use .to()")
    return shape[0]


def advises_against(a: Arguments) -> str | None:
    """Return why two kernels may be as fast as one, by what follows from type and channels.

    One saves memory traffic: of C + 3 K + D channels that two move per pixel (with a residual) it
    moves C + 2 K + D, and against cuDNN with an epilogue of its own, C + 5 K + 3 D, it is less than
    half. That is time where memory is what is waited for. An H200 multiplies and adds 184 times per
    byte that it moves, so 367 times per channel of 16 bits; a kernel that reaches 0.6 of its peak
    waits for memory below 220. ResNet-50 comes to 102 in stage 1, to 204 in stage 2, and to 409 in
    stage 3, where two kernels have all registers for one product each. In 32 bits a program fills a
    multiprocessor, and nothing hides its first loads.

    A 3x3 in front makes it one of three, and saves 2 C more. But it reads x nine times from the L2
    cache, in one kernel or in two, and whether that hides behind the rest only a measurement says.
    """
    if a.mid_weight is not None:
        return "a 3x3 in front (one kernel for all three has to be measured)"
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
    (_, B, H, W), (C, K, D) = a.x.shape, a.widths
    mid = "" if a.mid_weight is None else f" > {C} 3x3"
    words = [f"{B}x{H}x{W}{mid} > {K} > {D}", str(a.x.dtype).removeprefix("torch.")]
    words += ["ieee"] if a.precision == "ieee" else []
    words += ["channels first"] if memory_format(a.x) == torch.contiguous_format else []
    return " ".join(words + (["residual"] if a.residual is not None else []))
