from vertebra.kernels._triton import layer_norm_2d
from vertebra.testing.cases import example

WHOLE = {
    "divides by the tile's channels": (
        "over_channels(deviation * deviation, CHANNELS_LAST) / C",
        "over_channels(deviation * deviation, CHANNELS_LAST) / BLOCK_C",
    ),
    "counts lanes past the end": ("tl.where(c < C, x - mean, 0.0)", "x - mean"),
    "corrects y and not the mean": ("mean += rest", "mean += 0.01"),
    "saves the variance": (
        "store_statistics(statistics, mean, rstd",
        "store_statistics(statistics, mean, 1 / rstd",
    ),
}
WALK = {
    "counts every lane alike": (
        "tl.cdiv(C - j, BLOCK_C)",
        "tl.cdiv(C - 0 * j, BLOCK_C)",
    ),
    "updates past the end": ("tl.where(c < C, x - means, 0.0)", "x - means"),
    "merges M2 without the means": ("m2s += count * means * means", "m2s += 0"),
    "loses the last pixel": (
        "        weight = load_channels(weight_ptr, c, C, ACC, 1.0)",
        "        tile = (sizes, m, c, (m < M - 1) & (c < C))\n"
        "        weight = load_channels(weight_ptr, c, C, ACC, 1.0)",
    ),
}
WHOLE_BACKWARD = {
    "forgets the mean of the gradient": ("wdy - mean_wdy - xhat", "wdy - xhat"),
    "projects without the weight": (
        "over_channels(wdy * xhat, CHANNELS_LAST)",
        "over_channels(dy * xhat, CHANNELS_LAST)",
    ),
    "keeps the last tile's share only": ("dbias += dy\n", "dbias = dy\n"),
    "skips a tile": ("t in range(tl.program_id(0),", "t in range(2 * tl.program_id(0),"),
}
WALK_BACKWARD = {
    "adds to what nobody wrote": ("later = (c < C) & (t != tl.program_id(0))", "later = c < C"),
    "forgets the earlier tiles": (
        "later = (c < C) & (t != tl.program_id(0))",
        "later = (c < C) & (t != t)",
    ),
    "swaps the sums": (
        "dbias_ptr = dweight_ptr + tl.num_programs(0) * C",
        "dbias_ptr = dweight_ptr\n                dweight_ptr = dbias_ptr + tl.num_programs(0) * C",
    ),
    "forgets the projection": ("mean_wdy - xhat * mean_wdy_xhat", "mean_wdy"),
}

# more tiles than programs, a ragged last tile, channels that do not fill theirs
SMALL = example("layer_norm_2d", shape=(2, 12, 13, 13), layout="nhwc")
WIDE = example("layer_norm_2d", shape=(1, 180, 9, 8))
WIDER = example("layer_norm_2d", shape=(1, 280, 2, 4))
PLANS = [
    (layer_norm_2d, "_whole_kernel", SMALL, 1, WHOLE),
    (layer_norm_2d, "_walk_kernel", WIDER, 1, WALK),
    (layer_norm_2d, "_whole_backward_kernel", SMALL, 1, WHOLE_BACKWARD),
    (layer_norm_2d, "_walk_backward_kernel", WIDE, 1, WALK_BACKWARD),
]
