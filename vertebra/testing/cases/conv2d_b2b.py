"""The cases of `conv2d_b2b`: inference, so nothing wants a gradient.

Options: "mid=64" a 3x3 in front, with so many filters; "k=40" channels of y (else as many as of x),
"d=24" of z (else as many as of x), "bias" (of all), "residual", "half" (biases in x's dtype),
"next=silu" the last activation and "before=silu" that of the 3x3 (else the case's), "ieee" (fp32 is
multiplied as fp32, not as TF32), and a candidate: "apart", "triton:64x64:w4:s2".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels._act import ACTIVATIONS
from ...kernels.conv2d_b2b import configurations, op
from ._case import Case, Draw, Inputs, Shape, Subject, tagged

FULL = ("bias", "residual")


def _option(case: Case, name: str) -> str | None:
    return next((o.partition("=")[2] for o in case.options if o.startswith(f"{name}=")), None)


def _draw(case: Case, draw: Draw) -> Inputs:
    N, B, H, W = case.shape
    C, K, D = (int(_option(case, name) or B) for name in ("mid", "k", "d"))
    has_mid = _option(case, "mid") is not None
    vectors = case.dtype if "half" in case.options else torch.float32

    def weight(filters: int, channels: int, side: int = 1) -> Tensor:
        values = draw.normal(filters, channels, side, side) / (channels * side**2) ** 0.5
        return values.to(case.dtype).contiguous(memory_format=torch.channels_last)

    def bias(filters: int) -> Tensor | None:
        return draw.normal(filters).to(vectors) if "bias" in case.options else None

    mixed = case.layout == "mixed"
    return {
        "x": draw.x(),
        "weight": weight(K, C),
        "next_weight": weight(D, K),
        "bias": bias(K),
        "next_bias": bias(D),
        "residual": draw.map(draw.normal(N, K, H, W), "nchw" if mixed else None)
        if "residual" in case.options
        else None,
        "mid_weight": weight(C, B, 3) if has_mid else None,
        "mid_bias": bias(C) if has_mid else None,
    }


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    y, z = op(*_arguments(case, inputs))
    return {"y": y, "z": z}


def _arguments(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    """Return the arguments of the op."""
    precision = "ieee" if "ieee" in case.options else "tf32"
    candidates = (o for o in case.options if o.startswith(("triton", "apart")))
    *pair, mid_weight, mid_bias = inputs.values()
    mid_act = "none" if mid_weight is None else _option(case, "before") or case.act
    return (
        *pair,
        *(case.act, _option(case, "next") or case.act),
        *(mid_weight, mid_bias, mid_act),
        precision if case.dtype == torch.float32 else "",
        next(candidates, ""),
    )


def _terms(case: Case, name: str, value: Tensor) -> int:
    """Return how many products a sum of fp32 has; a narrower type's one rounding hides them."""
    if value.dtype != torch.float32:
        return 1
    B, mid = case.shape[1], _option(case, "mid")
    terms = B if mid is None else 9 * B + int(mid)
    return terms if name == "y" else terms + int(_option(case, "k") or B)


def _declare() -> Iterator[Case]:
    options = ("k=72", "d=24", *FULL)
    base = Case("conv2d_b2b", (2, 24, 7, 9), layout="nhwc", act="relu", options=options)
    yield from tagged("test", _tests(base))
    yield from tagged("compile", _compiles(base))
    yield from tagged("aot", _gate(base))
    yield from tagged("traffic", _traffic(base))
    yield from tagged("bench", _real(base))
    for (C, HW), options in (RESNET50[0], WHOLE[0]):
        as_given = replace(base, shape=(256, C, HW, HW), dtype=torch.bfloat16, layout="nchw")
        yield from tagged("bench", iter([replace(as_given, options=options)]))


def _tests(base: Case) -> Iterator[Case]:
    yield base
    wide = (torch.float32, torch.float16)
    # every tile; the last of pixels and of filters are ragged, channels no powers of two
    tiles = ("64x64:w4:s2", "128x64:w8:s2", "128x128:w8:s2")
    for tile, dtype in itertools.product(tiles, wide):
        if dtype == torch.float32 and tile == "128x128:w8:s2":
            continue  # more sums than registers
        yield replace(base, dtype=dtype, options=(f"triton:{tile}", "k=168", "d=40", *FULL))
    # as in stage 1, batches of one and of odd size; as in a RegNet; more channels of z than of x
    for shape, options in (
        ((1, 64, 5, 7), ("k=256", "d=64")),
        ((3, 96, 3, 7), ("k=96", "d=96")),
        ((1, 16, 9, 15), ("k=24", "d=136")),
        ((5, 8, 1, 1), ("k=8", "d=8")),
    ):
        yield replace(base, shape=shape, dtype=torch.float16, options=(*options, *FULL))
    # what is left out, activations, biases in x's type
    for options in (("bias",), ("residual",), ()):
        yield replace(base, act="none", options=("k=72", "d=24", *options))
    for act, then in itertools.pairwise([*ACTIVATIONS, "none"]):
        yield replace(base, dtype=torch.float16, act=act, options=(f"next={then}", *FULL))
    yield replace(base, dtype=torch.float16, options=("half", *FULL))
    # what runs as two kernels: slices, other layouts, fp32 as fp32, odd channels, too many of them
    for layout in ("sliced_nhwc", "mixed"):
        yield replace(base, layout=layout)
    yield replace(base, options=("ieee", *base.options))
    yield replace(base, shape=(1, 17, 3, 5), options=("k=5", "d=9", *FULL))
    yield replace(base, shape=(1, 264, 2, 3), dtype=torch.float16, options=("d=16", *FULL))
    yield replace(base, options=("apart", *base.options))
    yield from _tests_of_bottlenecks(base)


def _tests_of_bottlenecks(base: Case) -> Iterator[Case]:
    """Yield cases with a 3x3 in front: boxes of several images, and some that end outside."""
    tiles = ("64x64:w4:s2", "128x64:w8:s2", "128x128:w8:s2")
    wide = (torch.float32, torch.float16)
    for tile, dtype in itertools.product(tiles, wide):
        if dtype == torch.float32 and tile == "128x128:w8:s2":
            continue  # more sums than registers
        options = (f"triton:{tile}", "mid=40", "k=168", "d=40", *FULL)
        yield replace(base, shape=(3, 48, 7, 9), dtype=dtype, options=options)
    base = replace(base, dtype=torch.float16)
    # as in stages 1 and 2, batches of one and of odd size; fewer and more channels of h than of x;
    # images less than a window
    for shape, options in (
        ((1, 64, 7, 9), ("mid=64", "k=256", "d=64")),
        ((3, 128, 9, 5), ("mid=128", "k=136", "d=128")),
        ((1, 96, 17, 3), ("mid=72", "k=96", "d=136")),
        ((5, 16, 1, 1), ("mid=136", "k=8", "d=8")),
        ((2, 32, 2, 13), ("mid=24", "k=64", "d=24")),
    ):
        yield replace(base, shape=shape, options=(*options, *FULL))
    base = replace(base, shape=(3, 32, 7, 9))
    for options in (("bias",), ("residual",), ()):
        yield replace(base, act="none", options=("mid=16", "k=72", "d=24", *options))
    for act, then in itertools.pairwise(["none", *ACTIVATIONS]):
        yield replace(base, act=act, options=("mid=40", f"before={then}", *FULL))
    yield replace(base, options=("mid=40", "half", *FULL))
    # what runs as two kernels or three
    options = ("mid=40", "k=72", "d=24", *FULL)
    for layout in ("sliced_nhwc", "mixed"):
        yield replace(base, layout=layout, options=options)
    yield replace(base, dtype=torch.float32, options=("ieee", *options))
    yield replace(base, shape=(1, 24, 3, 5), options=options)
    yield replace(base, shape=(1, 16, 3, 5), options=("mid=17", "k=24", *FULL))
    yield replace(base, options=("apart", *options))


def _compiles(base: Case) -> Iterator[Case]:
    yield base
    yield replace(base, act="none", options=("k=40", "bias"))
    yield replace(base, shape=(2, 32, 7, 9), options=("mid=40", *FULL))


def _traffic(base: Case) -> Iterator[Case]:
    base = replace(base, shape=(2, 32, 7, 9), dtype=torch.bfloat16)
    for options in (FULL, ("bias",), ("mid=40", *FULL)):
        yield replace(base, options=("k=72", "d=40", *options))


# (channels, pixels across), options: the pairs of real models at 224x224
RESNET50 = (((64, 56), ("k=256", "d=64", *FULL)), ((128, 28), ("k=512", "d=128", *FULL)))
RESNEXT50 = (((128, 56), ("k=256", "d=128", *FULL)),)
REGNETY = (((48, 56), FULL), ((96, 56), FULL), ((128, 56), FULL))
# with the 3x3 in front
WHOLE = tuple(((C, HW), (f"mid={C}", *options)) for (C, HW), options in RESNET50)
WIDE_RESNET50 = (((128, 56), ("mid=128", "k=256", "d=128", *FULL)),)


def _real(base: Case) -> Iterator[Case]:
    for (C, HW), options in (*RESNET50, *RESNEXT50, *REGNETY, *WHOLE, *WIDE_RESNET50):
        shape: Shape = (256, C, HW, HW)
        yield replace(base, shape=shape, dtype=torch.bfloat16, options=options)


def _gate(base: Case) -> Iterator[Case]:
    yield from _real(base)
    for (C, HW), options in (RESNET50[0], WHOLE[0]):
        stage1: Shape = (256, C, HW, HW)
        for dtype in (torch.float16, torch.float32):
            yield replace(base, shape=stage1, dtype=dtype, options=options)
        for act in ("silu", "gelu"):
            yield replace(base, shape=stage1, dtype=torch.bfloat16, act=act, options=options)
    # the widest that is taken, in either width, and where nothing is added
    for dtype, C in ((torch.bfloat16, 256), (torch.float32, 128)):
        for options in (FULL, (), (f"mid={C}", *FULL), (f"mid={C}",)):
            yield replace(base, shape=(256, C, 28, 28), dtype=dtype, options=("k=512", *options))


def _variants(case: Case) -> Iterator[Case]:
    """Yield the case with every configuration that the assumed device may be tuned to."""
    for candidate in configurations(*_arguments(case, case.inputs("meta"))):
        yield replace(case, options=(candidate, *case.options))


SUBJECT = Subject(_draw, _run, _declare, (), terms=_terms, variants=_variants)
