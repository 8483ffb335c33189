"""The gate of a squeeze and excitation, from the means that a convolution has left in parts.

    s = sum over t of shares[n, t, c]      u = W1 s + b1      g = gate(W2 act(u) + b2)

What `squeeze_excite` computes between its two passes over maps, where `conv2d_act_pool` takes both
over: the convolution before leaves the means, the one behind multiplies by the gate. Inference
only.

Shapes   shares (N, T, C); fc1_weight (R, C), fc2_weight (C, R), or (R, C, 1, 1) and (C, R, 1, 1);
         fc1_bias (R,), fc2_bias (C,) or None; g (N, C)
Dtypes   shares and g fp32 | fp64; weights and biases any, in which nothing is rounded
Layout   shares any strides, g contiguous
Bytes    shares and the weights once, g
Saves    nothing
Raises   ValueError, TypeError: rank, shape, device or dtype of an argument; unknown act or gate
Source   Hu et al. 2018 (arXiv:1709.01507). Like `squeeze_excite`
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._act import ACTIVATIONS, GATES, check_act, check_gate
from ._op import Op, Traffic, define, refuses, wants_grad
from .squeeze_excite import check_fcs, check_shares, conv1x1


def squeeze_gate(
    shares: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """Return g; the module docstring is the contract.

    >>> import torch
    >>> W1, W2 = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]])
    >>> squeeze_gate(torch.ones(1, 3, 2), W1, None, W2, None, gate="hard_sigmoid")
    tensor([[1., 0.]])
    """
    return op(shares, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, gate)


def _check(
    shares: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: str,
    gate: str,
) -> None:
    name = "squeeze_gate"
    check_shares(name, shares)
    check_fcs(name, "shares", shares.shape[2], fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    for label, v in zip(
        ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
        (fc1_weight, fc1_bias, fc2_weight, fc2_bias),
        strict=True,
    ):
        if v is not None and v.device != shares.device:
            raise ValueError(
                f"{name}: {label} is on {v.device} and shares on {shares.device}; "
                "move one with .to()"
            )
    check_act(name, act)
    check_gate(name, gate)


def _eager(
    shares: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: str,
    gate: str,
) -> Tensor:
    u = conv1x1(shares.sum(1)[:, :, None, None], fc1_weight, fc1_bias)
    v = conv1x1(ACTIVATIONS[act](u), fc2_weight, fc2_bias)
    return GATES[gate](v).flatten(1)


def _output(shares: Tensor, *_: Any) -> Tensor:
    return shares.new_empty(shares.shape[0], shares.shape[2])


@define(
    "squeeze_gate(Tensor shares, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
    "Tensor? fc2_bias, str act, str gate) -> Tensor",
    _output,
)
def _forward(*args: Any) -> Tensor:
    from ._triton import squeeze_gate as kernels

    g = _output(*args)
    kernels.forward(g, args[0].contiguous(), *args[1:])
    return g


def _refuses(*args: Any) -> str | None:
    if wants_grad(*args[:5]):
        return "a gradient is wanted (the kernels are for inference)"
    return refuses(*args)


def _traffic(*_: Any) -> Traffic:
    """Count maps: there are none."""
    return Traffic(0, 0)


op = Op("squeeze_gate", _check, _eager, _forward, _refuses, _traffic)
