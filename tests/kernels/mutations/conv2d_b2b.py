import torch

from vertebra.kernels._triton import conv2d_b2b
from vertebra.testing.cases import example

MUTATIONS = {
    "multiplies the first channels again": (
        "next_weight_desc.load([0, k])",
        "next_weight_desc.load([0, 0])",
    ),
    "takes the first filters again": ("weight_desc.load([k, 0]), x", "weight_desc.load([0, 0]), x"),
    "adds the residual of the first filters": (
        "residual_desc.load([m, k])",
        "residual_desc.load([m, 0])",
    ),
    "takes the bias of the first filters": ("bias_ptr, filters,", "bias_ptr, filters - k,"),
    "leaves the last filters out": ("tl.maximum(K, 1)", "tl.maximum(K - BLOCK_K, 1)"),
    "forgets the second bias": ("z = sums + load", "z = sums + 0 * load"),
    "multiplies before the activation": (", y, sums,", ", (y + y).to(y_desc.dtype), sums,"),
    "stores the first pixels again": ("y_desc.store([m, k]", "y_desc.store([m * 0, k]"),
}


def _plan(dtype, *options):
    case = example("conv2d_b2b", dtype=dtype, options=(*options, "bias", "residual"))
    return conv2d_b2b, "_b2b_kernel", case, 1, MUTATIONS


PLANS = [_plan(torch.float16, "triton:64x64:w4:s2", "k=168", "d=40")]
