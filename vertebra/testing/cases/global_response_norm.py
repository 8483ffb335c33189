"""The cases of `global_response_norm`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels import global_response_norm
from ._case import DTYPES, LAYOUTS, Case, Draw, Inputs, Layout, Subject, of_odd_shapes, tagged

_CONVNEXT_V2_TINY = ((256, 384, 56, 56), (256, 768, 28, 28), (256, 1536, 14, 14), (256, 3072, 7, 7))
_DENSE: tuple[Layout, ...] = ("nhwc", "nchw")


def _draw(case: Case, draw: Draw) -> Inputs:
    C = case.shape[1]
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return {
        "x": draw.x(),
        "weight": draw.normal(C).to(dtype),
        "bias": draw.normal(C).to(dtype),
        "dy": draw.residual(),
    }


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x, weight, bias, _ = inputs.values()
    assert x is not None
    assert weight is not None
    assert bias is not None
    return {"y": global_response_norm(x, weight, bias)}


def _declare() -> Iterator[Case]:
    base = Case("global_response_norm", (2, 12, 5, 6))
    yield from tagged("test", _tests(base))
    yield from tagged("compile", (replace(base, layout=layout) for layout in ("nchw", "nhwc")))
    yield replace(base, options=("frozen",), tags=frozenset({"compile"}))
    for layout in _DENSE:
        double = replace(base, shape=(2, 2, 2, 2), dtype=torch.float64, layout=layout)
        yield from tagged("double", iter([double]))
    yield from tagged("aot", _gate(base))
    for options in ((), ("frozen",)):
        case = replace(base, shape=(2, 8, 5, 6), dtype=torch.bfloat16, options=options)
        yield from tagged("traffic", iter([case]))
    yield from tagged("bench", _real(base))


def _tests(base: Case) -> Iterator[Case]:
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        yield replace(base, dtype=dtype, layout=layout)
    for layout in ("nchw", "nhwc"):
        yield replace(base, layout=layout, options=("frozen",))
    yield from of_odd_shapes(base, ())
    # more channels than a program holds at once
    yield replace(base, shape=(2, 3712, 2, 1), layout="nhwc", tags=base.tags | {"thorough"})


def _real(base: Case) -> Iterator[Case]:
    for shape, layout in itertools.product(_CONVNEXT_V2_TINY, _DENSE):
        yield replace(base, shape=shape, dtype=torch.bfloat16, layout=layout)


def _gate(base: Case) -> Iterator[Case]:
    """Yield real models' maps, one image among them, then what is odd."""
    real = list(_real(base))
    yield from real
    yield from (replace(case, shape=(1, *case.shape[1:])) for case in (real[0], real[1], real[6]))
    first = real[0]
    yield replace(first, dtype=torch.float16)
    yield replace(first, dtype=torch.float32)
    yield replace(first, dtype=torch.float32, layout="nchw")
    yield replace(first, dtype=torch.float64)
    yield replace(first, shape=(3, 17, 7, 7))
    yield replace(first, shape=(3, 17, 7, 7), layout="sliced")


SUBJECT = Subject(
    _draw,
    _run,
    _declare,
    ("x", "weight", "bias"),
    ("weight", "bias"),
)
