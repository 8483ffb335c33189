"""The cases of `layer_norm_2d`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from ...kernels import layer_norm_2d
from ._case import (
    DTYPES,
    LAYOUTS,
    Case,
    Draw,
    Inputs,
    Shape,
    Subject,
    of_odd_shapes,
    tagged,
)

AFFINE = ("affine",)
_WIDTHS = ((56, 96), (28, 192), (14, 384), (7, 768), (56, 128), (7, 1024))
CONVNEXT: tuple[Shape, ...] = tuple((256, C, HW, HW) for HW, C in _WIDTHS)


def _draw(case: Case, draw: Draw) -> Inputs:
    C = case.shape[1]
    dtype = torch.promote_types(case.dtype, torch.float32)
    x = draw.x()
    if "distant" in case.options:  # a mean of 1000 standard deviations
        x = draw.map(1000 + draw.normal(*case.shape))
    return {
        "x": x,
        "weight": (draw.normal(C) + 1.5).to(dtype) if "affine" in case.options else None,
        "bias": draw.normal(C).to(dtype) if {"affine", "bias"} & {*case.options} else None,
        "dy": draw.residual(),  # of another memory format than x where the layout is "mixed"
    }


def _run(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    x = inputs["x"]
    assert x is not None
    return {"y": layer_norm_2d(x, inputs["weight"], inputs["bias"])}


def _declare() -> Iterator[Case]:
    base = Case("layer_norm_2d", (2, 12, 5, 6), options=AFFINE)
    yield from tagged("test", _tests(base))
    for layout, options in itertools.product(("nchw", "nhwc"), (AFFINE, ("affine", "frozen"), ())):
        yield from tagged("compile", iter([replace(base, layout=layout, options=options)]))
    for layout in ("nchw", "nhwc"):
        double = replace(base, shape=(2, 3, 2, 2), dtype=torch.float64, layout=layout)
        yield from tagged("double", iter([double]))
    yield from tagged("aot", _gate(base))
    for dtype, shape, options in itertools.product(
        (torch.bfloat16, torch.float64), ((2, 8, 5, 6), (1, 300, 3, 3)), (AFFINE, ())
    ):
        for frozen in ((), ("frozen",)):
            case = replace(base, shape=shape, dtype=dtype, options=(*options, *frozen))
            yield from tagged("traffic", iter([case]))
    yield from tagged("bench", _convnext(base))


def _tests(base: Case) -> Iterator[Case]:
    for dtype, layout, options in itertools.product(DTYPES, LAYOUTS, (AFFINE, ())):
        yield replace(base, dtype=dtype, layout=layout, options=options)
    for layout in ("nchw", "nhwc"):
        yield replace(base, layout=layout, options=("bias",))
        yield replace(base, layout=layout, options=("affine", "frozen"))
        yield replace(base, layout=layout, dtype=torch.float64)
        for C in (12, 300):
            yield replace(base, shape=(1, C, 3, 4), layout=layout, options=("affine", "distant"))
    yield from of_odd_shapes(base, AFFINE)
    # the widest RegNet's channels, the widest of all in one tile, and more, which are walked
    wide = replace(base, shape=(1, 3712, 1, 2), options=("affine", "frozen"))
    for C, layout in itertools.product((3712, 4096), ("nchw", "nhwc", "sliced")):
        yield replace(wide, shape=(1, C, 1, 2), layout=layout)
    yield replace(wide, layout="nhwc", dtype=torch.bfloat16, options=AFFINE)
    yield replace(wide, shape=(2, 4100, 1, 1), layout="nhwc")
    yield replace(wide, shape=(2, 4100, 1, 1), layout="sliced_nhwc", dtype=torch.bfloat16)


def _convnext(base: Case) -> Iterator[Case]:
    for shape, layout in itertools.product(CONVNEXT, ("nhwc", "nchw")):
        yield replace(base, shape=shape, dtype=torch.bfloat16, layout=layout)


def _gate(base: Case) -> Iterator[Case]:
    """Yield real models' maps, every option once, then what is odd."""
    real = list(_convnext(base))
    yield from real
    first = real[0]
    for layout in ("nhwc", "nchw"):
        for shape in (first.shape, (256, 384, 14, 14)):
            yield replace(first, layout=layout, shape=shape, options=())
            yield replace(first, layout=layout, shape=shape, dtype=torch.float32)
        yield replace(first, layout=layout, shape=(1, 768, 7, 7))
        yield replace(first, layout=layout, dtype=torch.float64)
    yield replace(first, dtype=torch.float16)
    yield replace(first, shape=(32, 4096, 7, 7))
    for C, layout in itertools.product((17, 3712), ("nchw", "sliced", "sliced_nhwc")):
        yield replace(first, shape=(3, C, 7, 7), layout=layout)


SUBJECT = Subject(_draw, _run, _declare, ("x", "weight", "bias"), ("weight", "bias"))
