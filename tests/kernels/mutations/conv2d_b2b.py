import torch

from vertebra.kernels._triton import conv2d_b2b
from vertebra.testing.cases import example

MUTATIONS = {
    "multiplies the first channels again": (
        "next_weight_desc.load([0, k])",
        "next_weight_desc.load([0, 0])",
    ),
    "takes the first filters again": ("weight_desc.load([k, 0]), h", "weight_desc.load([0, 0]), h"),
    "adds the residual of the first filters": (
        "residual_desc.load([n, p, q, k])",
        "residual_desc.load([n, p, q, 0])",
    ),
    "takes the bias of the first filters": ("bias_ptr, filters,", "bias_ptr, filters - k,"),
    "leaves the last filters out": ("tl.maximum(K, 1)", "tl.maximum(K - BLOCK_K, 1)"),
    "forgets the second bias": ("z = sums + load", "z = sums + 0 * load"),
    "multiplies before the activation": (", y, sums,", ", (y + y).to(y_desc.dtype), sums,"),
    "stores the first pixels again": ("y_desc.store([n, p, q, k]", "y_desc.store([n, p, q * 0, k]"),
}
MID = {
    "swaps rows and columns": ("p + r - 1, q + s - 1, b]", "p + s - 1, q + r - 1, b]"),
    "forgets the padding of columns": ("q + s - 1, b]", "q + s, b]"),
    "ends a column early": ("tl.maximum(9 * tl", "tl.maximum(6 * tl"),
    "reads the first channels again": ("s - 1, b]", "s - 1, 0]"),
    "walks over weights twice as fast": ("[0, i * BLOCK_B]", "[0, i * 2 * BLOCK_B]"),
    "never reaches the last row": ("b, B, 3, BLOCK_B", "b, B, 4, BLOCK_B"),
    "forgets the bias of the 3x3": ("of_mid += load", "of_mid += 0 * load"),
    "takes the other activation": ("MID_ACT(of_mid)", "ACT(of_mid)"),
    "stays with the first images": ("* BOX[0]", "* 0"),
    "takes one row of boxes for all": ("// boxes_q % boxes_p", "% boxes_p"),
    "adds the residual of the first images": ("load([n, p, q, k])", "load([0, p, q, k])"),
    "stores z of the first rows": ("z_desc.store([n, p, q, 0]", "z_desc.store([n, 0, q, 0]"),
}


def _plan(mutations, shape, *options):
    options = ("triton:64x64:w4:s2", *options, "bias", "residual")
    case = example("conv2d_b2b", shape=shape, dtype=torch.float16, options=options)
    return conv2d_b2b, "_b2b_kernel", case, 1, mutations


PLANS = [
    _plan(MUTATIONS, (2, 24, 7, 9), "k=168", "d=40"),
    # four boxes an image, of which three end outside; three blocks of channels
    _plan(MID, (2, 48, 15, 15), "mid=40", "before=silu", "k=72", "d=40"),
]
