"""Convolution on CPUs by oneDNN, with all that follows it in the epilogue, and weights packed once.

PyTorch has these as ops for Inductor. A weight is reordered into the blocks that oneDNN wants for
images of one size, and this copy is kept as long as the weight: beside it, not in it, so that no
`state_dict`, pickle or copy of a module has it. Only parameters are packed: other tensors do not
come back.

oneDNN's relu returns 0 for NaN; aten's returns NaN.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._act import finish
from ._conv2d import Arguments, memory_format
from ._op import is_plain

_mkldnn: Any = torch.ops.mkldnn

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
    steps: tuple[Any, ...]
    weight: Tensor


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


def _is_supported(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return _mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return _mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def bound(a: Arguments) -> Callable[..., Tensor]:
    """Return what runs calls of the signature of `a`, given the op's arguments.

    All that follows from the signature is found out here: for one small image a network spends as
    long between its convolutions as in them.
    """
    steps = (a.padding, a.stride, a.dilation, a.groups)
    name, algorithm = _ACTIVATIONS[a.act]
    last = None if a.act == "none" else name
    adds = a.groups == 1 and a.act in ("none", "relu")  # PyTorch has no other adds
    rounds_bias = a.bias is not None and a.bias.dtype != a.x.dtype
    image, act, wanted = a.x.shape, a.act, memory_format(a.x)
    unary = _mkldnn._convolution_pointwise.default
    binary = _mkldnn._convolution_pointwise.binary

    def run(
        x: Tensor, weight: Tensor, _: None, bias: Tensor | None, residual: Tensor | None, *__: Any
    ) -> Tensor:
        if rounds_bias and bias is not None:
            bias = bias.to(x.dtype)
        packed = _pack(weight, image, steps)
        if packed is weight:  # channels_last out of whatever comes in, as with packed weights
            x = x.contiguous(memory_format=torch.channels_last)
        if residual is None:
            y = unary(x, packed, bias, *steps, name, [], algorithm)
        elif adds:
            y = binary(x, residual, packed, bias, *steps, "add", 1.0, last, [], None)
        else:
            y = unary(x, packed, bias, *steps, "none", [], "")
            y = finish(y, residual, act)
        return y if wanted is torch.channels_last else y.contiguous(memory_format=wanted)

    return run


def forget(weight: Tensor) -> None:
    """Drop the packed copy of a weight."""
    _drop(id(weight))


def _drop(key: int) -> None:
    _packed.pop(key, None)
    _last.pop(key, None)


def _pack(weight: Tensor, image: torch.Size, steps: tuple[Any, ...]) -> Tensor:
    """Return `weight` packed for images of a size, or as it is if it is no parameter.

    Packed for another size it does as well, if not always as fast. It is packed anew when a size
    comes twice in a row: sizes that alternate would have it packed all the time.
    """
    owner = weight if weight._base is None else weight._base
    if not isinstance(owner, nn.Parameter) or owner.is_inference():
        return weight
    key = id(owner)
    found = _packed.get(key)
    if (
        found is not None
        and found.owner() is owner
        and found.version == owner._version
        and found.place == weight.data_ptr()
        and found.steps == steps
        and found.source.stride() == weight.stride()
        and found.source.dtype == weight.dtype
        and found.source.shape == weight.shape
    ):
        if found.image == image:
            if _last:
                _last.pop(key, None)
            return found.weight
        if _last.get(key) != image:
            _last[key] = image
            return found.weight
    _last.pop(key, None)
    with torch.no_grad():
        source = weight.detach()
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(  # pyright: ignore
            source.to_mkldnn(), *steps, list(image)
        )
    kept_with = weakref.ref(owner, lambda _: _drop(key))
    _packed[key] = _Packed(
        kept_with, source, source.data_ptr(), owner._version, image, steps, packed
    )
    return packed
