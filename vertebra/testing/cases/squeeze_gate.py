"""The cases of `squeeze_gate`: `shape` is that of the map, of whose means "x" has the shares.

`act` stands between the fcs. Options: "bias", "conv" (weights as 1x1 convolutions have them),
"half" (weights in fp16), "hard" (the hard sigmoid), "r=5" for 5 hidden channels (else C / 4). In
"nchw" the shares of a channel lie together. Of types there are two: fp64, and fp32 for all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels import squeeze_gate
from ...kernels._act import ACTIVATIONS
from ._case import Case, Draw, Inputs, Subject, tagged

FULL = ("bias", "conv")


def _draw(case: Case, draw: Draw) -> Inputs:
    N, C, H, W = case.shape
    given = [int(option[2:]) for option in case.options if option.startswith("r=")]
    R, T = given[0] if given else max(1, C // 4), -(-H * W // 64)
    end = (1, 1) if "conv" in case.options else ()
    sums = torch.float64 if case.dtype == torch.float64 else torch.float32
    dtype = torch.float16 if "half" in case.options else sums
    bias = "bias" in case.options
    x = (draw.normal(N, T, C) + 0.5).to(sums) / T
    return {
        "x": x if case.layout == "nhwc" else x.mT.contiguous().mT,
        "fc1_weight": (draw.normal(R, C, *end) / C**0.5).to(dtype),
        "fc1_bias": (draw.normal(R) + 0.5).to(dtype) if bias else None,
        "fc2_weight": (draw.normal(C, R, *end) * 1.5 / R**0.5).to(dtype),
        "fc2_bias": draw.normal(C).to(dtype) if bias else None,
    }


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs.values()
    assert x is not None
    assert fc1_weight is not None
    assert fc2_weight is not None
    gate = "hard_sigmoid" if "hard" in case.options else "sigmoid"
    fcs = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return {"y": squeeze_gate(x, *fcs, case.act, gate)}


def _terms(case: Case, name: str, value: Tensor) -> int:
    """Return how many products the longest sum of an answer has."""
    return case.shape[1]


def _declare() -> Iterator[Case]:
    base = Case("squeeze_gate", (3, 24, 14, 14), layout="nhwc", act="relu", options=FULL)
    yield from tagged("test", _tests(base))
    yield from tagged("compile", iter([replace(base, shape=(2, 24, 5, 6))]))
    yield from tagged("aot", _gate(base))
    for layout in ("nhwc", "nchw"):
        real = replace(base, shape=(256, 512, 14, 14), dtype=torch.bfloat16, layout=layout)
        yield from tagged("bench", iter([replace(real, options=("r=128", *FULL))]))


def _tests(base: Case) -> Iterator[Case]:
    yield base
    for act in ACTIVATIONS:
        yield replace(base, act=act)
    for options in ((), ("bias",), ("half", *FULL), ("hard", *FULL), ("r=1", *FULL), ("r=70",)):
        yield replace(base, options=options)
    # one image and pixel, more images than a program owns, many parts, odd channels
    for shape in ((1, 1, 1, 1), (9, 40, 7, 7), (2, 17, 56, 56), (1, 200, 7, 7)):
        yield replace(base, shape=shape)
    yield replace(base, dtype=torch.float64)
    yield replace(base, layout="nchw")


def _gate(base: Case) -> Iterator[Case]:
    """Yield RegNetY-4GF's at several sizes, batch 1, and other types."""
    for C, HW, R in ((128, 56, 32), (512, 14, 128), (1088, 7, 272)):
        yield replace(base, shape=(256, C, HW, HW), options=("half", f"r={R}", *FULL))
    yield replace(base, shape=(1, 512, 14, 14), options=("half", "r=128", *FULL))
    yield replace(base, shape=(256, 120, 28, 28), act="silu", options=("r=30", "hard"))
    yield replace(base, shape=(256, 512, 14, 14), dtype=torch.float64)


SUBJECT = Subject(_draw, _run, _declare, (), terms=_terms)
