"""The cases of `drop_path_add`: the noise is an input, so that every run drops the same samples.

Options: "gamma", "residual"; one of "drop" (every second sample), "rare" (one in ten) and "all";
"unscaled" leaves what is kept as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels import drop_path_add
from ._case import DTYPES, LAYOUTS, Case, Draw, Inputs, Layout, Subject, of_odd_shapes, tagged

FULL, PLAIN = ("residual", "gamma", "drop"), ("residual", "drop")
_RATES = {"drop": 0.5, "rare": 0.1, "all": 1.0}
_CONVNEXT_T, _CONVNEXT_B = (96, 192, 384, 768), (128, 256, 512, 1024)
CONVNEXT = tuple(
    (256, C, HW, HW)
    for widths in (_CONVNEXT_T, _CONVNEXT_B)
    for C, HW in zip(widths, (56, 28, 14, 7), strict=True)
)
RESNET50 = ((256, 256, 56, 56), (256, 1024, 14, 14))


def _draw(case: Case, draw: Draw) -> Inputs:
    N, C = case.shape[:2]
    has = case.options.__contains__
    return {
        "x": draw.x(),
        "residual": draw.residual() if has("residual") else None,
        "gamma": (draw.normal(C) + 1.5).float() if has("gamma") else None,
        # one number out of each N-th of [0, 1), so that few samples are dropped like many
        "noise": ((draw.uniform(N).argsort() + draw.uniform(N)) / N).float(),
        "dy": draw.map(draw.normal(*case.shape)),
    }


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x, residual, gamma, noise, _ = inputs.values()
    assert x is not None
    assert noise is not None
    y = drop_path_add(
        *(x, residual, gamma),
        drop_prob=next((p for option, p in _RATES.items() if option in case.options), 0.0),
        scale_by_keep="unscaled" not in case.options,
        noise=noise.float(),  # which it is but where the truth is computed: the same samples there
    )
    return {"y": y}


def _declare() -> Iterator[Case]:
    base = Case("drop_path_add", (4, 12, 5, 6), options=FULL)
    yield from tagged("test", _tests(base))
    yield from tagged("compile", _compiles(base))
    double = replace(base, shape=(2, 3, 2, 2), dtype=torch.float64)
    yield from tagged("double", iter([double, replace(double, layout="nhwc", options=PLAIN)]))
    yield from tagged("aot", _gate(base))
    for layout, options in itertools.product(("nchw", "nhwc"), _options()):
        case = replace(base, shape=(2, 8, 5, 6), dtype=torch.bfloat16, layout=layout)
        yield from tagged("traffic", iter([replace(case, options=options)]))
        yield from tagged("traffic", iter([replace(case, options=(*options, "frozen"))]))
    yield from tagged("bench", _real(base))


def _options() -> Iterator[tuple[str, ...]]:
    """Yield every combination of what is optional."""
    for residual, gamma, drop in itertools.product(
        ((), ("residual",)),
        ((), ("gamma",)),
        ((), ("drop",), ("rare",), ("all",), ("drop", "unscaled")),
    ):
        yield (*residual, *gamma, *drop)


def _tests(base: Case) -> Iterator[Case]:
    for dtype, layout, options in itertools.product(DTYPES, LAYOUTS, (FULL, PLAIN)):
        yield replace(base, dtype=dtype, layout=layout, options=options)
    for layout, options in itertools.product(("nchw", "nhwc"), _options()):
        if options not in (FULL, PLAIN):
            yield replace(base, layout=layout, options=options)
    yield from of_odd_shapes(base, FULL, PLAIN)
    # a vector of pixels never crosses a sample's border, and a tile does
    for layout in ("nchw", "nhwc"):
        yield replace(base, shape=(5, 16, 4, 6), dtype=torch.float16, layout=layout)


def _compiles(base: Case) -> Iterator[Case]:
    for layout, options in itertools.product(
        ("nchw", "nhwc"), (FULL, PLAIN, ("gamma",), ("residual",), ())
    ):
        yield replace(base, layout=layout, options=options)


def _real(base: Case) -> Iterator[Case]:
    """Yield the ends of ConvNeXt's blocks, and of two ResNet-50 ones with stochastic depth."""
    layouts: tuple[Layout, ...] = ("nhwc", "nchw")
    real = replace(base, dtype=torch.bfloat16)
    for shape, layout in itertools.product(CONVNEXT, layouts):
        options = ("residual", "gamma", "rare")
        yield replace(real, shape=shape, layout=layout, options=options)
    for shape, layout in itertools.product(RESNET50, layouts):
        yield replace(real, shape=shape, layout=layout, options=("residual", "rare"))


def _gate(base: Case) -> Iterator[Case]:
    """Yield real models' maps, every option once, then what is odd."""
    real = list(_real(base))
    yield from (case for case in real if case.shape in (*CONVNEXT[:4], *RESNET50))
    for layout in ("nhwc", "nchw"):
        first = replace(real[0], layout=layout)
        yield replace(first, options=("residual", "gamma"))  # eval mode
        yield replace(first, options=("gamma",))
        yield replace(first, options=("rare",))
        yield replace(first, dtype=torch.float32)
        yield replace(first, shape=(3, 17, 7, 7))
    yield replace(real[0], dtype=torch.float64, options=("residual", "rare"))
    yield replace(real[0], shape=(1, 768, 7, 7))
    yield replace(real[0], shape=(3, 17, 7, 7), layout="sliced")


SUBJECT = Subject(
    _draw,
    _run,
    _declare,
    differentiable=("x", "residual", "gamma"),
    parameters=("gamma",),
)
