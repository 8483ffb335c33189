"""The fusible activations and gates as device functions, under the names of `kernels/_act.py`.

Each entry is (act, dact): the value and the derivative at z, both fp32 (fp64 in double precision).
At a kink the derivative is PyTorch's; NaN passes through.
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_RSQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _none(z):
    return z


@triton.jit
def _none_grad(z):
    return tl.full(z.shape, 1.0, z.dtype)


@triton.jit
def _relu(z):
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _relu_grad(z):
    return tl.where(z <= 0.0, 0.0, 1.0)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _sigmoid_grad(z):
    s = _sigmoid(z)
    return s * (1.0 - s)


@triton.jit
def _silu(z):
    return z * _sigmoid(z)


@triton.jit
def _silu_grad(z):
    s = _sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def _gelu(z):
    return 0.5 * z * (1.0 + tl.math.erf(z * _SQRT_HALF))


@triton.jit
def _gelu_grad(z):
    cdf = 0.5 * (1.0 + tl.math.erf(z * _SQRT_HALF))
    return cdf + z * _RSQRT_2PI * tl.exp(-0.5 * z * z)


@triton.jit
def _hardswish(z):
    gate = tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0, propagate_nan=tl.PropagateNan.ALL)
    return z * gate * (1.0 / 6.0)


@triton.jit
def _hardswish_grad(z):
    return tl.where(z < -3.0, 0.0, tl.where(z <= 3.0, z * (1.0 / 3.0) + 0.5, 1.0))


@triton.jit
def _hard_sigmoid(z):
    clamped = tl.maximum(z + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(clamped, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)


@triton.jit
def _hard_sigmoid_grad(z):
    return tl.where((z > -3.0) & (z < 3.0), 1.0 / 6.0, 0.0)


ACTIVATIONS = {
    "none": (_none, _none_grad),
    "relu": (_relu, _relu_grad),
    "silu": (_silu, _silu_grad),
    "gelu": (_gelu, _gelu_grad),
    "hardswish": (_hardswish, _hardswish_grad),
    "sigmoid": (_sigmoid, _sigmoid_grad),
}

GATES = {
    "sigmoid": (_sigmoid, _sigmoid_grad),
    "hard_sigmoid": (_hard_sigmoid, _hard_sigmoid_grad),
}
