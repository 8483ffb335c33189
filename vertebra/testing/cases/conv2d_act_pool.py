"""The cases of `conv2d_act_pool`: those of `conv2d_act`, image by image.

Options: those of `conv2d_act`, and "gate", "pools", "sums" (it pools, and y is not asked for). The
answer "y" is then the mean; beside a y it is "mean". In x's type: a gate's rounding may be the same
for all pixels of an image, and does not average out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels._act import ACTIVATIONS
from ...kernels.conv2d_act_pool import configurations, op
from . import conv2d_act
from ._case import Case, Draw, Inputs, Shape, Subject, tagged

FULL, PLAIN = ("scale", "bias", "residual"), ("bias",)
BOTH = ("gate", "pools")


def _draw(case: Case, draw: Draw) -> Inputs:
    gate = None
    if "gate" in case.options:
        gate = draw.uniform(*case.shape[:2]).to(
            torch.float64 if case.dtype == torch.float64 else torch.float32
        )
    return {**conv2d_act.draw(case, draw), "gate": gate}


def _arguments(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    of_conv = {name: t for name, t in inputs.items() if name != "gate"}
    writes, pools = "sums" not in case.options, bool({"sums", "pools"} & {*case.options})
    return (*conv2d_act.arguments(case, of_conv), inputs["gate"], writes, pools)


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x = inputs["x"]
    assert x is not None
    y, shares = op(*_arguments(case, inputs))
    if not shares.numel():
        return {"y": y}
    mean = shares.sum(1).to(x.dtype)
    return {"y": mean} if "sums" in case.options else {"y": y, "mean": mean}


def _declare() -> Iterator[Case]:
    options = ("k=40", *FULL, *BOTH)
    base = Case("conv2d_act_pool", (3, 24, 7, 9), layout="nhwc", act="relu", options=options)
    yield from tagged("test", _tests(base))
    yield from tagged("compile", _compiles(base))
    yield from tagged("aot", _real(base))
    yield from tagged("aot", _odd(base))
    yield from tagged("traffic", _traffic(base))
    yield from tagged("bench", _real(base))
    (C, HW), options = HEADS[0]
    first_as_given = replace(base, shape=(256, C, HW, HW), dtype=torch.bfloat16, layout="nchw")
    yield from tagged("bench", iter([replace(first_as_given, options=options)]))


def _tests(base: Case) -> Iterator[Case]:
    yield base
    wide = (torch.float32, torch.float16)
    # images that are no tiles: smaller, larger, batch 1, one pixel; more than a tile of channels
    for (shape, options), dtype, kernel, ends in itertools.product(
        (
            ((3, 48, 7, 7), ("k=40",)),
            ((1, 48, 14, 14), ("k=72",)),
            ((5, 48, 1, 1), ("k=8",)),
            ((2, 160, 9, 11), ("k=136",)),
        ),
        wide,
        ("tiles", "gather"),
        (BOTH, ("sums",)),
    ):
        if (dtype == torch.float16) == (ends == BOTH):
            mine = (f"triton:{kernel}", *options, *FULL, *ends)
            yield replace(base, shape=shape, dtype=dtype, options=mine)
    # windows, steps, a gate under padding; boxes of rows and columns
    for options, kernel in itertools.product(
        (("3x3", "pad=1"), ("3x3", "pad=1", "stride=2"), ("1x1", "stride=2")), ("tiles", "gather")
    ):
        gate = () if kernel == "tiles" and "3x3" in options and "stride=2" in options else ("gate",)
        mine = (f"triton:{kernel}", "k=40", *options, *FULL, *gate, "pools")
        yield replace(base, shape=(3, 32, 14, 14), options=mine)
    yield replace(base, options=("triton:gather", "k=40", "2x2", "stride=2", *FULL, *BOTH))
    # groups: bundles, a ragged last bundle, one group that fills a tile
    for shape, options in (
        ((2, 32, 6, 5), ("groups=4", "pad=1")),
        ((1, 40, 9, 8), ("groups=10", "stride=2", "pad=1")),
        ((3, 48, 5, 4), ("groups=2", "k=80", "pad=1")),
    ):
        yield replace(base, shape=shape, options=("3x3", *options, *FULL, *BOTH))
    # layouts, activations, what is left out
    for layout in ("sliced_nhwc", "mixed"):
        yield replace(base, layout=layout)
    for act, kernel in zip(ACTIVATIONS, itertools.cycle(("tiles", "gather"))):
        yield replace(base, act=act, options=(f"triton:{kernel}", "k=40", *FULL, *BOTH))
    for ends, kernel in itertools.product((("gate",), ("pools",)), ("tiles", "gather")):
        yield replace(base, options=(f"triton:{kernel}", *PLAIN, *ends))
    yield replace(base, options=("k=40", "ieee", *FULL, *BOTH))


def _compiles(base: Case) -> Iterator[Case]:
    yield replace(base, options=("triton:gather", *base.options))
    yield replace(base, act="none", options=("triton:gather", "3x3", "pad=1", "sums"))


def _traffic(base: Case) -> Iterator[Case]:
    bf16 = replace(base, dtype=torch.bfloat16)
    for ends in (("gate",), ("pools",), BOTH, ("sums",)):
        yield replace(bf16, options=("k=40", "3x3", "pad=1", *FULL, *ends))


# (channels, pixels across), group width: RegNetY-1.6GF's and 4GF's 3x3s before an excitation
REGNETY = (
    ((120, 28), 24),
    ((336, 14), 24),
    ((128, 56), 64),
    ((192, 28), 64),
    ((512, 14), 64),
    ((1088, 7), 64),
)
# ResNet-50's last convolution, ResNet-18's, RegNetY-4GF's
HEADS = (
    ((512, 7), ("k=2048", "bias", "residual", "sums")),
    ((512, 7), ("3x3", "pad=1", "bias", "residual", "sums")),
    ((1088, 7), ("bias", "residual", "gate", "sums")),
)


def _real(base: Case) -> Iterator[Case]:
    for (C, HW), options in HEADS:
        shape: Shape = (256, C, HW, HW)
        yield replace(base, shape=shape, dtype=torch.bfloat16, options=options)
    for (C, HW), width in REGNETY:
        of_3x3 = replace(base, shape=(256, C, HW, HW), dtype=torch.bfloat16)
        yield replace(of_3x3, options=(f"groups={C // width}", "3x3", "pad=1", "bias", "pools"))
        yield replace(of_3x3, options=("bias", "residual", "gate"))


def _odd(base: Case) -> Iterator[Case]:
    """Yield what the models have not: other types, few images, both kernels where one is chosen."""
    gated = replace(base, shape=(256, 512, 14, 14), options=("bias", "residual", "gate", "pools"))
    for dtype in (torch.float16, torch.float32):
        yield replace(gated, dtype=dtype)
    yield replace(gated, dtype=torch.bfloat16, options=("triton:gather", *gated.options))
    yield replace(gated, dtype=torch.float32, options=("ieee", *gated.options))
    yield replace(gated, shape=(1, 512, 14, 14), dtype=torch.bfloat16)
    yield replace(gated, act="silu", dtype=torch.bfloat16)


def _variants(case: Case) -> Iterator[Case]:
    """Yield the case with every configuration that the assumed device may be tuned to."""
    for candidate in configurations(*_arguments(case, case.inputs("meta"))):
        yield replace(case, options=(candidate, *case.options))


def _terms(case: Case, name: str, value: Tensor) -> int:
    """Return how many products, and pixels of a mean, a sum of fp32 has."""
    _, _, H, W = case.shape
    return conv2d_act.terms(case, name, value) * (1 if value.dim() == 4 else H * W)


SUBJECT = Subject(_draw, _run, _declare, (), terms=_terms, variants=_variants)
