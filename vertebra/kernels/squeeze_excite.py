"""Squeeze and excitation: every channel scaled by a gate that sees the means of all of them.

    s = mean(x)   over H, W        u = W1 s + b1        v = W2 act(u) + b2        g = gate(v)
    y = out_act(x * g + residual)

Where the means are known already, s is the sum over t of shares[n, t, c], as `conv2d_act_pool`
leaves them, and x is read once. That is for inference.

    dz = dy * out_act'(z)                      dresidual = dz
    dv = sum(dz * x) * gate'(v)                dW2 = sum(dv act(u)^T)      db2 = sum(dv)
    du = (W2^T dv) * act'(u)                   dW1 = sum(du s^T)           db1 = sum(du)
    dx = dz * g + W1^T du / (H*W)

Shapes   x, residual, y (N, C, H, W); fc1_weight (R, C), fc2_weight (C, R), or (R, C, 1, 1) and
         (C, R, 1, 1), as 1x1 convolutions hold them; fc1_bias (R,), fc2_bias (C,) or None; shares
         (N, T, C) or None
Dtypes   x fp16 | bf16 | fp32 | fp64, residual and y as x; weights and biases as x or fp32; shares,
         means, fcs, gates and sums in fp32 (fp64 for fp64), one rounding, to y
Layout   any strides; y keeps x's memory format
Bytes    forward: x twice, with shares once, residual and y once. backward: dy twice, x, dx; with
         out_act x twice; with out_act and residual dresidual takes the place of dy in the second
         pass and is written in the first, which also reads y (relu) or residual (other activations)
Saves    x, the weights, s, u and v; y for relu with a residual (the next layer keeps it anyway),
         residual for other activations with one
Raises   ValueError, TypeError: rank, shape, device or dtype of an argument; unknown act, gate or
         out_act
Source   Hu et al. 2018 (arXiv:1709.01507). Like timm, torchvision and transformers up to rounding:
         they round s, u, v and g to x's dtype
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._act import ACTIVATIONS, GATES, check_act, check_gate, finish, needs_input
from ._check import check_image, check_parameters, check_residual, promote_under_autocast
from ._op import Op, Traffic, define, refuses, sums_dtype, wants_grad
from .global_avg_pool import means


def squeeze_excite(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None = None,
    act: str = "relu",
    gate: str = "sigmoid",
    out_act: str = "none",
    shares: Tensor | None = None,
) -> Tensor:
    """Return `out_act(x * g + residual)`; the module docstring is the contract.

    >>> x = torch.tensor([1.0, 3.0, -8.0, 8.0]).reshape(1, 2, 1, 2)  # the means are 2 and 0
    >>> W1, W2 = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-3.0]])
    >>> squeeze_excite(x, W1, None, W2, None, gate="hard_sigmoid").abs().flatten()
    tensor([0.8333, 2.5000, 0.0000, 0.0000])
    """
    x, residual = promote_under_autocast(x, residual)
    return op(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, act, gate, out_act, shares)


def _check(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    gate: str,
    out_act: str,
    shares: Tensor | None,
) -> None:
    name = "squeeze_excite"
    check_image(name, x)
    check_fcs(name, "x", x.shape[1], fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    fcs = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight}
    check_parameters(name, x, **fcs, fc2_bias=fc2_bias)
    check_act(name, act)
    check_gate(name, gate)
    check_act(name, out_act, "out_act")
    check_residual(name, x, residual)
    if shares is not None:
        check_shares(name, shares)
        if shares.shape[::2] != x.shape[:2] or shares.dtype != sums_dtype(x):
            raise ValueError(
                f"{name}: shares must have shape (N, T, C) and be {sums_dtype(x)} where x is "
                f"{tuple(x.shape)} and {x.dtype}; got {tuple(shares.shape)} and {shares.dtype}; "
                "give those of x, by conv2d_act_pool"
            )
        if shares.device != x.device:
            raise ValueError(
                f"{name}: shares are on {shares.device} and x on {x.device}; move one with .to()"
            )


def check_shares(name: str, shares: Tensor) -> None:
    """Require parts of means, of whatever size."""
    if not isinstance(shares, Tensor) or shares.dim() != 3:  # pyright: ignore[reportUnnecessaryIsInstance]
        got = tuple(shares.shape) if isinstance(shares, Tensor) else type(shares).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"{name}: shares must have shape (N, T, C), got {got}; of means give s[:, None]"
        )
    if shares.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name}: shares must be float32 or float64, got {shares.dtype}; "
            "convert them with .float()"
        )


def check_fcs(
    name: str,
    of: str,
    C: int,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
) -> None:
    """Require the two fcs to lead from the C channels of the argument `of` to R and back."""
    R = fc1_weight.shape[0] if fc1_weight.dim() else 0
    for label, weight, rows, columns in (
        ("fc1_weight", fc1_weight, R, C),
        ("fc2_weight", fc2_weight, C, R),
    ):
        if tuple(weight.shape) not in ((rows, columns), (rows, columns, 1, 1)) or R == 0:
            wanted = "R, C" if label == "fc1_weight" else "C, R"
            raise ValueError(
                f"{name}: {label} must have shape ({wanted}) or ({wanted}, 1, 1), where {of} has "
                f"C = {C} channels and fc1 at least R = 1 rows, here {R}; got "
                f"{tuple(weight.shape)}; transpose it, or build the module for {C} channels"
            )
    for label, bias, rows in (("fc1_bias", fc1_bias, R), ("fc2_bias", fc2_bias, C)):
        if bias is not None and bias.shape != (rows,):
            raise ValueError(
                f"{name}: {label} must have shape ({rows},), one value per row of its weight; "
                f"got {tuple(bias.shape)}"
            )


def _eager(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    gate: str,
    out_act: str,
    shares: Tensor | None,
) -> Tensor:
    s = (means(x) if shares is None else shares.sum(1))[:, :, None, None]
    u = conv1x1(s, fc1_weight, fc1_bias)
    v = conv1x1(ACTIVATIONS[act](u), fc2_weight, fc2_bias)
    return finish(x * GATES[gate](v).to(x.dtype), residual, out_act)


def conv1x1(s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return an fc of means, (N, C, 1, 1), in their dtype."""
    weight = weight.to(s.dtype)
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    return F.conv2d(s, weight, None if bias is None else bias.to(s.dtype))


def _outputs(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    gate: str,
    out_act: str,
    shares: Tensor | None,
    keeps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, C = x.shape[:2]
    dtype = sums_dtype(x)
    kept = (N, C) if keeps else (0,)
    return (
        torch.empty_like(x),
        x.new_empty(kept, dtype=dtype),
        x.new_empty((N, fc1_weight.shape[0]), dtype=dtype),
        x.new_empty(kept, dtype=dtype),
    )


@define(
    "squeeze_excite(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
    "Tensor? fc2_bias, Tensor? residual, str act, str gate, str out_act, Tensor? shares, "
    "bool keeps) -> (Tensor y, Tensor s, Tensor u, Tensor v)",
    _outputs,
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ._triton import squeeze_excite as kernels

    outputs = _outputs(*args)
    kernels.forward(outputs, *args)
    return outputs


def _gradients(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    s: Tensor,
    u: Tensor,
    v: Tensor,
    act: str,
    gate: str,
    out_act: str,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    joined = y is not None or residual is not None
    return (
        torch.empty_like(x),
        torch.empty_like(x) if joined else x.new_empty(0),
        *(torch.empty_like(fc1_weight), fc1_weight.new_empty(fc1_weight.shape[0])),
        *(torch.empty_like(fc2_weight), fc2_weight.new_empty(fc2_weight.shape[0])),
    )


@define(
    "squeeze_excite_backward(Tensor dy, Tensor x, Tensor? y, Tensor? residual, Tensor fc1_weight, "
    "Tensor fc2_weight, Tensor s, Tensor u, Tensor v, str act, str gate, str out_act, "
    "bool needs_weights) -> (Tensor dx, Tensor dresidual, Tensor dfc1_weight, Tensor dfc1_bias, "
    "Tensor dfc2_weight, Tensor dfc2_bias)",
    _gradients,
)
def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ._triton import squeeze_excite as kernels

    gradients = _gradients(*args)
    kernels.backward(gradients, *args)
    return gradients


class _SqueezeExcite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, fc1_weight, _, fc2_weight, _, residual, act, gate, out_act, _ = args
        y, s, u, v = _forward(*args, True)
        # beside x: what tells out_act'(z) where x and the gate do not
        joined = residual is not None and out_act != "none"
        ctx.save_for_backward(
            x,
            y if joined and not needs_input(out_act) else None,
            residual if joined and needs_input(out_act) else None,
            *(fc1_weight, fc2_weight, s, u, v),
        )
        ctx.functions = act, gate, out_act
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:6]
        dx, dresidual, *dweights = _backward(
            dy, *ctx.saved_tensors, *ctx.functions, any(needs[1:5])
        )
        if ctx.functions[2] == "none":
            dresidual = dy  # dz is dy itself: there was nothing to write
        gradients = (dx, *dweights, dresidual)
        wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return (*wanted, None, None, None, None)


def _triton(*args: Any) -> Tensor:
    return _SqueezeExcite.apply(*args) if wants_grad(*args[:6]) else _forward(*args, False)[0]


def _refuses(*args: Any) -> str | None:
    if args[-1] is not None and wants_grad(*args[:6], args[-1]):
        return "a gradient is wanted (with shares, the kernels are for inference)"
    return refuses(*args)


def _traffic(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    gate: str,
    out_act: str,
    shares: Tensor | None,
) -> Traffic:
    """Count maps alone: fcs and shares are little beside them."""
    maps = x.numel() * x.element_size()
    has_residual = residual is not None
    if shares is not None:
        return Traffic((2 + has_residual) * maps, 0)
    # dy, x, dy, dx; z takes x once more; with a residual: dy, x, y or residual, dz, dz, dx
    backward = 4 if out_act == "none" else 5 + has_residual
    return Traffic((3 + has_residual) * maps, backward * maps)


op = Op("squeeze_excite", _check, _eager, _triton, _refuses, _traffic)
