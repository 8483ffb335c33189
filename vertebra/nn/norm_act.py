"""Batch normalisation with its activation, and the residual add between them if there is one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed
import torch.fx
from torch import Tensor, nn

from ..kernels import batch_norm_act, batch_norm_act_pool, scale_bias_act
from ._act import ActLayer, by_name, create_act, fusible_act, has_hooks
from ._drop import drop_add, is_idle
from .layer_norm import LayerNorm2d

NormLayer = Callable[..., nn.Module]

# A leaf for torch.fx: it looks at shapes, which a proxy does not have, and counts batches. One for
# both modes: feature extractors trace in both and expect the same nodes.
torch.fx.wrap("_normalised")


def _normalised(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    *,
    training: bool,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float = 0.0,
    eps: float,
    counter: Tensor | None,
) -> Tensor:
    """Run the op for the mode, and count the batch."""
    stored: dict[str, Any] = {"eps": eps}
    if training:
        stored |= {"running_mean": running_mean, "running_var": running_var, "momentum": momentum}
        y = batch_norm_act(x, weight, bias, residual, act, **stored)
    else:
        stored |= {"mean": running_mean, "var": running_var}
        y = scale_bias_act(x, weight, bias, residual, act, **stored)
    if counter is not None:
        counter.add_(1)
    return y


def fuses_pool(pool: nn.Module, x: Tensor) -> bool:
    """Return whether `pool` is that of a ResNet's stem, and nobody watches or traces it."""
    return (
        not isinstance(x, torch.fx.Proxy)
        and type(pool) is nn.MaxPool2d
        and not has_hooks(pool)
        and pool.kernel_size in (3, (3, 3))
        and pool.stride in (2, (2, 2))
        and pool.padding in (1, (1, 1))
        and pool.dilation in (1, (1, 1))
        and not (pool.ceil_mode or pool.return_indices)
    )


def pooled(y: Tensor, pool: nn.Module | None) -> Tensor:
    """Return pool(y) where there is one.

    A norm that is traced by itself has a placeholder there, which stays empty: modules are no
    inputs of a graph.
    """
    return y if pool is None or isinstance(pool, torch.fx.Proxy) else pool(y)


def normalise(
    norm: Any,
    x: Tensor,
    act: nn.Module | None = None,
    residual: Tensor | None = None,
    pool: nn.Module | None = None,
    drop: nn.Module | None = None,
) -> Tensor:
    """Return `pool(act(drop(norm(x)) + residual))`, in as few ops as there can be.

    One, unless `drop` does something or the activation is one the ops do not know; the pool is part
    of it where it is a ResNet stem's and nothing comes between. A traced graph keeps the pool:
    feature extractors ask for it by its name.

    Args:
        norm: a `torch.nn.BatchNorm2d`, or a `SyncBatchNorm` without peers, whose state is used and
            advanced as its `forward` would, or a batch norm frozen into the buffers weight, bias,
            running_mean and running_var.
        x: (N, C, H, W).
        act: the activation; None for none.
        residual: added before the activation.
        pool: follows the activation.
        drop: comes between norm and add.
    """
    name = "none" if act is None else fusible_act(act)
    fused = name if is_idle(drop) else None
    kwargs, counter = _statistics(norm)
    if pool is not None and residual is None and fused is not None and fuses_pool(pool, x):
        y = batch_norm_act_pool(x, norm.weight, norm.bias, fused, **kwargs)
        if counter is not None:
            counter.add_(1)
        return y
    kwargs["counter"] = counter
    if fused is not None:
        y = _normalised(x, norm.weight, norm.bias, residual, fused, **kwargs)
    else:
        y = _normalised(x, norm.weight, norm.bias, None, "none", **kwargs)
        y = drop_add(drop, y, residual)
        y = y if act is None else act(y)
    return pooled(y, pool)


def _statistics(norm: Any) -> tuple[dict[str, Any], Tensor | None]:
    """Return what normalises, as arguments of `batch_norm_act_pool`, and the counter to advance."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or (  # pyright: ignore[reportPrivateUsage]
        not norm.training and norm.running_mean is not None
    ):
        stored = {"running_mean": norm.running_mean, "running_var": norm.running_var}
        return {"training": False, "eps": norm.eps, **stored}, None
    tracks = norm.training and norm.track_running_stats and norm.running_mean is not None
    counter = norm.num_batches_tracked if tracks else None
    momentum = norm.momentum
    if momentum is None:
        momentum = 0.0 if counter is None else 1.0 / float(counter + 1)
    stored = {
        "running_mean": norm.running_mean if tracks else None,
        "running_var": norm.running_var if tracks else None,
    }
    return {"training": True, "momentum": momentum, "eps": norm.eps, **stored}, counter


class FusesAct:
    """The norm modules that end in an activation, and what may come before and after it."""

    drop: nn.Module
    act: nn.Module

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        pool: nn.Module | None = None,
        drop: nn.Module | None = None,
    ) -> Tensor:
        # the proxy of an argument left out is no module either
        drop = drop if isinstance(drop, nn.Module) else self.drop
        return normalise(self, x, self.act, residual, pool, drop)


class BatchNormAct2d(FusesAct, nn.BatchNorm2d):
    """`act(drop(batch_norm(x)) + residual)`: `torch.nn.BatchNorm2d` that ends in an activation.

    Signature, attributes and `state_dict` keys of timm's module of this name; `forward` also takes
    the residual that a block adds before its last activation, the pool that a stem ends in, and a
    drop in place of its own. Everything runs as one op (`vertebra.kernels.batch_norm_act`, or
    `scale_bias_act` when the stored statistics are used; `batch_norm_act_pool` with
    `nn.MaxPool2d(3, 2, 1)`) unless the drop does something or the activation or the pool is one the
    ops do not know. A `DropPath` that drops is one op with the add (`drop_path_add`).

    Args:
        num_features: C of the (N, C, H, W) input.
        eps: added to the variance.
        momentum: weight of the new statistic in the running one; None for a cumulative mean.
        affine: learn weight and bias.
        track_running_stats: keep running statistics and use them in eval mode.
        apply_act: end in the activation, or in none.
        act_layer: class, name or None.
        act_kwargs: passed to the activation.
        inplace: passed to the activation; the fused op needs no such choice.
        drop_layer: module class called between norm and activation (`DropBlock2d`, `DropPath`).
        device: of the parameters.
        dtype: of the parameters.

    >>> bn = BatchNormAct2d(8)
    >>> x = torch.randn(2, 8, 4, 4)
    >>> bool((bn(x, residual=x) >= 0).all())
    True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: ActLayer = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = create_act(
            act_layer if apply_act else None, inplace=inplace, act_kwargs=act_kwargs
        )


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics, weight and bias are constants (four buffers).

    Signature and `state_dict` keys of torchvision's module of this name; a `num_batches_tracked` in
    a checkpoint is dropped. Runs as `vertebra.kernels.scale_bias_act`, whose backward pass then
    keeps the output and not the input.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        for name, fill in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(
                name, torch.full((num_features,), float(fill), device=device, dtype=dtype)
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self, x)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class FrozenBatchNormAct2d(FusesAct, FrozenBatchNorm2d):
    """`BatchNormAct2d` whose statistics, weight and bias are constants (four buffers).

    Signature and `state_dict` keys of timm's module of this name; a `FrozenBatchNorm2d` that ends
    in an activation and takes the residual, the pool and the drop that `BatchNormAct2d` takes.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        apply_act: bool = True,
        act_layer: ActLayer = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, device, dtype)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = create_act(
            act_layer if apply_act else None, inplace=inplace, act_kwargs=act_kwargs
        )


def _group_norm(num_channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, num_channels)


def _group_norm1(num_channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(1, num_channels)


_BY_NAME: dict[str, NormLayer] = {
    "batchnorm": BatchNormAct2d,
    "batchnorm2d": BatchNormAct2d,
    "frozenbatchnorm2d": FrozenBatchNormAct2d,
    "groupnorm": _group_norm,
    "groupnorm1": _group_norm1,
    "layernorm2d": LayerNorm2d,
}


_BARE: dict[Any, Any] = {
    BatchNormAct2d: nn.BatchNorm2d,
    FrozenBatchNormAct2d: FrozenBatchNorm2d,
}


def create_norm_act(
    norm_layer: str | NormLayer | None,
    num_features: int,
    act_layer: ActLayer = nn.ReLU,
    *,
    apply_act: bool = True,
    bare: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build the norm of a conv-norm-act unit.

    `nn.BatchNorm2d` (also as a `functools.partial`, or None) becomes `BatchNormAct2d`; this
    library's norms are used as they are; any other callable is called with `num_features` and stays
    a bare norm, which `norm_act` follows by the add and the activation.

    With `bare`, batch norms stay bare too: one that is a child of a network beside its activation,
    which extractors of features run one after the other. `norm_act` fuses them all the same.

    Of timm's names "batchnorm2d", "frozenbatchnorm2d", "groupnorm" (of 32 groups), "groupnorm1" and
    "layernorm2d" are known.
    """
    if isinstance(norm_layer, str):
        norm_layer = by_name("norm_layer", norm_layer, _BY_NAME)
    base: Any = norm_layer or BatchNormAct2d
    args: tuple[Any, ...] = ()
    if isinstance(base, partial):
        base, args, kwargs = base.func, base.args, {**base.keywords, **kwargs}
    if bare:
        base = _BARE.get(base, base)
    elif base is nn.BatchNorm2d:
        base = BatchNormAct2d
    if isinstance(base, type) and issubclass(base, FusesAct):
        kwargs |= {"apply_act": apply_act, "act_layer": act_layer}
    else:  # a bare norm knows nothing of these
        for name in ("act_kwargs", "inplace", "device", "dtype"):
            kwargs.pop(name, None)
    build: Any = base
    return build(*args, num_features, **kwargs)


def has_peers(norm: nn.SyncBatchNorm) -> bool:
    """Return whether there are other processes to share the statistics of this batch with."""
    distributed = torch.distributed
    if not (norm.training and distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size(norm.process_group) > 1


def is_bare(norm: nn.Module) -> bool:
    """Return whether `norm` computes what `normalise` does, no more, and nobody watches it."""
    kind: Any = FrozenBatchNorm2d
    if isinstance(norm, nn.SyncBatchNorm):
        if has_peers(norm):
            return False
        kind = nn.SyncBatchNorm
    elif isinstance(norm, nn.BatchNorm2d):
        kind = nn.BatchNorm2d
    return type(norm).forward is kind.forward and not has_hooks(norm)


def norm_act(
    norm: nn.Module,
    x: Tensor,
    act: nn.Module | None = None,
    residual: Tensor | None = None,
    pool: nn.Module | None = None,
    drop: nn.Module | None = None,
) -> Tensor:
    """Return `pool(act(drop(norm(x)) + residual))` for whatever norm stands in a block.

    One of this library's norms carries the activation itself. A bare one is followed by `act`: in
    the same op if it is a plain or frozen batch norm that nobody watches or traces, else as it is:
    another `norm_layer`, or what `convert_sync_batchnorm` of torch put in its place.
    """
    if isinstance(norm, FusesAct):
        if pool is not None and not has_hooks(norm):  # a hook is promised what the norm returns
            return norm(x, residual, pool, drop)
        return pooled(norm(x, residual, drop=drop), pool)
    if not isinstance(x, torch.fx.Proxy) and is_bare(norm):
        return normalise(norm, x, act, residual, pool, drop)
    y = drop_add(drop, norm(x), residual)
    return pooled(y if act is None else act(y), pool)
