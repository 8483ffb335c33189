"""What `vertebra.fuse` saves around a convolution: the passes that squeeze, scale and pool maps.

Where kernels of ours run a convolution, its epilogue leaves the means of what it writes, and its
prologue multiplies what it reads (`vertebra.kernels.conv2d_act_pool`). Everywhere else, and where
somebody watches or traces what is in between, all runs as it does without this.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
import torch.fx
from torch import Tensor, nn

from ..kernels import squeeze_excite, squeeze_gate
from ..kernels._op import has_kernels
from ..kernels.batch_norm_act_pool import bias_act_pool
from ._act import fusible_act, fusible_gate, has_hooks
from .fused import Folded, FusedConv2d, epilogue, is_fused
from .global_avg_pool import GlobalAvgPool2d
from .norm_act import fuses_pool, pooled


class Unit(NamedTuple):
    """A convolution and what follows it: what a module's `unit()` returns."""

    conv: nn.Module
    norm: nn.Module
    act: nn.Module | None = None
    drop: nn.Module | None = None


class Excitation(NamedTuple):
    """The layers of a squeeze and excitation: what a module's `excitation()` returns."""

    fc1: nn.Module
    act: nn.Module
    fc2: nn.Module
    gate: nn.Module


def _has_ours(x: Tensor) -> bool:
    """Return whether kernels of ours run on x, and nobody traces it."""
    traced = isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling()
    return not traced and has_kernels(x)


def excited(
    first: nn.Module,
    se: nn.Module,
    last: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    act: nn.Module | None = None,
    drop: nn.Module | None = None,
    pool: nn.Module | None = None,
) -> Tensor | None:
    """Return `pool(act(drop(last(se(first(x)))) + residual))`, None where it cannot be fused.

    Args:
        first: a module with a `unit()`.
        se: a module with an `excitation()`.
        last: as `first`.
        x: (N, C, H, W).
        residual: added before the last activation.
        act: the last activation, if `last` does not end in its own.
        drop: before the add.
        pool: follows the activation.
    """
    fcs = _fcs(se, x)
    before, behind = _unit(first), _unit(last)
    if fcs is None or before is None or behind is None:
        return None
    behind = behind._replace(
        act=behind.act if act is None else act, drop=behind.drop if drop is None else drop
    )
    ends = _end(before), _end(behind)
    if None in ends:
        return None
    conv, last_conv = before.conv, behind.conv
    assert isinstance(conv, FusedConv2d)
    assert isinstance(last_conv, FusedConv2d)
    found = conv.by_image(x, None, str(ends[0]))
    if found is None:
        return None
    y, shares = found
    gate = squeeze_gate(shares, *fcs)
    return conv_act_pool(last_conv, y, residual, str(ends[1]), pool, gate)


def excited_last(
    last: Unit, se: nn.Module, x: Tensor, residual: Tensor, act: nn.Module
) -> Tensor | None:
    """Return `act(se(last(x)) + residual)`, None where `last` does not leave the means for `se`."""
    fcs = _fcs(se, x)
    if fcs is None:
        return None
    end, tail = _end(last), fusible_act(act)
    if end is None or tail is None:
        return None
    conv: Any = last.conv
    found = conv.by_image(x, None, end)
    if found is None:
        return None
    y, shares = found
    return squeeze_excite(y, *fcs[:4], residual, *fcs[4:], tail, shares)


class _Fcs(NamedTuple):
    """The arguments of `squeeze_gate` after the first."""

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    act: str
    gate: str


def _fcs(se: nn.Module, x: Tensor) -> _Fcs | None:
    """Return what a kernel of ours has to know of `se`, None if none may run it."""
    layers = None if not _has_ours(x) or has_hooks(se) else _call(se, "excitation")
    if layers is None:
        return None
    act, gate = fusible_act(layers.act), fusible_gate(layers.gate)
    fc1, fc2 = layers.fc1, layers.fc2
    if act is None or gate is None or not (is_plain(fc1) and is_plain(fc2)):
        return None
    return _Fcs(fc1.weight, fc1.bias, fc2.weight, fc2.bias, act, gate)


def _unit(module: nn.Module) -> Unit | None:
    return None if has_hooks(module) else _call(module, "unit")


def _call(module: Any, name: str) -> Any:
    method = getattr(type(module), name, None)
    return None if method is None else method(module)


def _end(unit: Unit) -> str | None:
    if not (isinstance(unit.norm, Folded) and isinstance(unit.conv, FusedConv2d)):
        return None
    return epilogue(unit.norm, unit.act, unit.drop) if is_fused(unit.conv) else None


def is_plain(fc: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether an op may read the parameters of `fc` in place of calling it."""
    if isinstance(fc, FusedConv2d):
        return is_fused(fc)
    # what is put in place of a convolution may compute something else
    return type(fc) is nn.Conv2d and not has_hooks(fc)


def conv_act_pool(
    conv: FusedConv2d,
    x: Tensor,
    residual: Tensor | None,
    act: str,
    pool: nn.Module | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Return `pool(act(conv(x * gate) + residual))`; of a mean's map nothing is written.

    A stem's maximum is taken as the bias is added.
    """
    pools = pool is not None and is_mean(pool)
    if (pools or gate is not None) and _has_ours(x):
        found = conv.by_image(x, residual, act, gate=gate, writes=not pools, pools=pools)
        if found is not None:
            y, shares = found
            if not pools:
                return pooled(y, pool)
            mean = shares.sum(1).to(x.dtype)
            return mean if getattr(pool, "flatten", False) else mean[:, :, None, None]
    x = x if gate is None else x * gate.to(x.dtype)[:, :, None, None]
    if pool is not None and residual is None and _has_ours(x) and fuses_pool(pool, x):
        # a stem: of its map, the largest of all, nothing is written but by the convolution
        return bias_act_pool(conv.without_bias(x), conv.bias, act)
    return pooled(conv(x, residual, act), pool)


def is_mean(pool: nn.Module) -> bool:
    """Return whether `pool` is the mean of each channel over the image, and nobody watches it."""
    if has_hooks(pool):
        return False
    if type(pool) is nn.AdaptiveAvgPool2d:
        return pool.output_size in (1, (1, 1))
    return type(pool) is GlobalAvgPool2d


def ends_in_pool(stage: nn.Module, pool: nn.Module, x: Tensor) -> bool:
    """Return whether the last block of a stage may run the pool with its last convolution.

    A block that can says by a method `last_unit()` which one that is, and takes the pool as an
    argument.
    """
    if not _has_ours(x) or has_hooks(stage) or getattr(stage, "grad_checkpointing", False):
        return False
    last = _blocks(stage)[-1:]
    if not last or has_hooks(last[0]):
        return False
    return takes_pool(_call(last[0], "last_unit"), pool, x)


def takes_pool(unit: Unit | None, pool: nn.Module, x: Tensor) -> bool:
    """Return whether `conv_norm_act` may run a convolution and the pool behind it as one op.

    Args:
        unit: the convolution and what is between; None for what is not known.
        pool: the pool.
        x: on what all runs, for its device.
    """
    return unit is not None and _has_ours(x) and is_mean(pool) and _end(unit) is not None


def _blocks(stage: nn.Module) -> list[nn.Module]:
    """Return what a stage runs one after the other, nothing if that is not known.

    A stage that is no sequence says by RUNS_IN_ROW that it calls its children in order.
    """
    if isinstance(stage, nn.Sequential):
        return [*stage]
    return [*stage.children()] if hasattr(type(stage), "RUNS_IN_ROW") else []


def run_into_pool(stage: nn.Module, pool: nn.Module, x: Tensor) -> Tensor:
    """Return `pool(stage(x))`, the pool run by the last block of the stage."""
    *blocks, last = _blocks(stage)
    for block in blocks:
        x = block(x)
    return last(x, pool)
