from vertebra.kernels._triton import _per_image, _pool
from vertebra.testing.cases import example

POOL = {
    "loses the last pixel": ("(m < stop)", "(m < stop - 1)"),
    "walks half a split": ("start + split_p, n", "start + split_p // 2, n"),
    "keeps only the last tile": ("first += summands[0]", "first = summands[0]"),
    "keeps only the last tile of the second sum": (
        "second += summands[1]",
        "second = summands[1]",
    ),
    "writes the second sum over the first": ("row += tl.num_programs(0) // blocks_c", "row += 0"),
}
COMBINE = {
    "takes the first image's coefficients": (
        "image = n.to(tl.int64) * C",
        "image = n.to(tl.int64) * 0",
    ),
    "takes the first slope for all": ("slopes[i] + image", "slopes[0] + image"),
    "forgets the bias": ("y += load_channels(bias_ptr, c, C, ACC, 0.0)", "y += 0.0"),
    "loses the last pixel": ("(m < n * P + P)", "(m < n * P + P - 1)"),
}

# an image is two splits of two tiles, the last one ragged
SPLIT = example("global_response_norm", shape=(4, 4, 29, 29), layout="nhwc")
PLANS = [
    (_pool, "_pool_kernel", SPLIT, 1, POOL),
    (_per_image, "_combine_kernel", SPLIT, 1, COMBINE),
]
