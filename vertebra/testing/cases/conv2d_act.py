"""The cases of `conv2d_act`: inference, so nothing wants a gradient.

Options: "k=24" filters (else as many as channels), "3x3" the window (else 1x1), "stride=2",
"pad=1", "dilation=2", "groups=4", "bias", "scale", "residual", "half" (bias and scale in x's
dtype), "ieee" (fp32 is multiplied as fp32, not as TF32), and a candidate: "cudnn",
"triton:gather".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels._act import ACTIVATIONS
from ...kernels.conv2d_act import configurations, op
from ._case import Case, Draw, Inputs, Shape, Subject, tagged

FULL, PLAIN = ("scale", "bias", "residual"), ("bias",)
HALVES = (torch.float16, torch.bfloat16)


def number(case: Case, name: str, default: int) -> int:
    """Return the number of the option `name`, as in "k=24"."""
    found = [o.partition("=")[2] for o in case.options if o.startswith(f"{name}=")]
    return int(found[0]) if found else default


def _window(case: Case) -> tuple[int, int]:
    found = [o for o in case.options if re.fullmatch(r"\d+x\d+", o)]
    R, S = map(int, (found[0] if found else "1x1").split("x"))
    return R, S


def _steps(case: Case) -> tuple[tuple[int, int], ...]:
    steps = (number(case, "stride", 1), number(case, "pad", 0), number(case, "dilation", 1))
    return tuple((step, step) for step in steps)


def draw(case: Case, source: Draw) -> Inputs:
    """Draw the tensors of a call."""
    (N, C, H, W), (R, S), groups = case.shape, _window(case), number(case, "groups", 1)
    K = number(case, "k", C)
    (stride, _), (padding, _), (dilation, _) = _steps(case)
    P, Q = ((n + 2 * padding - dilation * (r - 1) - 1) // stride + 1 for n, r in ((H, R), (W, S)))
    vectors = case.dtype if "half" in case.options else torch.float32
    weight = source.normal(K, C // groups, R, S) / (C // groups * R * S) ** 0.5
    mixed = case.layout == "mixed"
    return {
        "x": source.x(),
        "weight": weight.to(case.dtype).contiguous(memory_format=torch.channels_last),
        "scale": (source.normal(K) + 1.5).to(vectors) if "scale" in case.options else None,
        "bias": source.normal(K).to(vectors) if "bias" in case.options else None,
        "residual": source.map(source.normal(N, K, P, Q), "nchw" if mixed else None)
        if "residual" in case.options
        else None,
    }


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    return {"y": op(*arguments(case, inputs))}


def arguments(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    """Return the arguments of the op."""
    precision = "ieee" if "ieee" in case.options else "tf32"
    candidates = (o for o in case.options if o.startswith(("triton", "cudnn")))
    return (
        *inputs.values(),
        *_steps(case),
        number(case, "groups", 1),
        case.act,
        precision if case.dtype == torch.float32 else "",
        next(candidates, ""),
    )


def terms(case: Case, name: str, value: Tensor) -> int:
    """Return how many products a sum of fp32 has; a narrower type's one rounding hides them."""
    R, S = _window(case)
    return R * S * case.shape[1] // number(case, "groups", 1) if value.dtype == torch.float32 else 1


def _declare() -> Iterator[Case]:
    base = Case("conv2d_act", (2, 24, 7, 9), layout="nhwc", act="relu", options=("k=40", *FULL))
    yield from tagged("test", _tests(base))
    yield from tagged("compile", _compiles(base))
    yield from tagged("aot", _gate(base))
    yield from tagged("traffic", _traffic(base))
    yield from tagged("bench", _benched(base))


def _tests(base: Case) -> Iterator[Case]:
    yield base
    wide = (torch.float32, torch.float16)
    # every step of a window, by the kernels that take it
    for kernel, steps in (("tiles", _OF_BOXES), ("gather", (*_OF_BOXES, *_OF_POINTERS))):
        for options, dtype in zip(steps, itertools.cycle(wide)):
            # three blocks of the least that is multiplied
            shape = (2, 48, 6, 10) if "stride=2" in options else (2, 48, 7, 9)
            mine = (f"triton:{kernel}", "k=40", *options, *FULL)
            yield replace(base, shape=shape, dtype=dtype, options=mine)
    # rows that are runs of memory: three channels do not align to a descriptor
    yield replace(base, shape=(1, 3, 17, 13), options=("k=20", "4x4", "stride=4", *PLAIN))
    yield replace(base, shape=(1, 3, 17, 13), options=("k=20", "7x7", "stride=2", "pad=3", *PLAIN))
    # layouts, activations, what is left out
    for layout, kernel in itertools.product(("sliced_nhwc", "mixed"), ("1x1", "3x3")):
        yield replace(base, layout=layout, options=("k=40", kernel, "pad=1", *FULL))
    for act, kernel in zip(ACTIVATIONS, itertools.cycle(("tiles", "gather"))):
        yield replace(base, dtype=torch.float16, act=act, options=(f"triton:{kernel}", *FULL))
    for options, kernel in itertools.product(
        ((), ("scale",), PLAIN, ("residual",)), ("tiles", "gather")
    ):
        yield replace(base, act="none", options=(f"triton:{kernel}", *options))
    yield replace(base, dtype=torch.float16, options=("half", *FULL))
    yield replace(base, options=("ieee", "3x3", "pad=1", *FULL))
    # groups: bundles, a ragged last bundle, one group that fills a tile, more than one tile
    for (shape, options), dtype in zip(
        (
            ((1, 32, 6, 5), ("groups=8", "pad=1")),
            ((1, 40, 6, 5), ("groups=10", "stride=2", "pad=1")),
            ((1, 48, 5, 4), ("groups=2", "k=80", "pad=1")),
            ((1, 72, 3, 4), ("groups=2", "k=144", "pad=1")),
            ((1, 6, 5, 5), ("groups=3", "k=15", "pad=1")),
        ),
        itertools.cycle(wide),
    ):
        yield replace(base, shape=shape, dtype=dtype, options=("3x3", *options, *FULL))
    # the mean shapes: one channel, one pixel, more than one tile of everything
    for shape, options in (
        ((1, 1, 3, 5), ("3x3", "pad=1")),
        ((3, 17, 1, 1), ("k=5",)),
        ((3, 16, 1, 1), ("k=8",)),
        ((2, 80, 9, 10), ("triton:tiles", "k=136")),
        ((2, 80, 9, 10), ("triton:gather", "k=136")),
    ):
        yield replace(base, shape=shape, options=(*options, *FULL))
    # PyTorch's convolution and our epilogue, which may have to change the memory format
    for layout, options in itertools.product(("nhwc", "nchw"), (FULL, ())):
        yield replace(base, layout=layout, options=("cudnn", "3x3", "pad=1", *options))


# steps that boxes of pixels take, and others
_OF_BOXES = (
    ("1x1",),
    ("3x3", "pad=1"),
    ("3x3", "pad=1", "stride=2"),
    ("3x2", "pad=2", "dilation=2"),
    ("1x1", "stride=2"),
    ("1x1", "pad=1"),
    ("2x2", "stride=2"),
)
_OF_POINTERS = (("1x5", "pad=2", "stride=3"), ("3x3", "stride=2"), ("2x1", "pad=1", "stride=2"))


def _compiles(base: Case) -> Iterator[Case]:
    yield replace(base, options=("k=40", "3x3", "pad=1", *FULL))
    yield replace(base, act="none", options=("triton:gather", "1x1", "stride=2"))
    yield replace(base, options=("cudnn", "3x3", "pad=1", *PLAIN))


def _traffic(base: Case) -> Iterator[Case]:
    bf16 = replace(base, dtype=torch.bfloat16)
    for options in (("3x3", "pad=1"), ("stride=2",), ("2x2", "stride=2"), ("3x3", "stride=2")):
        for rest in (FULL, PLAIN):
            yield replace(bf16, options=("k=40", *options, *rest))


# (channels, pixels across), options: the distinct convolutions of real models at 224x224
RESNET50 = (
    ((64, 56), ("k=64", "bias")),
    ((64, 56), ("k=64", "3x3", "pad=1", "bias")),
    ((64, 56), ("k=256", "bias", "residual")),
    ((256, 56), ("k=64", "bias")),
    ((128, 56), ("k=128", "3x3", "stride=2", "pad=1", "bias")),
    ((256, 56), ("k=512", "stride=2", "bias")),
    ((128, 28), ("k=128", "3x3", "pad=1", "bias")),
    ((128, 28), ("k=512", "bias", "residual")),
    ((512, 28), ("k=128", "bias")),
    ((256, 14), ("k=256", "3x3", "pad=1", "bias")),
    ((256, 14), ("k=1024", "bias", "residual")),
    ((1024, 14), ("k=256", "bias")),
    ((512, 7), ("k=512", "3x3", "pad=1", "bias")),
    ((512, 7), ("k=2048", "bias", "residual")),
    ((2048, 7), ("k=512", "bias")),
)
RESNEXT50 = tuple(
    ((C, HW), ("groups=32", "3x3", "pad=1", "bias"))
    for C, HW in ((128, 56), (256, 28), (512, 14), (1024, 7))
)
# RegNetY-1.6GF, 4GF and 16GF: widths of groups 24, 64 and 112
REGNETY = tuple(
    ((C, HW), (f"groups={C // width}", "3x3", "pad=1", "bias"))
    for C, HW, width in (
        (120, 28, 24),
        (336, 14, 24),
        (128, 56, 64),
        (512, 14, 64),
        (448, 28, 112),
        (1232, 14, 112),
    )
)
CONVNEXT = (
    ((3, 224), ("k=96", "4x4", "stride=4", "bias")),
    ((96, 56), ("k=192", "2x2", "stride=2", "bias")),
    ((384, 14), ("k=768", "2x2", "stride=2", "bias")),
)


def _real(base: Case) -> Iterator[Case]:
    for (C, HW), options in (*RESNET50, *RESNEXT50, *REGNETY, *CONVNEXT):
        act = "none" if (C, HW) in dict(CONVNEXT) else "relu"
        shape: Shape = (256, C, HW, HW)
        yield replace(base, shape=shape, dtype=torch.bfloat16, act=act, options=options)


def _benched(base: Case) -> Iterator[Case]:
    yield from _real(base)
    (C, HW), options = RESNET50[1]
    first_as_given = replace(base, shape=(256, C, HW, HW), dtype=torch.bfloat16, layout="nchw")
    yield replace(first_as_given, options=options)


def _gate(base: Case) -> Iterator[Case]:
    yield from _real(base)


def _variants(case: Case) -> Iterator[Case]:
    """Yield the case with every configuration that the assumed device may be tuned to."""
    for candidate in configurations(*arguments(case, case.inputs("meta"))):
        yield replace(case, options=(candidate, *case.options))


SUBJECT = Subject(draw, _run, _declare, (), terms=terms, variants=_variants)
