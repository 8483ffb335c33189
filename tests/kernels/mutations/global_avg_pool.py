from vertebra.kernels._triton import _per_image, global_avg_pool
from vertebra.testing.cases import example

MEAN = {
    "gives the sum": ("BLOCK_S) / P", "BLOCK_S)"),
    "gives the first image": ("image_sum(sums_ptr, n,", "image_sum(sums_ptr, n * 0,"),
    "loses the last channel block": ("mask=c < C", "mask=c < C // BLOCK_C * BLOCK_C"),
}
NORM = {
    "keeps only the last channels of the mean": ("        total += image", "        total = image"),
    "counts lanes past the end": (
        "tl.where(c < C, deviation * deviation, 0.0)",
        "deviation * deviation",
    ),
    "forgets the mean": ("BLOCK_S) / P - mean) * rstd", "BLOCK_S) / P) * rstd"),
    "normalises by the variance": ("1.0 / tl.sqrt(tl.sum(total)", "1.0 / (tl.sum(total)"),
    "saves y": ("phat_ptr + n * C + c, phat,", "phat_ptr + n * C + c, y,"),
}
NORM_BACKWARD = {
    "forgets the mean": ("dphat - mean - phat", "dphat - phat"),
    "forgets the projection": ("dphat - mean - phat * projection", "dphat - mean"),
    "keeps only the last channels of a sum": ("sum_dphat_phat += ", "sum_dphat_phat = "),
    "swaps the parts": ("parts_ptr + row + c, dy * phat,", "parts_ptr + row + c, dy,"),
}
SPREAD = {
    "spreads a sum and not a mean": ("ACC, 0.0) / P", "ACC, 0.0)"),
    "spreads over the pixels of a tile": ("ACC, 0.0) / P", "ACC, 0.0) / BLOCK_M"),
    "spreads the first image": ("spread_ptr + image", "spread_ptr + image * 0"),
}

# three splits an image, and with them more channels than a program holds at once
WIDE = example("global_avg_pool", shape=(2, 600, 3, 7), layout="nhwc")
BARE = example("global_avg_pool", shape=(2, 600, 3, 7), layout="nhwc", options=())
MANY = example("global_avg_pool", shape=(2, 2100, 2, 1), layout="nhwc")
PLANS = [
    (global_avg_pool, "_mean_kernel", BARE, 100, MEAN),
    (global_avg_pool, "_norm_kernel", WIDE, 100, NORM),
    (global_avg_pool, "_norm_backward_kernel", MANY, 2, NORM_BACKWARD),
    (_per_image, "_combine_kernel", BARE, 100, SPREAD),
]
