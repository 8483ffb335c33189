"""Batch norms that keep their statistics, weight and bias while everything else trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._replace import replace_modules, share_hooks
from .norm_act import BatchNormAct2d, FrozenBatchNorm2d, FrozenBatchNormAct2d

_VECTORS = ("weight", "bias", "running_mean", "running_var")


def freeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    """Replace every 2d batch norm inside `module` by a frozen one; return the result.

    `torch.nn.BatchNorm2d` and `SyncBatchNorm` become `FrozenBatchNorm2d`; those that end in an
    activation, this library's and timm's, become `FrozenBatchNormAct2d` with that activation. Keys
    are those from before without `num_batches_tracked`, values are copied, hooks stay. What a norm
    was is remembered, also by a copy of the model, and `unfreeze_batch_norm_2d` brings it back.

    Args:
        module: any model, changed in place; or a norm, in whose place the returned one belongs.

    Raises:
        ValueError: a norm was built with `track_running_stats=False`, and has no statistics to
            keep. Nothing is changed then.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    >>> list(freeze_batch_norm_2d(model).state_dict())[2:]
    ['1.weight', '1.bias', '1.running_mean', '1.running_var']
    """
    for name, norm in module.named_modules():
        if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) and norm.running_mean is None:
            raise ValueError(
                f"a batch norm is frozen at its running statistics, and {name or 'this one'!r} has "
                "none; build it with track_running_stats=True"
            )
    return replace_modules(module, _frozen)


def unfreeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    """Undo `freeze_batch_norm_2d`; return the result.

    Each norm comes back as the object it was, of its class and with its momentum, its counter, its
    hooks and the `requires_grad` of its weight and bias. Its values, dtype and device are those of
    the frozen one, and so is whether it trains; its parameters are the same objects unless dtype or
    device changed meanwhile. A frozen norm that was built as such becomes a `BatchNormAct2d` or a
    `torch.nn.BatchNorm2d` of the default momentum.

    Args:
        module: any model, changed in place; or a norm, in whose place the returned one belongs.

    >>> norm = nn.BatchNorm2d(8, momentum=0.03)
    >>> unfreeze_batch_norm_2d(freeze_batch_norm_2d(norm)) is norm
    True
    """
    return replace_modules(module, _unfrozen)


def _frozen(norm: nn.Module) -> FrozenBatchNorm2d | None:
    if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return None
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    if isinstance(drop, nn.Module) and isinstance(act, nn.Module):
        frozen = FrozenBatchNormAct2d(norm.num_features, norm.eps, device="meta")
        frozen.drop, frozen.act = drop, act
    else:
        frozen = FrozenBatchNorm2d(norm.num_features, norm.eps, device="meta")
    for name in _VECTORS:  # None where the norm has no weight and bias
        value: Tensor | None = getattr(norm, name)
        setattr(frozen, name, None if value is None else value.detach().clone())
    vars(frozen)["_source"] = norm  # and no submodule: it has no keys and does not run
    share_hooks(frozen, norm)
    return frozen.train(norm.training)


@torch.no_grad()
def _unfrozen(frozen: nn.Module) -> nn.Module | None:
    if not isinstance(frozen, FrozenBatchNorm2d):
        return None
    norm: Any = vars(frozen).pop("_source", None) or _learning(frozen)
    for name in _VECTORS:
        value: Tensor | None = getattr(frozen, name)
        if value is not None:
            _put(norm, name, value)
    counter: Tensor = norm.num_batches_tracked
    device = frozen.running_mean.device
    norm.num_batches_tracked = (
        torch.zeros_like(counter, device=device) if counter.is_meta else counter.to(device)
    )
    if isinstance(frozen, FrozenBatchNormAct2d):
        norm.drop, norm.act = frozen.drop, frozen.act
    share_hooks(norm, frozen)
    return norm.train(frozen.training)


def _learning(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    """Build the norm that a frozen one without a past stands for."""
    layer = BatchNormAct2d if isinstance(frozen, FrozenBatchNormAct2d) else nn.BatchNorm2d
    like = frozen.running_mean
    return layer(frozen.num_features, frozen.eps, device=like.device, dtype=like.dtype)


def _put(norm: nn.Module, name: str, value: Tensor) -> None:
    """Write a parameter or buffer, into the tensor that is there if that can hold it."""
    present: Tensor = getattr(norm, name)
    if (present.device, present.dtype) == (value.device, value.dtype):
        present.copy_(value)
    elif isinstance(present, nn.Parameter):
        setattr(norm, name, nn.Parameter(value.clone(), present.requires_grad))
    else:
        setattr(norm, name, value.clone())
