"""Global response normalisation, of ConvNeXt V2."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..kernels import global_response_norm

# for torch.fx this is a leaf: it looks at shapes, which a proxy does not have
torch.fx.wrap("global_response_norm")


class GlobalResponseNorm(nn.Module):
    """`x + weight * (x * r) + bias`, where r is how large a channel is beside the others.

    Signature and `state_dict` keys of timm's module of this name. Checkpoints of timm (weight and
    bias of shape (dim,)) and of transformers and the authors ((1, 1, 1, dim)) both load;
    `state_dict()` gives them in the shape that the module holds, `param_shape`. Runs as one op
    (`vertebra.kernels.global_response_norm`), whose statistics are in fp32.

    Args:
        dim: C of the input.
        eps: added to the mean norm.
        channels_last: the input is (N, H, W, C), and else (N, C, H, W).
        device: of the parameters.
        dtype: of the parameters.
        param_shape: of weight and bias: None for (dim,); transformers holds (1, 1, 1, dim).

    >>> grn = GlobalResponseNorm(8, param_shape=(1, 1, 1, 8))
    >>> x = torch.randn(2, 4, 4, 8)
    >>> torch.equal(grn(x), x)  # weight and bias start at zero
    True
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        channels_last: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        param_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        shape = (dim,) if param_shape is None else param_shape
        if math.prod(shape) != dim:
            raise ValueError(
                f"param_shape must hold dim = {dim} values, got {param_shape}; "
                f"give (1, 1, 1, {dim}) or None"
            )
        self.dim = dim
        self.eps = eps
        self.channels_last = channels_last
        self.weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, own in (("weight", self.weight), ("bias", self.bias)):
            value = state_dict.get(prefix + name)
            # only ones are added or dropped: any other shape is an error, which super() reports
            if isinstance(value, Tensor) and value.squeeze().shape == own.squeeze().shape:
                state_dict[prefix + name] = value.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(), self.bias.flatten()
        if not self.channels_last:
            return global_response_norm(x, weight, bias, self.eps)
        y = global_response_norm(x.permute(0, 3, 1, 2), weight, bias, self.eps)
        return y.permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, channels_last={self.channels_last}"
