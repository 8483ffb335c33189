"""What the cases of `scale_bias_act` and `batch_norm_act` have in common."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from ...kernels._act import ACTIVATIONS
from ._case import DTYPES, LAYOUTS, Case, Draw, Inputs, Layout, of_odd_shapes, tagged

DIFFERENTIABLE = ("x", "weight", "bias", "residual")
PARAMETERS = ("weight", "bias")
FULL, PLAIN = ("affine", "stats", "residual"), ("affine", "stats")
_WIDTHS = ((112, 64), (56, 64), (56, 256), (28, 128), (28, 512), (14, 256), (14, 1024))
RESNET50 = tuple((256, C, HW, HW) for HW, C in (*_WIDTHS, (7, 512), (7, 2048)))


def draw(case: Case, draw: Draw) -> Inputs:
    """Draw a map, a residual and per-channel vectors."""
    C = case.shape[1]
    affine, stats = "affine" in case.options, "stats" in case.options
    return {
        "x": draw.x(),
        "weight": (draw.normal(C) + 1.5).float() if affine else None,
        "bias": draw.normal(C).float() if affine else None,
        "residual": draw.residual() if "residual" in case.options else None,
        "mean": draw.normal(C).float() if stats else None,
        "var": (0.5 + draw.normal(C).abs()).float() if stats else None,
        "dy": draw.map(draw.normal(*case.shape)),
    }


def declare(op: str) -> Iterator[Case]:
    """Yield the cases of an op with these inputs."""
    base = Case(op, (2, 12, 5, 6), act="relu", options=FULL)
    yield from tagged("test", _tests(base))
    yield from tagged("compile", _compiles(base))
    for layout, act in itertools.product(("nchw", "nhwc"), ("silu", "gelu")):
        double = replace(base, shape=(2, 3, 2, 2), dtype=torch.float64, layout=layout, act=act)
        yield from tagged("double", iter([double]))
    yield from tagged("aot", _gate(base))
    for act, options, frozen in itertools.product(
        ACTIVATIONS, (PLAIN, ("affine",), FULL), ((), ("frozen",))
    ):
        case = replace(base, shape=(2, 8, 5, 6), dtype=torch.bfloat16, act=act)
        yield from tagged("traffic", iter([replace(case, options=(*options, *frozen))]))
    yield from tagged("bench", _resnet50(base))


def _tests(base: Case) -> Iterator[Case]:
    # every dtype x layout x activation x residual on one small map
    for dtype, layout, act, options in itertools.product(
        DTYPES, LAYOUTS, ACTIVATIONS, (FULL, PLAIN)
    ):
        if layout != "mixed" or "residual" in options:
            case = replace(base, dtype=dtype, layout=layout, act=act, options=options)
            # the narrow types make no difference that two activations with a residual do not show
            again = dtype != torch.float32 and (options == PLAIN or act not in ("relu", "gelu"))
            yield replace(case, tags=case.tags | ({"thorough"} if again else set()))
    # optional arguments left out
    for options in ((), ("affine",), ("stats",), ("residual",), ("affine", "residual")):
        for layout in ("nchw", "nhwc"):
            yield replace(base, layout=layout, options=options)
    yield from of_odd_shapes(base, FULL, PLAIN)


def _compiles(base: Case) -> Iterator[Case]:
    for layout, act, options in itertools.product(
        ("nchw", "nhwc"), ("none", "relu", "silu"), (FULL, PLAIN)
    ):
        thorough = act != "relu" and (act, options) != ("silu", FULL)
        tags = base.tags | ({"thorough"} if thorough else set())
        yield replace(base, layout=layout, act=act, options=options, tags=tags)


def _resnet50(base: Case) -> Iterator[Case]:
    layouts: tuple[Layout, ...] = ("nhwc", "nchw")
    for shape, layout, options in itertools.product(RESNET50, layouts, (FULL, PLAIN)):
        yield replace(base, shape=shape, dtype=torch.bfloat16, layout=layout, options=options)


def _gate(base: Case) -> Iterator[Case]:
    """Yield real models' maps, every option once, then what is odd."""
    real = list(_resnet50(base))
    first = real[0]
    yield from (case for case in real if case.options == FULL)
    yield from (replace(first, act=act, options=PLAIN) for act in ACTIVATIONS)
    yield replace(first, act="gelu")
    yield replace(first, options=())
    yield replace(first, dtype=torch.float16)
    yield replace(first, dtype=torch.float32)
    yield replace(first, dtype=torch.float32, layout="nchw")
    yield replace(first, dtype=torch.float64, options=("residual",))
    yield replace(first, shape=(1, 512, 7, 7))
    yield replace(first, shape=(32, 104, 28, 28))  # RegNetY-400MF: 8 divides C, 16 does not
    for layout in ("nhwc", "nchw", "sliced"):
        yield replace(first, shape=(3, 17, 7, 7), layout=layout)
