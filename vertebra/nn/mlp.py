"""The MLP of a ConvNeXt block with the residual add behind it, in the layers of a fused model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._act import fusible_act, has_hooks
from ._drop import is_idle
from .fused import as_images, is_fused

# On CPUs the hidden map is made a few images at a time: it stays in the cache, and malloc does not
# ask the system for its pages each time. ConvNeXt-T at batch 8: 430 ms for 468 (Zen 5, two threads,
# 4 to 8 MB for each)
_MAX_HIDDEN_BYTES_PER_THREAD = 4 * 2**20


class MlpNames(NamedTuple):
    """Where a block has the MLP that it gives to `mlp_add`: its class's MLP."""

    fc1: str
    fc2: str
    gamma: str | None = None  # multiplies what leaves fc2
    refuses: Callable[[Any], str | None] = lambda block: None


def takes_add(branch: nn.Module, gamma: Tensor | None, drop: nn.Module | None) -> bool:
    """Return whether nothing is between the last layer of a branch and the add that ends a block.

    Ask whether `is_fused` holds for that layer first: a tracer notes that gamma was looked at.
    """
    return gamma is None and is_idle(drop) and not has_hooks(branch)


def mlp_add(
    x: Tensor,
    residual: Tensor,
    fc1: Any,
    act: nn.Module,
    between: Callable[[Tensor], Tensor] | None,
    fc2: nn.Module,
) -> Tensor:
    """Return `fc2(between(act(fc1(x)))) + residual` of every image, for a fused fc2."""
    count = _images_at_a_time(x, fc1)
    if count is not None:
        y = residual.clone()  # what a recording leaves out, of a map that nobody else reads
        for some, part in zip(x.split(count), y.split(count), strict=True):
            sums = mlp_add(some, part, fc1, act, between, fc2)
            # images have the strides that the layers see: a recording adds in place
            as_images(part, fc2).copy_(as_images(sums, fc2))
        return y
    name = fusible_act(act) if is_fused(fc1) else None
    # one name for all maps: one that has been read is freed
    x = act(fc1(x)) if name is None else fc1(x, None, name)
    x = x if between is None else between(x)
    return fc2(x, residual)


def _images_at_a_time(x: Tensor, fc1: Any) -> int | None:
    """Return how many images to take at a time, None for all of them."""
    if isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling() or not _is_for_cpu(x):
        return None
    hidden = fc1.weight.shape[0] * (x[:1].numel() // fc1.weight.shape[1]) * x.element_size()
    most = _MAX_HIDDEN_BYTES_PER_THREAD * torch.get_num_threads()
    parts = math.ceil(len(x) / max(1, most // max(1, hidden)))
    return None if parts <= 1 else math.ceil(len(x) / parts)


def _is_for_cpu(x: Tensor) -> bool:
    return x.is_cpu and not (torch.is_grad_enabled() and x.requires_grad)
