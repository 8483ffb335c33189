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

OPTIONS = ("groups=2", "3x3", "pad=2", "dilation=2", "stride=2", "scale", "bias", "residual")
DILATED = example("conv2d_act", shape=(2, 80, 7, 9), options=OPTIONS)
# 10 groups of 4: one bundle of 8, and two more
NARROW = example("conv2d_act", shape=(1, 40, 6, 5), options=("groups=10", "3x3", "pad=1", "bias"))
PLANS = [
    (_conv_gather, "_gather_kernel", DILATED, 1, WALK),
    (_conv_gather, "_gather_kernel", NARROW, 1, BUNDLE),
]
