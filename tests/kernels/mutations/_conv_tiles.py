from vertebra.kernels._triton import _conv_tiles
from vertebra.testing.cases import example

PIXELS = {
    "ends a column early": ("tl.maximum(WINDOW[0] * W", "tl.maximum(WINDOW[0] - 1 + 0 * W"),
    "swaps rows and columns": ("[n, p + h, q + w, c]", "[n, p + w, q + h, c]"),
    "forgets the padding of columns": ("s * steps[3] - steps[1]", "s * steps[3]"),
    "takes the bias of the first filters": ("bias_ptr, filters,", "bias_ptr, filters - k,"),
    "adds the residual of the first filters": (
        "residual_desc.load([n, p, q, k])",
        "residual_desc.load([n, p, q, 0])",
    ),
    "never reaches the last row": ("C, WINDOW[1], ", "C, WINDOW[1] + 1, "),
}
PAIRS = {
    "always takes the even rows": ("h & 1, q", "h & 0, q"),
    "takes the other column of a pair": ("(w & 1) * C", "(1 - (w & 1)) * C"),
    "rounds towards zero": ("q + (w >> 1)", "q + (w + 1 >> 1)"),
}
ROWS = {
    "reads the first row of each window": ("[n, p, r, q, c]", "[n, p, 0, q, c]"),
    "walks over weights twice as fast": ("[k, i * BLOCK_C]", "[k, i * 2 * BLOCK_C]"),
    "stays with the first image": ("[n, p, r, q, c]", "[0, p, r, q, c]"),
}
IMAGES = {
    "gates all images by the first": ("x, gate_ptr, n, c, N", "x, gate_ptr, n * 0, c, N"),
    "counts what is outside": ("counts = inside & (", "counts = ("),
    "adds an image to the first of its box": ("((n + i).to", "((n + i * 0).to"),
    "counts the first image only": ("(BOX_P * BOX_Q) == i)", "(BOX_P * BOX_Q) == 0)"),
    "divides by the box": ("mask, P * Q, 1)", "mask, PIXELS, 1)"),
    "takes one run for another": ("run = box % (", "run = box // ("),
}


def _plan(shape, mutations, *steps):
    options = ("triton:tiles", *steps, "scale", "bias", "residual")
    case = example("conv2d_act", shape=shape, options=options)
    return _conv_tiles, "_tiles_kernel", case, 1, mutations


BY_IMAGE = example(
    "conv2d_act_pool",
    shape=(3, 40, 9, 13),
    options=("triton:tiles:2x1x64x64x16:w4:s2", "bias", "gate", "pools"),
)
PLANS = [
    (_conv_tiles, "_tiles_kernel", BY_IMAGE, 1, IMAGES),
    _plan((2, 48, 7, 9), PIXELS, "k=200", "3x3", "pad=2", "dilation=2"),
    _plan((2, 48, 6, 20), PAIRS, "3x3", "pad=1", "stride=2"),
    _plan((2, 48, 6, 20), ROWS, "2x2", "stride=2"),
]
