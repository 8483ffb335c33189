"""A case: one call of one op with its random inputs, and what all cases of an op have in common."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["nchw", "nhwc", "sliced", "sliced_nhwc", "mixed"]
Shape = tuple[int, int, int, int]
Inputs = dict[str, Tensor | None]

LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc", "sliced", "sliced_nhwc", "mixed")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ODD_SHAPES: tuple[Shape, ...] = (
    (2, 64, 8, 8),
    (1, 1, 3, 5),
    (3, 17, 7, 7),
    (2, 96, 1, 1),
    (33, 3, 1, 1),
    (1, 8, 37, 29),
    (2, 160, 5, 3),
    (70, 2, 9, 7),
)


@dataclass(frozen=True)
class Case:
    """One call of one op.

    `layout` "sliced" takes the maps out of the middle of a larger tensor in C, H and W; "mixed"
    gives x and the residual different memory formats. `options` switch on what is optional; all ops
    know "frozen": parameters want no gradient, and "inference": nothing does. `tags` say who uses a
    case:

    * "test" runs in the interpreter and on a GPU;
    * "thorough", beside it: only `make test-all` and a GPU take the time;
    * "compile" goes through `torch.compile` and `opcheck`;
    * "double" through `gradcheck`, in fp64;
    * "aot" through the compile gate, on meta tensors, so of any size;
    * "traffic" has its bytes counted, on meta tensors;
    * "bench" is a size of a real model, and needs a GPU.
    """

    op: str
    shape: Shape
    dtype: torch.dtype = torch.float32
    layout: Layout = "nchw"
    act: str = "none"
    options: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        """A readable name: what a test report shows."""
        dtype = str(self.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.shape))
        act = () if self.act == "none" else (self.act,)
        return "-".join([self.op, shape, dtype, self.layout, *act, *self.options])

    @property
    def subject(self) -> Subject:
        """What the case shares with all cases of its op."""
        return SUBJECTS[self.op]

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the inputs that want a gradient."""
        if "inference" in self.options:
            return ()
        frozen = self.subject.parameters if "frozen" in self.options else ()
        return tuple(name for name in self.subject.differentiable if name not in frozen)

    def inputs(self, device: torch.device | str, seed: int = 0) -> Inputs:
        """Draw the arguments: random, off-centre, maps in the case's dtype, the rest in fp32."""
        return self.subject.draw(self, Draw(self, torch.device(device), seed))

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Call the op on `inputs`; return the output, as "y", and whatever the call updated."""
        return self.subject.run(self, inputs)


class Draw:
    """The source of a case's random inputs."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case, self.device = case, device
        self._generator = (
            None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        )

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers in fp64."""
        return torch.randn(
            shape, generator=self._generator, dtype=torch.float64, device=self.device
        )

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform numbers of [0, 1) in fp64."""
        return torch.rand(shape, generator=self._generator, dtype=torch.float64, device=self.device)

    def x(self) -> Tensor:
        """Return a map whose every channel has its own mean and spread."""
        C = self.case.shape[1]
        spread = 0.5 + self.normal(C, 1, 1).abs()
        return self.map(self.normal(C, 1, 1) + self.normal(*self.case.shape) * spread)

    def map(self, values: Tensor, layout: Layout | None = None) -> Tensor:
        """Return an (N, C, H, W) tensor of `values` in the case's dtype and layout."""
        layout = layout or self.case.layout
        values = values.to(self.case.dtype)
        if layout in ("nhwc", "mixed"):
            return values.contiguous(memory_format=torch.channels_last)
        if layout in ("sliced", "sliced_nhwc"):
            N, C, H, W = values.shape
            whole = values.new_full((N, C + 3, H + 2, W + 1), float("nan"))
            if layout == "sliced_nhwc":
                whole = whole.contiguous(memory_format=torch.channels_last)
            part = whole[:, 2:-1, 1:-1, 1:]
            return part.copy_(values)
        return values.contiguous()

    def residual(self) -> Tensor:
        """Return a second map like x, of another memory format where the layout is "mixed"."""
        mixed = self.case.layout == "mixed"
        return self.map(self.normal(*self.case.shape), "nchw" if mixed else None)


@dataclass(frozen=True)
class Subject:
    """An op under test.

    `draw` yields the inputs by name, "x" and "dy" (as y) among them, None where left out; "dy" only
    where the op has a backward pass, that is, something `differentiable`. `run` calls the op.
    `parameters` are the differentiable inputs that the option "frozen" freezes, `updated` the
    inputs a call may write. `terms(case, name, value)` is how many values an answer adds up, for
    the error budget. `settle` returns dy with zeros where the gradient is one of two values and
    which one is not part of the contract. `variants` are a case's, as told to run by each
    configuration that tuning would measure.
    """

    draw: Callable[[Case, Draw], Inputs]
    run: Callable[[Case, Inputs], dict[str, Tensor]]
    declare: Callable[[], Iterator[Case]]
    differentiable: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    terms: Callable[[Case, str, Tensor], int] = lambda case, name, value: (
        1 if value.dim() == 4 else case.shape[0] * case.shape[2] * case.shape[3]
    )
    settle: Callable[[Case, Inputs], Tensor] | None = None
    variants: Callable[[Case], Iterable[Case]] = lambda case: ()


SUBJECTS: dict[str, Subject] = {}


def of_odd_shapes(base: Case, *options: tuple[str, ...]) -> Iterator[Case]:
    """Yield `base` at the mean shapes, in the three kinds of layout, with each of `options`.

    Thorough are those that differ from a case before them in one way that other cases try too: the
    second and later options, slices of all shapes but one, and the most images, each of which is
    programs of its own, which the interpreter runs one by one.
    """
    layouts: tuple[Layout, ...] = ("nchw", "nhwc", "sliced")
    for shape, layout, some in itertools.product(ODD_SHAPES, layouts, options):
        sliced = layout == "sliced" and shape != (3, 17, 7, 7)
        thorough = sliced or some != options[0] or shape == ODD_SHAPES[-1]
        tags = base.tags | ({"thorough"} if thorough else set())
        yield replace(base, shape=shape, layout=layout, options=some, tags=tags)


def tagged(tag: str, found: Iterator[Case]) -> Iterator[Case]:
    """Yield the cases with `tag` added."""
    for case in found:
        yield replace(case, tags=case.tags | {tag})
