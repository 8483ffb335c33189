from vertebra.kernels._triton import _affine
from vertebra.testing.cases import example

APPLY = {
    "drops the residual": ("z += load_tile(residual_ptr", "z += 0 * load_tile(residual_ptr"),
    "shifts the channel": ("load_channels(scale_ptr, c, C", "load_channels(scale_ptr, c // 2, C"),
    "loses the tail": ("(m < M) & (c < C)", "(m < M - 1) & (c < C)"),
}
BACKWARD = {
    "forgets the activation": ("dz *= DACT(z)", "dz *= 1.0"),
    "counts rstd twice": ("tile, dz * slope,", "tile, dz * slope * rstd,"),
    "forgets the mean": ("sum_dz_deviation += dz * deviation", "sum_dz_deviation += dz * x"),
}

EVAL = example(
    "scale_bias_act",
    shape=(2, 12, 5, 7),
    act="silu",
    layout="nhwc",
    options=("affine", "stats", "residual"),
)
PLANS = [
    (_affine, "_apply_kernel", EVAL, 2, APPLY),
    (_affine, "_backward_kernel", EVAL, 2, BACKWARD),
]
