"""What is timed: a module called on its inputs, forward or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..oracle import Answers
from ..workload import is_half


class Batch(NamedTuple):
    """What goes into a call, and what comes back for the backward pass: the gradient of y."""

    x: Tensor
    dy: Tensor

    def to(self, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Batch:
        """Return a copy of it there, in that type and memory format."""
        return Batch(*(_laid_out(t.to(device, dtype, copy=True), channels_last) for t in self))


def _laid_out(t: Tensor, channels_last: bool) -> Tensor:
    return t.contiguous(memory_format=_layout(channels_last and t.dim() == 4))


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def place(
    module: nn.Module, device: torch.device, dtype: torch.dtype, channels_last: bool, training: bool
) -> nn.Module:
    """Move a module to where it runs, into its mode, memory format and the type of its weights."""
    placed: Any = module.train(training).to(device)
    if not (training and is_half(dtype)):  # which is autocast's, with weights in fp32
        placed = placed.to(dtype)
    return placed.to(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


class Gradient(NamedTuple):
    """What a parameter's gradient is called among the answers, and the shape it has there."""

    name: str
    shape: Sequence[int]


@dataclass
class Inference:
    """Forward calls of a module, or of what torch.compile made of it, on batches in turn."""

    module: nn.Module
    run: Callable[[Tensor], Tensor]
    batches: Sequence[Batch]

    def __call__(self, i: int) -> Answers:
        """Return y."""
        self._begin()
        with torch.no_grad():
            return {"y": self.run(self.batches[i % len(self.batches)].x)}

    def _begin(self) -> None:
        if self.run is not self.module:  # it imports the compiler, which eager calls do without
            torch.compiler.cudagraph_mark_step_begin()  # the last answer is done with


@dataclass
class Training(Inference):
    """Forward and backward; half precision is autocast's, with weights in fp32.

    Attributes:
        gradients: of the parameters, in their order.
        wants_dx: whether the input gets a gradient too, as of a block.
    """

    gradients: Sequence[Gradient]
    wants_dx: bool

    def __call__(self, i: int) -> Answers:
        """Return y and the gradients."""
        batch = self.batches[i % len(self.batches)]
        self.module.zero_grad(set_to_none=True)
        batch.x.grad = None
        y = self.forward(i)
        y.backward(batch.dy.to(y.dtype))
        answers = {"y": y.detach()}
        if batch.x.grad is not None:
            answers["dx"] = batch.x.grad
        for (name, shape), parameter in zip(self.gradients, self.module.parameters(), strict=True):
            if parameter.grad is not None:
                answers[name] = parameter.grad.reshape(list(shape))
        return answers

    def forward(self, i: int) -> Tensor:
        """Return y, with its graph."""
        self._begin()
        x = self.batches[i % len(self.batches)].x.requires_grad_(self.wants_dx)
        with torch.autocast(x.device.type, x.dtype, enabled=is_half(x.dtype)):
            return self.run(x)

    @property
    def given(self) -> list[Tensor]:
        """What is there before the forward pass."""
        inputs = [batch.x for batch in self.batches]
        return [*self.module.parameters(), *self.module.buffers(), *inputs]
