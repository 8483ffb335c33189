"""Modules in sequence, of which only the inputs are kept for the backward pass, if one asks."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import backend, current_backend


class CheckpointSequential(nn.Sequential):
    """`torch.nn.Sequential` that can trade computation for memory, module by module.

    With `grad_checkpointing` set, a module keeps its input alone and computes the rest again in the
    backward pass, by `torch.utils.checkpoint`. Random numbers are those of the first time, and so
    is the backend. Buffers, such as the running statistics of a batch norm and their counter,
    change the first time only: the second runs on copies.

    >>> blocks = CheckpointSequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    >>> blocks.grad_checkpointing = True
    >>> blocks(torch.randn(2, 3, 4, 4)).sum().backward()
    >>> blocks[1].num_batches_tracked
    tensor(1)
    """

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        keeps_inputs = self.grad_checkpointing and torch.is_grad_enabled()
        for module in self:
            x = _checkpoint(module, x) if keeps_inputs else module(x)
        return x


def _checkpoint(module: nn.Module, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # buffers change at the end of the compiled function, once
        return checkpoint(module, x, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _second_time(module, current_backend())

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _second_time(module: nn.Module, name: Any) -> Generator[None]:
    """Run on a backend, and on copies of the buffers."""
    owners = [(owner, dict(owner.named_buffers(recurse=False))) for owner in module.modules()]
    for owner, buffers in owners:
        for key, buffer in buffers.items():
            setattr(owner, key, buffer.clone())
    try:
        with backend(name):
            yield
    finally:
        for owner, buffers in owners:
            for key, buffer in buffers.items():
                setattr(owner, key, buffer)
