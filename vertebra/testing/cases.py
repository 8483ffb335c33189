"""Every op's cases, declared once: shapes, dtypes, layouts and options, with their random inputs.

Tags say who uses a case: "test" runs in the interpreter and on a GPU, "compile" also goes through
`torch.compile` and `opcheck`, "bench" is the size of a real model and needs a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import batch_norm_act, scale_bias_act
from ..kernels._act import ACTIVATIONS

Layout = Literal["nchw", "nhwc", "sliced", "sliced_nhwc", "mixed"]
Inputs = dict[str, Tensor | None]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call of one op.

    `layout` "sliced" takes x out of the middle of a larger tensor in C, H and W; "mixed" gives x
    and the residual different memory formats. `options` switch on the op's optional arguments.
    """

    op: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    layout: Layout = "nchw"
    act: str = "relu"
    options: tuple[str, ...] = ("affine", "stats", "residual")
    tags: frozenset[str] = frozenset({"test"})

    @property
    def id(self) -> str:
        """A readable name: what a test report shows."""
        dtype = str(self.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.shape))
        return "-".join([self.op, shape, dtype, self.layout, self.act, *self.options])

    def inputs(self, device: torch.device | str, seed: int = 0) -> Inputs:
        """Draw the arguments: random, off-centre, in the case's dtype; parameters in fp32."""
        device = torch.device(device)
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        C = self.shape[1]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

        residual = "nchw" if self.layout == "mixed" else self.layout
        inputs: Inputs = {
            # every channel its own mean and spread
            "x": self._map(normal(C, 1, 1) + normal(*self.shape) * (0.5 + normal(C, 1, 1).abs())),
            "weight": normal(C) + 1.5,
            "bias": normal(C),
            "residual": replace(self, layout=residual)._map(normal(*self.shape)),
            "mean": normal(C),
            "var": 0.5 + normal(C).abs(),
            "dy": self._map(normal(*self.shape)),
        }
        keep = {
            "weight": "affine" in self.options,
            "bias": "affine" in self.options,
            "residual": "residual" in self.options,
            "mean": "stats" in self.options,
            "var": "stats" in self.options,
        }
        for name, value in inputs.items():
            if value is not None and value.dim() == 1:
                inputs[name] = value.to(torch.float32)
            if not keep.get(name, True):
                inputs[name] = None
        return inputs

    def _map(self, values: Tensor) -> Tensor:
        values = values.to(self.dtype)
        if self.layout in ("nhwc", "mixed"):
            return values.contiguous(memory_format=torch.channels_last)
        if self.layout in ("sliced", "sliced_nhwc"):
            N, C, H, W = self.shape
            whole = values.new_full((N, C + 3, H + 2, W + 1), float("nan"))
            if self.layout == "sliced_nhwc":
                whole = whole.contiguous(memory_format=torch.channels_last)
            part = whole[:, 2:-1, 1:-1, 1:]
            return part.copy_(values)
        return values.contiguous()

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Call the op on `inputs`; return the output and whatever the call updated."""
        return _RUN[self.op](self, inputs)


def _run_scale_bias_act(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x, weight, bias, residual, mean, var = _arguments(inputs)
    return {"y": scale_bias_act(x, weight, bias, residual, case.act, mean=mean, var=var)}


def _run_batch_norm_act(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    x, weight, bias, residual, mean, var = _arguments(inputs)
    running = {"running_mean": mean, "running_var": var}
    y = batch_norm_act(x, weight, bias, residual, case.act, **running, momentum=0.3)
    return {"y": y} | {name: value for name, value in running.items() if value is not None}


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    return tuple(inputs[k] for k in ("x", "weight", "bias", "residual", "mean", "var"))


_RUN: dict[str, Callable[[Case, Inputs], dict[str, Tensor]]] = {
    "scale_bias_act": _run_scale_bias_act,
    "batch_norm_act": _run_batch_norm_act,
}
OPS = tuple(_RUN)

_SHAPES = (  # the mean ones; real models' are tagged bench
    (2, 64, 8, 8),
    (1, 1, 3, 5),
    (3, 17, 7, 7),
    (2, 96, 1, 1),
    (33, 3, 1, 1),
    (1, 8, 37, 29),
    (2, 160, 5, 3),
    (70, 2, 9, 7),
)
_RESNET50 = tuple(
    (C, HW)
    for HW, channels in (
        (112, (64,)),
        (56, (64, 256)),
        (28, (128, 512)),
        (14, (256, 1024)),
        (7, (512, 2048)),
    )
    for C in channels
)


def _declare() -> Iterator[Case]:
    everything = ("affine", "stats", "residual")
    for op in OPS:
        base = Case(op, (2, 12, 5, 6))
        # every dtype x layout x activation x residual on one small map
        for dtype, layout, act, options in itertools.product(
            DTYPES,
            ("nchw", "nhwc", "sliced", "sliced_nhwc", "mixed"),
            ACTIVATIONS,
            (everything, everything[:2]),
        ):
            if layout != "mixed" or "residual" in options:
                yield replace(base, dtype=dtype, layout=layout, act=act, options=options)
        # optional arguments left out
        for options in ((), ("affine",), ("stats",), ("residual",), ("affine", "residual")):
            for layout in ("nchw", "nhwc"):
                yield replace(base, layout=layout, options=options)
        # shapes
        for shape, layout, options in itertools.product(
            _SHAPES, ("nchw", "nhwc", "sliced"), (everything, everything[:2])
        ):
            yield replace(base, shape=shape, layout=layout, options=options)
        # through torch.compile, and opcheck
        for layout, act, options in itertools.product(
            ("nchw", "nhwc"), ("none", "relu", "silu"), (everything, everything[:2])
        ):
            tags = frozenset({"compile"})
            yield replace(base, layout=layout, act=act, options=options, tags=tags)
        # ResNet-50's maps
        for (C, HW), layout, options in itertools.product(
            _RESNET50, ("nhwc", "nchw"), (everything, everything[:2])
        ):
            shape = (256, C, HW, HW)
            tags = frozenset({"bench", "model:resnet50"})
            yield Case(op, shape, torch.bfloat16, layout, "relu", options, tags)


CASES: tuple[Case, ...] = tuple(_declare())


def cases(tag: str, op: str | None = None) -> list[Case]:
    """Return the cases with `tag`, of one op or of all."""
    return [c for c in CASES if tag in c.tags and op in (None, c.op)]
