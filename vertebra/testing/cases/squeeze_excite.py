"""The cases of `squeeze_excite`.

`act` is the activation of y. Options: "bias", "residual", "conv" (weights as 1x1 convolutions have
them), "half" (weights in x's dtype, as fp64 always has them), "hard" (the hard sigmoid as gate),
the name of an activation between the fcs (else relu), "r=5" for 5 hidden channels (else C / 4),
"shares" (the means come in parts of 64 pixels, and are others than x's; with "inference").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels import squeeze_excite
from ...kernels._act import ACTIVATIONS, GATES
from ._case import DTYPES, LAYOUTS, Case, Draw, Inputs, Layout, Subject, of_odd_shapes, tagged

PARAMETERS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
FULL, PLAIN = ("bias", "residual", "conv"), ("bias", "conv")
SHARES = ("shares", "inference")
_KINKS = {"relu": (0.0,), "hardswish": (-3.0, 3.0), "hard_sigmoid": (-3.0, 3.0)}
# torchvision's RegNetY-1.6GF, 4GF and 8GF: width, width of its fcs, pixels
REGNETY = tuple(
    ((256, C, HW, HW), R)
    for HW, *stages in (
        (56, (48, 12), (128, 32), (224, 56)),
        (28, (120, 30), (192, 48), (448, 112)),
        (14, (336, 84), (512, 128), (896, 224)),
        (7, (888, 222), (1088, 272), (2016, 504)),
    )
    for C, R in stages
)
STEM = ((1, 64, 112, 112), 16)


def _hidden(case: Case) -> int:
    given = [int(option[2:]) for option in case.options if option.startswith("r=")]
    return given[0] if given else max(1, case.shape[1] // 4)


def _functions(case: Case) -> tuple[str, str]:
    act = next((option for option in case.options if option in ACTIVATIONS), "relu")
    return act, "hard_sigmoid" if "hard" in case.options else "sigmoid"


def _draw(case: Case, draw: Draw) -> Inputs:
    C, R = case.shape[1], _hidden(case)
    bias = "bias" in case.options
    same = "half" in case.options or case.dtype == torch.float64
    sums = torch.promote_types(case.dtype, torch.float32)
    dtype = case.dtype if same else torch.float32
    end = (1, 1) if "conv" in case.options else ()
    T = -(-case.shape[2] * case.shape[3] // 64) if "shares" in case.options else 0
    # u and v of about unit size, so that no gate is saturated; dy off-centre, or the one sum of a
    # single channel may cancel down to its rounding
    return {
        "x": draw.x(),
        "fc1_weight": (draw.normal(R, C, *end) / C**0.5).to(dtype),
        "fc1_bias": (draw.normal(R) + 0.5).to(dtype) if bias else None,
        "fc2_weight": (draw.normal(C, R, *end) * 1.5 / R**0.5).to(dtype),
        "fc2_bias": draw.normal(C).to(dtype) if bias else None,
        "residual": draw.residual() if "residual" in case.options else None,
        "dy": draw.map(draw.normal(*case.shape) + 0.5),
        "shares": ((draw.normal(case.shape[0], T, C) + 0.5) / T).to(sums) if T else None,
    }


def _run(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, _, shares = inputs.values()
    assert x is not None
    assert fc1_weight is not None
    assert fc2_weight is not None
    fcs = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return {"y": squeeze_excite(x, *fcs, residual, *_functions(case), case.act, shares)}


def _settle(case: Case, inputs: Inputs) -> Tensor:
    """Return dy with zeros at pixels near a kink of out_act, and in images near one of the others.

    An inner activation at its kink decides about all gradients of its image.
    """
    act, gate = _functions(case)
    named = {name: None if t is None else t.double() for name, t in inputs.items()}
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, dy, _ = named.values()
    assert x is not None
    assert fc1_weight is not None
    assert fc2_weight is not None
    assert dy is not None
    u = x.mean((2, 3)) @ fc1_weight.flatten(1).T
    u = u if fc1_bias is None else u + fc1_bias
    v = ACTIVATIONS[act](u.clone()) @ fc2_weight.flatten(1).T
    v = v if fc2_bias is None else v + fc2_bias
    z = x * GATES[gate](v)[..., None, None]
    z = z if residual is None else z + residual
    whole = _near(u, act).any(1) | _near(v, gate).any(1)
    given = inputs["dy"]
    assert given is not None
    return torch.where(_near(z, case.act) | whole[:, None, None, None], 0, given)


def _near(z: Tensor, function: str) -> Tensor:
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in _KINKS.get(function, ()):
        near |= (z - kink).abs() < 1e-5 * z.abs().max()
    return near


def _terms(case: Case, name: str, value: Tensor) -> int:
    """Return how many values an answer adds up; the weights may have four dimensions, as maps."""
    N, _, H, W = case.shape
    return 1 if name in ("y", "dx", "dresidual") else N * H * W


def _declare() -> Iterator[Case]:
    base = Case("squeeze_excite", (2, 12, 5, 6), act="relu", options=FULL)
    yield from tagged("test", _tests(base))
    yield from tagged("compile", _compiles(base))
    for layout, options in itertools.product(
        ("nchw", "nhwc"), (("bias", "silu"), ("gelu", "residual"))
    ):
        double = replace(base, shape=(2, 2, 2, 2), dtype=torch.float64, layout=layout, act="silu")
        yield from tagged("double", iter([replace(double, options=(*options, "r=2"))]))
    yield from tagged("aot", _gate(base))
    for act, options, frozen in itertools.product(ACTIVATIONS, (FULL, PLAIN), ((), ("frozen",))):
        case = replace(base, shape=(2, 8, 5, 6), dtype=torch.bfloat16, act=act)
        yield from tagged("traffic", iter([replace(case, options=(*options, *frozen))]))
    yield from tagged("traffic", iter([replace(base, options=(*FULL, *SHARES))]))
    yield from tagged("bench", _real(base))


def _tests(base: Case) -> Iterator[Case]:
    # every dtype x layout, with and without a tail
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        yield replace(base, dtype=dtype, layout=layout)
        if layout != "mixed":
            yield replace(base, dtype=dtype, layout=layout, act="none", options=PLAIN)
    # every function in every place
    for act, options in itertools.product(ACTIVATIONS, (FULL, PLAIN)):
        yield replace(base, layout="nhwc", act=act, options=options)
    for act, hard in itertools.product(ACTIVATIONS, ((), ("hard",))):
        yield replace(base, act="none", options=(*PLAIN, act, *hard))
    # optional arguments left out, weights as linear layers hold them, or in x's dtype
    for options in ((), ("bias",), ("residual",), ("half", *FULL)):
        yield replace(base, dtype=torch.bfloat16, options=options)
    yield replace(base, options=(*FULL, "frozen"))
    # the interpreter takes seconds for 70 images, each of which is a program of several launches
    yield from (case for case in of_odd_shapes(base, FULL) if case.shape[0] < 70)
    # hidden channels: one, no power of two, more than the channels
    for R in (1, 5, 70):
        yield replace(base, options=(*FULL, f"r={R}"))
    wide = replace(base, shape=(1, 3712, 1, 2), layout="nhwc", options=(*FULL, "r=20"))
    yield replace(wide, tags=base.tags | {"thorough"})
    for layout in ("nchw", "nhwc"):
        # more images than a program owns, more splits than are added at once
        yield replace(base, shape=(9, 24, 7, 7), layout=layout)
        yield replace(base, shape=(1, 8, 60, 50), layout=layout)
    yield from _shared(base)


def _shared(base: Case) -> Iterator[Case]:
    """Yield cases whose means are given: every type, layout, one part and many, without a tail."""
    for dtype, layout in itertools.product((*DTYPES, torch.float64), ("nchw", "nhwc")):
        yield replace(base, dtype=dtype, layout=layout, options=(*FULL, *SHARES))
    shapes = ((3, 17, 7, 7), (9, 24, 7, 7), (2, 12, 19, 23))
    for shape, layout in itertools.product(shapes, LAYOUTS):
        yield replace(base, shape=shape, layout=layout, act="silu", options=(*FULL, *SHARES))
    yield replace(base, act="none", options=(*SHARES, "hard", "gelu"))


def _compiles(base: Case) -> Iterator[Case]:
    for layout, (act, options) in itertools.product(
        ("nchw", "nhwc"), (("none", FULL), ("relu", FULL), ("silu", PLAIN), ("none", PLAIN))
    ):
        yield replace(base, layout=layout, act=act, options=options)
    yield replace(base, options=(*FULL, *SHARES))


def _real(base: Case) -> Iterator[Case]:
    """Yield RegNetY's, which end in the gate, and an SE-ResNet's tail, which has the residual."""
    layouts: tuple[Layout, ...] = ("nhwc", "nchw")
    for (shape, R), layout in itertools.product((*REGNETY, STEM), layouts):
        options = (*PLAIN, f"r={R}")
        yield replace(
            base, shape=shape, dtype=torch.bfloat16, layout=layout, act="none", options=options
        )
    for (C, HW), layout in itertools.product(((256, 56), (1024, 14)), layouts):
        options = (*FULL, f"r={C // 16}")
        for means in ((), SHARES):
            real = replace(base, shape=(256, C, HW, HW), dtype=torch.bfloat16, layout=layout)
            yield replace(real, options=(*options, *means))


def _gate(base: Case) -> Iterator[Case]:
    """Yield real models' maps, every option once, then what is odd."""
    real = list(_real(base))
    yield from (case for case in real if case.shape[1] in (64, 192, 1088))
    first = real[0]
    yield replace(first, act="relu", options=(*FULL, "r=12"))
    yield replace(first, act="gelu", options=(*FULL, "r=12", "gelu"))
    yield replace(first, act="silu", options=("r=12", "silu", "hard"))
    yield replace(first, dtype=torch.float16, options=(*PLAIN, "r=12", "half"))
    yield replace(first, dtype=torch.float32, layout="nchw")
    yield replace(first, dtype=torch.float64, act="relu", options=("residual", "r=12"))
    yield replace(first, shape=(1, 512, 7, 7), options=(*PLAIN, "r=128"))
    for dtype in (torch.bfloat16, torch.float64):
        yield replace(first, dtype=dtype, act="relu", options=(*FULL, *SHARES, "r=12"))
    for layout in ("nhwc", "nchw", "sliced"):
        yield replace(first, shape=(3, 17, 7, 7), layout=layout, options=(*PLAIN, "r=5"))


SUBJECT = Subject(
    _draw,
    _run,
    _declare,
    ("x", *PARAMETERS, "residual"),
    PARAMETERS,
    terms=_terms,
    settle=_settle,
)
