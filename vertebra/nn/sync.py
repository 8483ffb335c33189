"""Batch norms whose training statistics are those of all processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._drop import drop_add
from ._replace import replace_modules, share_hooks
from .norm_act import BatchNormAct2d, has_peers


class SyncBatchNormAct2d(BatchNormAct2d, nn.SyncBatchNorm):
    """`BatchNormAct2d` that trains with the statistics of all processes of a group.

    Where there is one process, and in eval mode, it is a `BatchNormAct2d`. Else the normalisation
    is `torch.nn.SyncBatchNorm`'s, which needs a GPU; drop, residual, activation and pool follow it.

    Args:
        num_features: C of the (N, C, H, W) input.
        process_group: whose processes share statistics; None for all.
        kwargs: as `BatchNormAct2d` takes them.
    """

    def __init__(self, num_features: int, *, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.process_group = process_group

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        pool: nn.Module | None = None,
        drop: nn.Module | None = None,
    ) -> Tensor:
        if not has_peers(self):
            return super().forward(x, residual, pool, drop)
        y = nn.SyncBatchNorm.forward(self, x)
        y = self.act(drop_add(self.drop if drop is None else drop, y, residual))
        return y if pool is None else pool(y)


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Replace every batch norm inside `module` by one that synchronises; return the result.

    As `torch.nn.SyncBatchNorm.convert_sync_batchnorm`, which drops the activation that a norm of
    this library or of timm ends in: those become `SyncBatchNormAct2d`, which keep it, and all
    others `torch.nn.SyncBatchNorm`. Parameters and buffers are the same objects, keys and hooks
    stay.

    Args:
        module: any model, changed in place; or a norm, in whose place the returned one belongs.
        process_group: whose processes share statistics; None for all.

    >>> model = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 1), BatchNormAct2d(8)))
    >>> type(model[1]).__name__, model[1].act
    ('SyncBatchNormAct2d', ReLU(inplace=True))
    """

    def convert(norm: nn.Module) -> nn.Module | None:
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
            return None
        drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
        if not (isinstance(drop, nn.Module) and isinstance(act, nn.Module)):
            new = nn.SyncBatchNorm.convert_sync_batchnorm(norm, process_group)
        else:
            new = SyncBatchNormAct2d(
                norm.num_features,
                eps=norm.eps,
                momentum=norm.momentum,
                affine=norm.affine,
                track_running_stats=norm.track_running_stats,
                process_group=process_group,
                device="meta",
            )
            new.drop, new.act = drop, act
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(new, name, getattr(norm, name))
            new.train(norm.training)
        share_hooks(new, norm)
        return new

    return replace_modules(module, convert)
