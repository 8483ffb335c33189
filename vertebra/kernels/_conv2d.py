"""The arguments of a convolution: what they must be, and what follows from their shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._act import check_act
from ._check import check_image, check_parameters, check_residual
from ._op import has_kernels

Pair = tuple[int, int]

# pixels of an image, row by row, whose sums kernels add up by themselves
RUN = 64


class Arguments(NamedTuple):
    """A call of `conv2d_act`, as its implementations get it.

    `precision` says how fp32 is multiplied: "tf32", "ieee", or "" for what PyTorch is set to when
    it runs. `candidate` names an implementation; "" leaves the choice open.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    act: str
    precision: str
    candidate: str

    @property
    def image(self) -> Pair:
        """The size (P, Q) of y's images."""
        P, Q = (
            (n + 2 * p - d * (r - 1) - 1) // s + 1
            for n, r, s, p, d in zip(
                self.x.shape[2:],
                self.weight.shape[2:],
                *(self.stride, self.padding, self.dilation),
                strict=True,
            )
        )
        return P, Q

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        return self.x.shape[0], self.weight.shape[0], *self.image


def pair(name: str, value: int | Pair) -> Pair:
    """Return a number given once for both dimensions, or for each."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, int) for v in both):
        raise TypeError(
            f"conv2d_act: {name} must be an integer or a pair of them, got {value!r}; "
            "pad by hand where both sides differ"
        )
    return both


def precision(x: Tensor) -> str:
    """Return how fp32 is multiplied: see `Arguments`."""
    if x.dtype != torch.float32 or torch.compiler.is_compiling() or not has_kernels(x):
        return ""
    conv = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"


def memory_format(x: Tensor) -> torch.memory_format:
    """Return x's memory format; channels first where it has both."""
    if x.is_contiguous():
        return torch.contiguous_format
    dense = x if x.is_contiguous(memory_format=torch.channels_last) else torch.empty_like(x)
    channels_last = dense.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def not_channels_last(name: str) -> str:
    """Return why a call is refused whose argument `name` has another memory format."""
    return f"{name} is not in channels_last (.to(memory_format=torch.channels_last))"


def elements_read(a: Arguments) -> int:
    """Return how many elements of x some window has: without padding it need not have all."""
    (H, W), N, C = a.x.shape[2:], *a.x.shape[:2]
    if max(a.padding) == 0:
        H, W = (
            n if r == 1 else (n - 1) * s + d * (r - 1) + 1
            for n, r, s, d in zip(a.image, a.weight.shape[2:], a.stride, a.dilation, strict=True)
        )
    return N * C * H * W


def site(a: Arguments) -> str:
    """Return what tuning tables call a convolution: all of a call but its batch and activation."""
    (_, C, H, W), (K, _, R, S) = a.x.shape, a.weight.shape
    words = [f"{C}x{H}x{W} > {K} {R}x{S}"]
    for name, (down, right), usual in (
        ("stride", a.stride, 1),
        ("pad", a.padding, 0),
        ("dilation", a.dilation, 1),
    ):
        if (down, right) != (usual, usual):
            words.append(f"{name} {down}" if down == right else f"{name} {down}x{right}")
    words += [f"groups {a.groups}"] if a.groups > 1 else []
    words.append(str(a.x.dtype).removeprefix("torch."))
    words += ["ieee"] if a.precision == "ieee" else []
    words += ["channels first"] if memory_format(a.x) == torch.contiguous_format else []
    return " ".join(words + (["residual"] if a.residual is not None else []))


def check(*args: object) -> None:
    """Raise unless the arguments of a call are what the contract says."""
    name, a = "conv2d_act", Arguments(*args)  # pyright: ignore[reportArgumentType]
    check_image(name, a.x)
    if min(*a.stride, *a.dilation, a.groups) < 1 or min(a.padding) < 0:
        raise ValueError(
            f"{name}: stride, dilation and groups must be positive and padding not negative; got "
            f"stride {a.stride}, padding {a.padding}, dilation {a.dilation}, groups {a.groups}"
        )
    _check_weight(a.x, a.weight, a.groups)
    check_parameters(name, a.x, scale=a.scale, bias=a.bias)
    K = a.weight.shape[0]
    for label, v in (("scale", a.scale), ("bias", a.bias)):
        if v is not None and v.shape != (K,):
            raise ValueError(
                f"{name}: {label} must have shape ({K},), one value per filter of weight "
                f"{tuple(a.weight.shape)}; got {tuple(v.shape)}"
            )
    check_act(name, a.act)
    if min(a.image) < 1:
        raise ValueError(
            f"{name}: the padded image must hold one window: x {tuple(a.x.shape)}, weight "
            f"{tuple(a.weight.shape)}, padding {a.padding}, dilation {a.dilation}; pad more"
        )
    check_residual(name, a.x, a.residual, shape=a.shape)


def _check_weight(x: Tensor, weight: Tensor, groups: int) -> None:
    if not isinstance(weight, Tensor) or weight.dim() != 4 or not weight.numel():
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"conv2d_act: weight must have shape (K, C/groups, R, S), got {got}")
    if weight.shape[0] % groups or weight.shape[1] * groups != x.shape[1]:
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
