from vertebra.kernels._triton import drop_path_add
from vertebra.testing.cases import example

FORWARD = {
    "drops the residual": ("out += load_tile(residual_ptr", "out += 0 * load_tile(residual_ptr"),
    "drops the residual with the branch": (
        "load_tile(residual_ptr, strides[2], tile",
        "load_tile(residual_ptr, strides[2], branch",
    ),
    "keeps every sample": ("kept & (c < C)", "(m < M) & (c < C)"),
    "forgets the scale": (
        "load_channels(gamma_ptr, c, C, ACC, 1.0) * scale",
        "load_channels(gamma_ptr, c, C, ACC, 1.0)",
    ),
    "forgets gamma": ("ACC, 1.0) * scale", "ACC, 1.0) * 0 + scale"),
    "loses the tail": ("tile = (sizes, m, c, (m < M)", "tile = (sizes, m, c, (m < M - 1)"),
}
BACKWARD = {
    "keeps every sample": ("branch = (sizes, m, c, kept", "branch = (sizes, m, c, (m < stop)"),
    "leaves dx of a dropped sample unwritten": (
        "store_tile(dx_ptr, strides[0], tile",
        "store_tile(dx_ptr, strides[0], branch",
    ),
    "forgets the scale of dgamma": (
        "over_pixels(sum_dout_x, CHANNELS_LAST) * scale",
        "over_pixels(sum_dout_x, CHANNELS_LAST)",
    ),
    "sums dout alone": ("sum_dout_x += dout * x", "sum_dout_x += dout"),
    "forgets the scale of dx": ("ACC, 1.0) * scale", "ACC, 1.0)"),
}

# several splits; tiles that cross the borders of samples
CROSSING = example("drop_path_add", shape=(5, 12, 9, 13), layout="nhwc")
PLANS = [
    (drop_path_add, "_drop_path_add_kernel", CROSSING, 1, FORWARD),
    (drop_path_add, "_drop_path_backward_kernel", CROSSING, 1, BACKWARD),
]
