"""DropBlock: dropout of squares, for maps whose neighbours say the same."""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

torch.fx.wrap("_drop_block")  # a leaf: it looks at shapes, which a proxy does not have


def _drop_block(
    x: Tensor,
    drop_prob: float,
    block_size: int,
    gamma_scale: float,
    with_noise: bool,
    couple_channels: bool,
    scale_by_keep: bool,
) -> Tensor:
    N, C, H, W = x.shape
    kh, kw = min(block_size, H), min(block_size, W)
    # as if squares lay inside of the map and never met, though seeds are drawn wherever
    gamma = gamma_scale * drop_prob * (H * W) / (kh * kw) / ((H - kh + 1) * (W - kw + 1))
    seeds = x.new_empty((N, 1 if couple_channels else C, H, W)).bernoulli_(gamma)
    dropped = F.max_pool2d(seeds, (kh, kw), 1, (kh // 2, kw // 2))
    dropped = dropped[..., 1 - kh % 2 :, 1 - kw % 2 :]  # an even window gives one more
    keep = 1.0 - dropped
    if with_noise:
        return x * keep + torch.randn_like(keep) * dropped
    if scale_by_keep:
        count = keep.sum(dtype=torch.float32).clamp_min(1.0)
        keep = keep * (keep.numel() / count).to(x.dtype)
    return x * keep


class DropBlock2d(nn.Module):
    """While training, squares of the map become zero; the rest is scaled to keep the mean.

    Signature and attributes of timm's module of this name, and the same squares for the same seed.
    About `drop_prob * gamma_scale` of the map is dropped. In eval mode, and with `drop_prob` 0, it
    returns x itself.

    Ghiasi et al. 2018 (arXiv:1810.12890).

    Args:
        drop_prob: share of the map to drop.
        block_size: side of a square; the map's where that is smaller.
        gamma_scale: factor of the share.
        with_noise: fill the squares with Gaussian noise, and scale nothing.
        inplace: write the result to x.
        couple_channels: drop the same squares in all channels.
        scale_by_keep: divide what is kept by the share of the batch that is kept.

    >>> DropBlock2d(0.5, block_size=3).eval()(torch.ones(1, 1, 4, 4)).sum()
    tensor(16.)
    """

    def __init__(
        self,
        drop_prob: float = 0.1,
        block_size: int = 7,
        gamma_scale: float = 1.0,
        with_noise: bool = False,
        inplace: bool = False,
        couple_channels: bool = True,
        scale_by_keep: bool = True,
    ) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.block_size = block_size
        self.gamma_scale = gamma_scale
        self.with_noise = with_noise
        self.inplace = inplace
        self.couple_channels = couple_channels
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        y = _drop_block(
            *(x, self.drop_prob, self.block_size, self.gamma_scale),
            *(self.with_noise, self.couple_channels, self.scale_by_keep),
        )
        return x.copy_(y) if self.inplace else y

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, block_size={self.block_size}"
