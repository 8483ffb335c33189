"""Layer normalisation over channels, in either order of the dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..kernels import layer_norm_2d

# for torch.fx these are leaves: they look at shapes, which a proxy does not have
torch.fx.wrap("layer_norm_2d")
torch.fx.wrap("_layer_norm_nhwc")


def _layer_norm_nhwc(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise (N, H, W, C) over C: a view of it is the (N, C, H, W) tensor the op takes."""
    if x.dim() != 4:
        raise ValueError(
            f"LayerNorm2d: with data_format='channels_last' x must have shape (N, H, W, C), got "
            f"{tuple(x.shape)}; for other ranks use torch.nn.LayerNorm"
        )
    return layer_norm_2d(x.permute(0, 3, 1, 2), weight, bias, eps).permute(0, 2, 3, 1)


def check_data_format(data_format: str) -> None:
    """Raise transformers' error for an order of dimensions that is neither of its two."""
    if data_format not in ("channels_first", "channels_last"):
        raise NotImplementedError(
            f"Unsupported data format: {data_format}; "
            "it must be 'channels_first' or 'channels_last'"
        )


class LayerNorm2d(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the channels of each pixel of an (N, C, H, W) tensor.

    Signature and `state_dict` keys of timm's module of this name (and of torchvision's, whose eps
    is 1e-5); with `data_format` also what transformers' `ConvNextLayerNorm` does. The output has
    the dtype of the input, under autocast too. Runs as `vertebra.kernels.layer_norm_2d`.

    Args:
        num_channels: C of the input.
        eps: added to the variance.
        affine: learn weight, and bias unless that is switched off.
        bias: learn a bias beside the weight.
        data_format: `"channels_first"` for (N, C, H, W), `"channels_last"` for (N, H, W, C). This
            is the order of the dimensions; either may have either memory format.
        device: of the parameters.
        dtype: of the parameters.

    >>> x = torch.randn(2, 8, 4, 4)
    >>> y = LayerNorm2d(8)(x)
    >>> rows = LayerNorm2d(8, data_format="channels_last")(x.permute(0, 2, 3, 1))
    >>> torch.equal(rows.permute(0, 3, 1, 2), y)
    True
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        *,
        bias: bool = True,
        data_format: str = "channels_first",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_data_format(data_format)
        super().__init__(num_channels, eps, affine, bias, device=device, dtype=dtype)
        self.data_format = data_format

    def forward(self, x: Tensor) -> Tensor:
        run = layer_norm_2d if self.data_format == "channels_first" else _layer_norm_nhwc
        return run(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        suffix = "" if self.data_format == "channels_first" else f", {self.data_format}"
        return super().extra_repr() + suffix
