"""The cases of `batch_norm_act_pool`.

The option "eval" has stored statistics normalise; "bias" is `bias_act_pool`, and nothing does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import batch_norm_act_pool
from ...kernels._act import ACTIVATIONS
from ...kernels.batch_norm_act_pool import bias_act_pool
from ._case import (
    DTYPES,
    LAYOUTS,
    ODD_SHAPES,
    Case,
    Draw,
    Inputs,
    Layout,
    Shape,
    Subject,
    tagged,
)

_TRAINING, _EVAL = ("affine", "stats"), ("affine", "stats", "eval")
_KINKS = {"relu": (0.0,), "hardswish": (-3.0, 3.0)}
# images that one window covers, and one long enough for programs that walk down several rows
_SHAPES: tuple[Shape, ...] = (*ODD_SHAPES, (3, 2, 2, 2), (2, 5, 3, 1), (1, 3, 70, 5))
_STEMS: tuple[Shape, ...] = (
    (256, 64, 112, 112),
    (1, 64, 112, 112),
    (256, 32, 112, 112),
)


def _pooled(shape: Shape) -> Shape:
    N, C, H, W = shape
    return N, C, (H + 1) // 2, (W + 1) // 2


def _draw(case: Case, draw: Draw) -> Inputs:
    C = case.shape[1]
    affine, stats = "affine" in case.options, "stats" in case.options
    dy = draw.normal(*_pooled(case.shape))
    # slopes of both signs: a falling one turns the largest x into the smallest z
    return {
        "x": draw.x(),
        "weight": (draw.normal(C) + draw.normal(C).sign()).float() if affine else None,
        "bias": draw.normal(C).float() if affine or "bias" in case.options else None,
        "mean": draw.normal(C).float() if stats else None,
        "var": (0.5 + draw.normal(C).abs()).float() if stats else None,
        "dy": draw.map(dy, "nchw" if case.layout == "mixed" else None),
    }


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x, weight, bias, mean, var, _ = inputs.values()
    assert x is not None
    if "bias" in case.options:
        return {"y": bias_act_pool(x, bias, case.act)}
    training = "eval" not in case.options
    y = batch_norm_act_pool(
        *(x, weight, bias, case.act),
        running_mean=mean,
        running_var=var,
        training=training,
        momentum=0.3,
    )
    if mean is None or var is None or not training:
        return {"y": y}
    return {"y": y, "running_mean": mean, "running_var": var}


def _terms(case: Case, name: str, value: Tensor) -> int:
    """Count what is added up: dweight and dbias are of a quarter of the map."""
    if value.dim() == 4:
        return 1
    N, _, H, W = case.shape if name.startswith("running") else _pooled(case.shape)
    return N * H * W


def _settle(case: Case, inputs: Inputs) -> Tensor:
    """Return dy with zeros where rounding decides which pixel is the maximum, or its slope.

    A window is left out if another x than the maximum's comes within a rounding of the case's type
    of the maximum, or if z there is at a kink. Equal x are no such case: the first of them wins.
    """
    x, weight, bias, mean, var, dy = (v if v is None else v.double() for v in inputs.values())
    assert x is not None
    assert dy is not None
    training = "eval" not in case.options
    if training:
        mean = var = None
    if "bias" in case.options:
        assert bias is not None
        z = x + bias[:, None, None]
    else:
        z = F.batch_norm(x, mean, var, weight, bias, training)
    value = ACTIVATIONS[case.act](z.clone())

    def windows(t: Tensor) -> Tensor:
        t = F.pad(t, (1, 1, 1, 1), value=-torch.inf)
        return t.unfold(2, 3, 2).unfold(3, 3, 2).flatten(4)

    top, place = windows(value).max(-1, keepdim=True)
    winner = windows(x).gather(-1, place)
    others = windows(value).masked_fill(windows(x) == winner, -torch.inf).amax(-1, keepdim=True)
    unsure = top - others < torch.finfo(case.dtype).eps * top.abs() + 1e-5 * value.abs().max()
    for kink in _KINKS.get(case.act, ()):
        unsure |= (windows(z).gather(-1, place) - kink).abs() < 1e-5 * z.abs().max()
    original = inputs["dy"]
    assert original is not None
    return torch.where(unsure[..., 0], 0, original)


def _declare() -> Iterator[Case]:
    base = Case("batch_norm_act_pool", (2, 12, 5, 6), act="relu", options=_TRAINING)
    yield from tagged("test", _tests(base))
    for layout, options in itertools.product(("nchw", "nhwc"), (_TRAINING, _EVAL, ())):
        thorough = {"thorough"} if layout == "nhwc" and options != _TRAINING else set[str]()
        compiled = replace(base, layout=layout, options=options, tags=base.tags | thorough)
        yield from tagged("compile", iter([compiled]))
    for layout, act in itertools.product(("nchw", "nhwc"), ("none", "silu")):
        double = replace(base, shape=(2, 2, 3, 2), dtype=torch.float64, layout=layout, act=act)
        yield from tagged("double", iter([double]))
    yield from tagged("aot", _gate(base))
    for act, options, frozen, layout in itertools.product(
        ("relu", "none", "silu"), (_TRAINING, _EVAL), ((), ("frozen",)), ("nchw", "nhwc")
    ):
        case = replace(base, shape=(2, 8, 5, 6), dtype=torch.bfloat16, act=act, layout=layout)
        yield from tagged("traffic", iter([replace(case, options=(*options, *frozen))]))
    yield from tagged("traffic", iter([replace(base, shape=(2, 8, 5, 7))]))
    layouts: tuple[Layout, ...] = ("nhwc", "nchw")
    for shape, layout, options in itertools.product(_STEMS, layouts, (_TRAINING, _EVAL)):
        stem = replace(base, shape=shape, dtype=torch.bfloat16, layout=layout, options=options)
        yield from tagged("bench", iter([stem]))


def _tests(base: Case) -> Iterator[Case]:
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        yield replace(base, dtype=dtype, layout=layout)
    for act in ACTIVATIONS:
        yield replace(base, act=act, options=_EVAL)
        yield replace(base, act=act, layout="nhwc", shape=(2, 12, 6, 5))
    for options in ((), ("affine",), ("stats",), ("stats", "eval"), (*_EVAL, "frozen"), ("bias",)):
        yield replace(base, layout="nhwc", options=options)
    layouts: tuple[Layout, ...] = ("nchw", "nhwc", "sliced")
    for i, shape in enumerate(_SHAPES):
        for j, layout in enumerate(layouts):
            # programs that own a row each are many, and the interpreter runs them one by one
            tags = base.tags | ({"thorough"} if i % 3 != j or shape[0] == 70 else set())
            yield replace(base, shape=shape, layout=layout, tags=tags)


def _gate(base: Case) -> Iterator[Case]:
    """Yield real models' maps, every option once, then what is odd."""
    stem = replace(base, shape=_STEMS[0], dtype=torch.bfloat16)
    for layout, options in itertools.product(("nhwc", "nchw"), (_TRAINING, _EVAL)):
        yield replace(stem, layout=layout, options=options)
    nhwc = replace(stem, layout="nhwc")
    yield replace(nhwc, shape=_STEMS[1])
    yield replace(nhwc, shape=_STEMS[2])
    yield replace(nhwc, options=())
    yield replace(nhwc, act="none", options=_EVAL)
    yield replace(nhwc, options=("bias",))
    yield replace(nhwc, act="silu")
    yield replace(nhwc, act="gelu")
    yield replace(nhwc, dtype=torch.float16)
    yield replace(nhwc, dtype=torch.float32)
    yield replace(stem, dtype=torch.float32)
    yield replace(nhwc, dtype=torch.float64, options=())
    yield replace(nhwc, shape=(32, 24, 96, 96))  # 8 divides C, 16 does not
    yield replace(stem, shape=(8, 64, 28, 28))  # 2 divides a row of y
    for layout in ("nhwc", "nchw", "sliced"):
        yield replace(stem, shape=(3, 17, 7, 7), layout=layout)


SUBJECT = Subject(
    _draw,
    _run,
    _declare,
    ("x", "weight", "bias"),
    ("weight", "bias"),
    updated=("mean", "var"),
    terms=_terms,
    settle=_settle,
)
