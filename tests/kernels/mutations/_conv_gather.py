from vertebra.kernels._triton import _conv_gather
from vertebra.testing.cases import example

WALK = {
    "loses the last channels": ("tl.cdiv(C, BLOCK_C), 1)", "(C // BLOCK_C), 1)"),
    "reads the next row for padding": (" & (j < W)", ""),
    "steps over rows without dilation": ("r * step_r + s", "r * strides[1][2] + s"),
    "gives every group the first one's channels": (
        "column // blocks_k * bundle_c, column",
        "column // blocks_k * 0, column",
    ),
    "never reaches the last row": ("s >= WINDOW[1]", "s > WINDOW[1]"),
}
BUNDLE = {
    "lets a filter see its neighbours' channels": (
        "(c[:, None] >= own[None, :]) & (c",
        "(c[:, None] >= 0) & (c",
    ),
    "reads weights of a group where its filters are": ("weight_ptrs -= own[None, :]", "pass"),
    "ends before the last bundle": ("tl.cdiv(all_k, bundle_k)", "(all_k // bundle_k)"),
}

IMAGES = {
    "gates all images by the first": ("gate_ptr + image * all_c", "gate_ptr + 0 * all_c"),
    "counts places in vain": ("inside & (m // RUN == run)", "(m // RUN == run)"),
    "divides by the places": ("(run < runs), P * Q, 0)", "(run < runs), pixels, 0)"),
    "stores all runs over the first": ("pixels // RUN + i", "pixels // RUN"),
    "writes the first image alone": ("image + m * 0", "m * 0"),
    "gates by the first channels": ("(first_c + c0 + c)", "(first_c + c)"),
}

OPTIONS = ("groups=2", "3x3", "pad=2", "dilation=2", "stride=2", "scale", "bias", "residual")
DILATED = example("conv2d_act", shape=(2, 80, 7, 9), options=OPTIONS)
# 10 groups of 4: one bundle of 8, and two more
NARROW = example("conv2d_act", shape=(1, 40, 6, 5), options=("groups=10", "3x3", "pad=1", "bias"))
# two tiles of two runs an image, the last of which is empty
BY_IMAGE = example(
    "conv2d_act_pool",
    shape=(2, 40, 11, 13),
    options=("triton:gather:128x32x16x1:w4:s2", "bias", "gate", "pools"),
)
PLANS = [
    (_conv_gather, "_gather_kernel", BY_IMAGE, 1, IMAGES),
    (_conv_gather, "_gather_kernel", DILATED, 1, WALK),
    (_conv_gather, "_gather_kernel", NARROW, 1, BUNDLE),
]
