"""Layer scale, stochastic depth and the residual add in one pass: the end of a residual block.

    out = residual + row * gamma * x        row[n] = [noise[n] < 1 - drop_prob] / (1 - drop_prob)

A sample is dropped with probability drop_prob, independently of the others. `noise` is uniform in
[0, 1); the backward pass compares it again, so that no mask is kept. The x of a dropped sample
counts as zeros and is not read: infinity or NaN there reach neither out nor a gradient.

    dresidual = dout        dx = row * gamma * dout        dgamma = sum(row * dout * x)

Shapes   x, residual, out (N, C, H, W); gamma (C,) or None; noise (N,)
Dtypes   x fp16 | bf16 | fp32 | fp64, residual and out as x; gamma as x or fp32; noise fp32;
         arithmetic and sums in fp32 (fp64 for fp64), one rounding, to out
Layout   any strides; out keeps x's memory format
Bytes    at most, if no sample is dropped. forward: x, residual, out once each. backward: dout and
         dx, and x if gamma wants a gradient
Saves    noise and gamma; x if gamma wants a gradient
Raises   ValueError, TypeError: rank, channel count, shape, device or dtype of an argument; a
         drop_prob outside of [0, 1]
Source   Huang et al. 2016 (arXiv:1603.09382), as scaled by timm; Touvron et al. 2021
         (arXiv:2103.17239) for gamma. Unlike transformers' floor(rand + keep), which in bf16 drops
         too often, the comparison is in fp32; unlike timm's, the factor is not rounded to x's dtype
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._check import check_image, check_residual, check_vectors, promote_under_autocast
from ._op import Op, Traffic, define, refuses, sums_dtype, wants_grad


def drop_path_add(
    x: Tensor,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    drop_prob: float = 0.0,
    scale_by_keep: bool = True,
    noise: Tensor | None = None,
) -> Tensor:
    """Return `residual + row * gamma * x`; the module docstring is the contract.

    Args:
        x: output of the residual branch.
        residual: what the block adds it to; zeros if None.
        gamma: the layer's scale, one factor per channel; ones if None.
        drop_prob: probability that a sample's branch is dropped.
        scale_by_keep: divide what is kept by 1 - drop_prob, which preserves the mean.
        noise: one number of [0, 1) per sample: those below 1 - drop_prob are kept. None draws it
            from torch's generator of x's device, so that `torch.manual_seed`, checkpointing, CUDA
            graphs and compilation treat it as any other random number; drop_prob 0 draws nothing.

    >>> x = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)
    >>> drop_path_add(x, x, drop_prob=0.5, noise=torch.tensor([0.2, 0.7])).flatten()
    tensor([3., 2.])
    """
    if not 0.0 <= drop_prob <= 1.0:
        raise ValueError(
            f"drop_path_add: drop_prob must be a probability of [0, 1], got {drop_prob}"
        )
    x, residual = promote_under_autocast(x, residual)
    keep_prob = 1.0 - drop_prob
    if drop_prob == 0.0:
        noise = None
    elif noise is None:
        check_image("drop_path_add", x)
        noise = torch.rand(x.shape[0], dtype=torch.float32, device=x.device)
    scale = 1.0 / keep_prob if scale_by_keep and keep_prob > 0.0 else 1.0
    if noise is not None:
        noise = noise.contiguous()  # one value may have been expanded, to drop all or none
    return op(x, residual, gamma, noise, keep_prob, scale)


def _check(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    noise: Tensor | None,
    keep_prob: float,
    scale: float,
) -> None:
    op = "drop_path_add"
    check_image(op, x)
    check_vectors(op, x, gamma=gamma)
    check_residual(op, x, residual)
    if noise is None:
        return
    if noise.dim() != 1 or noise.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: noise must have shape ({x.shape[0]},), one value per sample of x "
            f"{tuple(x.shape)}; got {tuple(noise.shape)}; expand one value to drop all or none"
        )
    if noise.dtype != torch.float32:
        raise TypeError(
            f"{op}: noise must be float32, got {noise.dtype}; narrower types would shift the rate"
        )
    if noise.device != x.device:
        raise ValueError(f"{op}: noise is on {noise.device} and x on {x.device}; draw it there")


def _eager(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    noise: Tensor | None,
    keep_prob: float,
    scale: float,
) -> Tensor:
    y = x
    if noise is not None:
        y = torch.where((noise < keep_prob)[:, None, None, None], x, 0.0)
    if gamma is not None:
        y = y * gamma[:, None, None]
    if scale != 1.0:
        y = y * scale
    if residual is not None:
        y = y + residual
    return x.clone() if y is x else y.to(x.dtype)


def _output(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@define(
    "drop_path_add(Tensor x, Tensor? residual, Tensor? gamma, Tensor? noise, float keep_prob, "
    "float scale) -> Tensor",
    _output,
)
def _forward(*args: Any) -> Tensor:
    from ._triton import drop_path_add as kernels

    out = _output(*args)
    kernels.forward(out, *args)
    return out


def _gradients(
    dout: Tensor, x: Tensor | None, gamma: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    # a gradient has the layout of the map it is of
    dx = torch.empty_like(dout if x is None else x)
    C = 0 if x is None else dout.shape[1]
    dtype = sums_dtype(dout)
    return dx, dout.new_empty(C, dtype=dtype)


@define(
    "drop_path_add_backward(Tensor dout, Tensor? x, Tensor? gamma, Tensor? noise, "
    "float keep_prob, float scale) -> (Tensor dx, Tensor dgamma)",
    _gradients,
)
def _backward(*args: Any) -> tuple[Tensor, Tensor]:
    from ._triton import drop_path_add as kernels

    gradients = _gradients(*args)
    kernels.backward(gradients, *args)
    return gradients


class _DropPathAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, _, gamma, noise, keep_prob, scale = args
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, gamma, noise)
        ctx.keep_prob, ctx.scale = keep_prob, scale
        return _forward(*args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, noise = ctx.saved_tensors
        needs_dx, needs_dresidual, needs_dgamma = ctx.needs_input_grad[:3]
        dx = dgamma = None
        if needs_dx or needs_dgamma:
            dx, dgamma = _backward(dout, x, gamma, noise, ctx.keep_prob, ctx.scale)
        return (
            dx if needs_dx else None,
            dout if needs_dresidual else None,
            dgamma.to(gamma.dtype) if needs_dgamma and dgamma is not None else None,
            *(None, None, None),
        )


def _triton(*args: Any) -> Tensor:
    return _DropPathAdd.apply(*args) if wants_grad(*args[:3]) else _forward(*args)


def _traffic(x: Tensor, residual: Tensor | None, gamma: Tensor | None, *_: Any) -> Traffic:
    maps = x.numel() * x.element_size()
    needs_dgamma = gamma is not None and gamma.requires_grad
    return Traffic((2 + (residual is not None)) * maps, (2 + needs_dgamma) * maps)


op = Op("drop_path_add", _check, _eager, _triton, refuses, _traffic)
