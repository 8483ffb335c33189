"""The cases of `global_avg_pool`: "norm" is LayerNorm of the means, "affine" its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels import global_avg_pool
from ._case import DTYPES, LAYOUTS, Case, Draw, Inputs, Layout, Subject, of_odd_shapes, tagged

_FULL = ("norm", "affine")
_DENSE: tuple[Layout, ...] = ("nhwc", "nchw")
# ResNet-50, RegNetY-4GF, ConvNeXt-B, and ResNet-50 at batch 1; only ConvNeXt has the norm
_HEADS = (
    ((256, 2048, 7, 7), ()),
    ((256, 1088, 7, 7), ()),
    ((256, 1024, 7, 7), _FULL),
    ((1, 2048, 7, 7), ()),
)


def _draw(case: Case, draw: Draw) -> Inputs:
    N, C = case.shape[:2]
    affine = "affine" in case.options
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return {
        "x": draw.x(),
        "weight": (draw.normal(C) + 1.5).to(dtype) if affine else None,
        "bias": draw.normal(C).to(dtype) if affine else None,
        "dy": draw.normal(N, C).to(case.dtype),
    }


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x, weight, bias, _ = inputs.values()
    assert x is not None
    return {"y": global_avg_pool(x, weight, bias, eps=1e-6 if "norm" in case.options else None)}


def _terms(case: Case, name: str, value: Tensor) -> int:
    """An answer adds up an image's pixels, and a gradient of a parameter the images as well."""
    N, _, H, W = case.shape
    return H * W if name in ("y", "dx") else N * H * W


def _declare() -> Iterator[Case]:
    base = Case("global_avg_pool", (2, 12, 5, 6), options=_FULL)
    yield from tagged("test", _tests(base))
    for layout, options in itertools.product(_DENSE, (_FULL, (*_FULL, "frozen"), ())):
        yield from tagged("compile", iter([replace(base, layout=layout, options=options)]))
    for layout, options in itertools.product(_DENSE, (_FULL, ())):
        double = replace(base, shape=(2, 3, 2, 2), dtype=torch.float64, layout=layout)
        yield from tagged("double", iter([replace(double, options=options)]))
    yield from tagged("aot", _gate(base))
    for options in (_FULL, (*_FULL, "frozen"), ()):
        case = replace(base, shape=(2, 8, 5, 6), dtype=torch.bfloat16, options=options)
        yield from tagged("traffic", iter([case]))
    yield from tagged("bench", _real(base))


def _tests(base: Case) -> Iterator[Case]:
    for dtype, layout, options in itertools.product(DTYPES, LAYOUTS[:4], (_FULL, ())):
        yield replace(base, dtype=dtype, layout=layout, options=options)
    for options in (("norm",), (*_FULL, "frozen")):
        yield replace(base, options=options)
    yield from of_odd_shapes(base, _FULL, ())
    # more channels than a program holds at once
    yield replace(base, shape=(2, 3712, 2, 1), layout="nhwc", tags=base.tags | {"thorough"})


def _real(base: Case) -> Iterator[Case]:
    for (shape, options), layout in itertools.product(_HEADS, _DENSE):
        case = replace(base, shape=shape, dtype=torch.bfloat16, layout=layout)
        yield replace(case, options=options)


def _gate(base: Case) -> Iterator[Case]:
    """Yield real models' maps, then what is odd."""
    real = list(_real(base))
    yield from real
    normalised = real[4]
    yield replace(normalised, shape=(1, 1024, 12, 12))
    yield replace(normalised, options=("norm",))
    for dtype in (torch.float16, torch.float32, torch.float64):
        yield replace(normalised, dtype=dtype)
    for layout in ("nchw", "sliced"):
        yield replace(normalised, shape=(3, 17, 7, 7), layout=layout)


SUBJECT = Subject(
    _draw,
    _run,
    _declare,
    ("x", "weight", "bias"),
    ("weight", "bias"),
    terms=_terms,
)
