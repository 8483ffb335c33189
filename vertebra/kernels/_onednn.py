"""Convolution on CPUs by oneDNN, with all that follows it in the epilogue, and weights packed once.

PyTorch has these as ops for Inductor. A weight is reordered into the blocks that oneDNN wants for
images of one size, and this copy is kept as long as the weight: beside it, not in it, so that no
`state_dict`, pickle or copy of a module has it. Only parameters are packed: other tensors do not
come back.

A 1x1 is a product of rows too, which oneDNN has as a linear layer, and MKL without an epilogue.
Which is the fastest is a matter of the CPU.

oneDNN's relu returns 0 for NaN; aten's returns NaN.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._act import finish
from ._conv2d import Arguments, memory_format, not_channels_last
from ._op import is_plain, wants_grad

_mkldnn: Any = torch.ops.mkldnn
_mkl: Any = torch.ops.mkl

Run = Callable[..., Tensor]
"""Runs calls of one signature, given the op's arguments."""

# by the name of ours: oneDNN's, and its algorithm
_ACTIVATIONS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "hardswish": ("hardswish", ""),
    "sigmoid": ("sigmoid", ""),
}


class _Packed(NamedTuple):
    """The packed copy of a weight, and what it was made from and for."""

    owner: weakref.ref[nn.Parameter]
    # shares the weight's memory: no other tensor can come to lie there, even if the weight leaves
    source: Tensor
    place: int
    version: int
    image: torch.Size
    way: tuple[Any, ...]
    weight: Tensor

    @property
    def rows(self) -> int:
        """The pixels that it is for."""
        return _pixels(self.image)


_packed: dict[int, _Packed] = {}  # by id of the parameter
_last: dict[int, torch.Size] = {}  # the image that a parameter last met, if not the one it is for


def refuses(a: Arguments) -> str | None:
    """Return why oneDNN does not take a call."""
    if (reason := refuses_map(a.x)) is not None:
        return reason
    if a.scale is not None:
        return "a scale (fold it into weight)"
    if a.act not in _ACTIVATIONS:
        return f"act {a.act} (not one of oneDNN's)"
    return None if is_plain(a) else "something traces, transforms or wraps the call"


def refuses_map(x: Tensor) -> str | None:
    """Return why oneDNN takes no convolution of x."""
    if not x.is_cpu:
        return f"device {x.device.type} (oneDNN is for CPUs)"
    if torch.compiler.is_compiling():
        return "it is being compiled (Inductor has oneDNN do the same)"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "oneDNN is missing or switched off (torch.backends.mkldnn)"
    if not _is_supported(x.dtype):
        return f"dtype {x.dtype} (not one that oneDNN has for this CPU)"
    return "empty input" if x.numel() == 0 else None


def refuses_rows(a: Arguments) -> str | None:
    """Return why a call is no product of oneDNN's."""
    if a.weight.shape[2:] != (1, 1) or (*a.stride, *a.padding, a.groups) != (1, 1, 0, 0, 1):
        return "it has a window, steps, padding or groups (and is no product of rows)"
    if memory_format(a.x) is not torch.channels_last:
        return not_channels_last("x")
    return refuses(a)


def refuses_mkl(a: Arguments) -> str | None:
    """Return why a call is no product of MKL's."""
    if not torch.backends.mkl.is_available():
        return "PyTorch was built without MKL"
    if a.x.dtype != torch.float32:
        return f"dtype {a.x.dtype} (MKL packs weights in fp32)"
    return refuses_rows(a)


@cache  # these are calls of ops: a recorder would take the answer for a number of its calls
def _is_supported(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return _mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return _mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def bound(a: Arguments) -> Run:
    """Return what runs calls of the signature of `a` as convolutions.

    All that follows from the signature is found out here: for one small image a network spends as
    long between its convolutions as in them.
    """
    steps = (a.padding, a.stride, a.dilation, a.groups)
    way = ("convolution", *steps)
    name, algorithm = _ACTIVATIONS[a.act]
    last = None if a.act == "none" else name
    adds = a.groups == 1 and a.act in ("none", "relu")  # PyTorch has no other adds
    image, act, wanted = a.x.shape, a.act, memory_format(a.x)
    unary = _mkldnn._convolution_pointwise.default
    binary = _mkldnn._convolution_pointwise.binary

    def run(
        x: Tensor, weight: Tensor, _: None, bias: Tensor | None, residual: Tensor | None, *__: Any
    ) -> Tensor:
        packed = _pack(weight, image, way)
        if packed is None:  # channels_last out of whatever comes in, as with packed weights
            x = x.contiguous(memory_format=torch.channels_last)
        else:
            weight = packed.weight
        if residual is None:
            y = unary(x, weight, _rounded(bias, x), *steps, name, [], algorithm)
        elif adds:
            bias = _rounded(bias, x)
            y = binary(x, residual, weight, bias, *steps, "add", 1.0, last, [], None)
        else:
            y = unary(x, weight, _rounded(bias, x), *steps, "none", [], "")
            y = finish(y, residual, act)
        return y if wanted is torch.channels_last else y.contiguous(memory_format=wanted)

    return run


def bound_linear(a: Arguments) -> Run:
    """Return what runs calls of the signature of `a` as linear layers of oneDNN's."""
    name, algorithm = _ACTIVATIONS[a.act]
    act = a.act
    unary, binary = _mkldnn._linear_pointwise.default, _mkldnn._linear_pointwise.binary

    def product(
        x: Tensor, _: Tensor, packed: _Packed, bias: Any, residual: Tensor | None
    ) -> Tensor:
        if residual is None:
            return unary(x, packed.weight, bias, name, [], algorithm)
        return finish(binary(x, residual, packed.weight, bias, "add"), None, act)

    return _by_rows(a, ("linear",), product)


def bound_mkl(a: Arguments) -> Run:
    """Return what runs calls of the signature of `a` as products of MKL's, and the rest behind."""
    act, linear = a.act, _mkl._mkl_linear.default

    def product(x: Tensor, weight: Tensor, packed: _Packed, bias: Any, residual: Any) -> Tensor:
        y = linear(x, packed.weight, weight[:, :, 0, 0], bias, packed.rows)
        return finish(y, residual, act)

    return _by_rows(a, ("mkl",), product)


def _by_rows(a: Arguments, way: tuple[Any, ...], product: Run) -> Run:
    """Return what runs calls of the signature of `a` by products of (N, H, W, C) and weights."""
    image, unpacked = a.x.shape, bound(a)

    def run(
        x: Tensor, weight: Tensor, _: None, bias: Tensor | None, residual: Tensor | None, *__: Any
    ) -> Tensor:
        packed = _pack(weight, image, way)
        if packed is None:
            return unpacked(x, weight, None, bias, residual)
        bias = _rounded(bias, x)
        rows = None if residual is None else residual.permute(0, 2, 3, 1)
        return product(x.permute(0, 2, 3, 1), weight, packed, bias, rows).permute(0, 3, 1, 2)

    return run


def _rounded(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a bias in the type of x, as these ops take it."""
    return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)


def fc(s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W s + b for the few rows of s, (N, C), in fp32.

    Of one pixel a product of matrices begins sooner than a convolution, and in fp32 at once, where
    half precision waits for oneDNN: a copy of the weight in fp32 is kept as a packed one is.
    """
    columns = _in_fp32(weight, s).flatten(1).t()
    rows = s.float()
    return rows @ columns if bias is None else torch.addmm(_in_fp32(bias, s), rows, columns)


def _in_fp32(weight: Tensor, s: Tensor) -> Tensor:
    if weight.dtype == torch.float32:
        return weight
    is_kept = is_plain((s, weight)) and not wants_grad(weight)
    packed = _pack(weight, torch.Size(), ("fp32",)) if is_kept else None
    return weight.float() if packed is None else packed.weight


def is_packed(t: Tensor) -> bool:
    """Return whether `t` is the copy of a weight."""
    return any(packed.weight is t for packed in _packed.values())


def forget(weight: Tensor) -> None:
    """Drop the packed copy of a weight."""
    _drop(id(weight))


def _drop(key: int) -> None:
    _packed.pop(key, None)
    _last.pop(key, None)


def _pack(weight: Tensor, image: torch.Size, way: tuple[Any, ...]) -> _Packed | None:
    """Return `weight` packed for images of a size; None if it is no parameter.

    Packed for another size it does as well, if not always as fast. It is packed anew when a size
    comes twice in a row: sizes that alternate would have it packed all the time.
    """
    owner = weight if weight._base is None else weight._base
    if not isinstance(owner, nn.Parameter) or owner.is_inference():
        return None
    key = id(owner)
    found = _packed.get(key)
    if (
        found is not None
        and found.owner() is owner
        and found.version == owner._version
        and found.place == weight.data_ptr()
        and found.way == way
        and found.source.stride() == weight.stride()
        and found.source.dtype == weight.dtype
        and found.source.shape == weight.shape
    ):
        if found.image == image:
            if _last:
                _last.pop(key, None)
            return found
        if _last.get(key) != image:
            _last[key] = image
            return found
    _last.pop(key, None)
    kept_with = weakref.ref(owner, lambda _: _drop(key))
    with torch.no_grad():
        source = weight.detach()
        packed = _reordered(source, image, *way)
    place = source.data_ptr()
    _packed[key] = _Packed(kept_with, source, place, owner._version, image, way, packed)
    return _packed[key]


def _reordered(weight: Tensor, image: torch.Size, kind: str, *steps: Any) -> Tensor:
    if kind == "convolution":
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # pyright: ignore
        return reorder(weight.to_mkldnn(), *steps, list(image))
    if kind == "fp32":
        return weight.float()
    own = _mkl._mkl_reorder_linear_weight if kind == "mkl" else _mkldnn._reorder_linear_weight
    return own(weight.flatten(1).contiguous(), _pixels(image))


def _pixels(image: torch.Size) -> int:
    N, _, H, W = image
    return N * H * W
