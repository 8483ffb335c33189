"""What `vertebra.fuse` puts in the place of convolutions, linear layers and norms, for inference.

Convolutions and linear layers run what follows them; of a norm that the convolution before it has
taken over stays what comes after it.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeGuard

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import conv2d_act
from ..kernels._onednn import forget
from ..kernels.conv2d_act_pool import where_ours
from ._act import fusible_act, has_hooks
from ._drop import drop_add, is_idle
from .conv_same import pad_same
from .norm_act import FusesAct, pooled

# for torch.fx these are leaves: they look at shapes, which a proxy does not have
torch.fx.wrap("conv2d_act")
torch.fx.wrap("_linear_act")


class _Repacked(nn.Module):
    """A layer whose parameters may have packed copies (`vertebra.kernels._onednn`).

    Attributes:
        packs: on CPUs, keep a copy of the weight that is packed for oneDNN.
    """

    weight: Tensor
    packs = True

    @property
    def filters(self) -> Tensor:
        """The weight as the op takes it, which packs parameters and nothing else."""
        return self.weight if self.packs else self.weight.detach()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for parameter in self.parameters(recurse=False):
            forget(parameter)  # moved or converted, it would hold the memory that it leaves
        return super()._apply(fn, recurse)


class FusedConv2d(_Repacked, nn.Conv2d):
    """`act(conv(x) + residual)`: a `torch.nn.Conv2d` whose `forward` also takes what follows it.

    Runs as `vertebra.kernels.conv2d_act`, in channels_last whatever comes in, and with any padding
    that a `Conv2d` may have.

    Attributes:
        act: an activation that always follows, by the name the ops know it under, or "none".

    >>> conv = FusedConv2d(3, 8, 3, padding=1)
    >>> x = torch.randn(2, 3, 4, 4)
    >>> bool((conv(x, residual=torch.zeros(2, 8, 4, 4), act="relu") >= 0).all())
    True
    """

    def __init__(self, *args: Any, act: str = "none", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None, act: str = "none") -> Tensor:
        if self.act != "none":
            if residual is not None or act != "none":
                raise ValueError(f"this convolution ends in {self.act}: nothing more can follow it")
            act = self.act
        x, padding = self._padded(x.contiguous(memory_format=torch.channels_last))
        tensors = (x, self.filters, self.bias, residual)
        return conv2d_act(*tensors, act, **self._steps, padding=padding)

    def by_image(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        act: str = "none",
        *,
        gate: Tensor | None = None,
        writes: bool = True,
        pools: bool = True,
    ) -> tuple[Tensor, Tensor] | None:
        """Return what `vertebra.kernels.conv2d_act_pool` does, None where other kernels are better.

        Other than those of ours, by what would run this convolution alone.
        """
        x, padding = self._padded(x.contiguous(memory_format=torch.channels_last))
        tensors = (x, self.filters, self.bias, residual)
        ends = {"gate": gate, "writes": writes, "pools": pools}
        return where_ours(*tensors, act, **ends, **self._steps, padding=padding)

    def without_bias(self, x: Tensor) -> Tensor:
        """Return the convolution of x and nothing else."""
        x, padding = self._padded(x.contiguous(memory_format=torch.channels_last))
        return conv2d_act(x, self.filters, **self._steps, padding=padding)

    @property
    def _steps(self) -> dict[str, Any]:
        return {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return x with the padding that the op does not know, and the one that it does.

        And with whatever else comes before the convolution.
        """
        if self.padding_mode != "zeros":
            return F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode), 0
        if isinstance(self.padding, str):  # "same": one pixel more at the end, if need be
            return F.pad(x, self._reversed_padding_repeated_twice), 0
        return x, self.padding

    def extra_repr(self) -> str:
        suffix = "" if self.act == "none" else f", act={self.act}"
        return super().extra_repr() + suffix


class FusedConv2dSame(FusedConv2d):
    """`FusedConv2d` with TensorFlow's SAME padding, by image size."""

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        return pad_same(x, self.kernel_size, self.stride, self.dilation), 0


class FusedImageConv2d(FusedConv2d):
    """`FusedConv2d` that reads an image, and subtracts `mean`, (C, 1, 1), from it."""

    mean: Tensor

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        return super()._padded(x - self.mean)


class FusedLinear(_Repacked, nn.Linear):
    """`act(fc(x) + residual)`: a `torch.nn.Linear` whose `forward` also takes what follows it.

    Runs as `vertebra.kernels.conv2d_act`, of size 1, on (N, H, W, C) or any other rank.
    """

    act: ClassVar[str] = "none"

    def forward(self, x: Tensor, residual: Tensor | None = None, act: str = "none") -> Tensor:
        return _linear_act(x, self.filters, self.bias, residual, act)


def as_images(x: Tensor, layer: nn.Module) -> Tensor:
    """Return what `layer` takes or returns as (N, C, H, W), which a convolution's is."""
    return _image(x) if isinstance(layer, FusedLinear) else x


def _linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, act: str
) -> Tensor:
    y = conv2d_act(
        *(_image(x), weight[:, :, None, None], bias),
        *(None if residual is None else _image(residual), act),
    ).permute(0, 2, 3, 1)
    return y if x.dim() == 4 else y.reshape(*x.shape[:-1], weight.shape[0])


def _image(rows: Tensor) -> Tensor:
    """Return (..., C) as (N, C, H, W)."""
    rows = rows if rows.dim() == 4 else rows.reshape(-1, 1, 1, rows.shape[-1])
    return rows.permute(0, 3, 1, 2)


class Folded(nn.Module):
    """Where a norm was: returns x, which the convolution before has normalised.

    Args:
        num_features: channels of x.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return f"{self.num_features}"


class FoldedAct(FusesAct, Folded):
    """Where a norm was that ended in an activation: what is left of it.

    Args:
        num_features: channels of x.
        drop: stands between the norm and the add.
        act: the activation.
    """

    def __init__(self, num_features: int, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(num_features)
        self.drop = drop
        self.act = act

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        pool: nn.Module | None = None,
        drop: nn.Module | None = None,
    ) -> Tensor:
        drop = drop if isinstance(drop, nn.Module) else self.drop
        return pooled(self.act(drop_add(drop, x, residual)), pool)


def is_fused_model(model: nn.Module) -> bool:
    """Return whether `vertebra.fuse` has made this, or a part of it."""
    return any(isinstance(m, (FusedConv2d, FusedLinear, Folded)) for m in model.modules())


def is_fused(layer: nn.Module) -> TypeGuard[FusedConv2d | FusedLinear]:
    """Return whether `layer` can run what follows it, and nobody watches it."""
    is_one = isinstance(layer, (FusedConv2d, FusedLinear))
    return is_one and layer.act == "none" and not has_hooks(layer)


def epilogue(norm: Folded, act: nn.Module | None, drop: nn.Module | None) -> str | None:
    """Return the activation that is all there is behind a convolution, but for an add, or None.

    None if somebody watches what is left of the norm, or an op does not know the activation, or
    `drop` does something.
    """
    if has_hooks(norm):
        return None
    if isinstance(norm, FoldedAct):
        act, drop = norm.act, norm.drop if drop is None else drop
    if not is_idle(drop):
        return None
    return "none" if act is None else fusible_act(act)
