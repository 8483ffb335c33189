from vertebra.kernels._triton import global_response_norm
from vertebra.testing.cases import example

RESPONSE = {
    "forgets the root": ("        total += g\n", "        total += g * g\n"),
    "keeps only the last channels of the mean": ("        total += g\n", "        total = g\n"),
    "divides by a sum": ("tl.sum(total) / C", "tl.sum(total)"),
    "forgets x itself": ("slope = 1.0 + ", "slope = "),
    "stores the square": ("tl.store(g_ptr + n * C + c, g,", "tl.store(g_ptr + n * C + c, g * g,"),
}
BACKWARD = {
    "forgets the mean's gradient": (
        "dg = weight * t * rscale - shared",
        "dg = weight * t * rscale",
    ),
    "divides by the mean once": ("/ C * rscale * rscale", "/ C * rscale"),
    "keeps only the last channels of a sum": ("sum_g_dr += g * dr", "sum_g_dr = g * dr"),
    "sums the products for dbias": ("image_sum(sums_ptr, N + n,", "image_sum(sums_ptr, n,"),
    "forgets r in dweight": ("r * t, mask", "t, mask"),
    "forgets the norm in dx": (" dg / tl.where(g == 0.0, 1.0, g)", " dg"),
}

# three splits an image, and with them more channels than a program holds at once
WIDE = example("global_response_norm", shape=(2, 600, 3, 7), layout="nhwc")
PLANS = [
    (global_response_norm, "_response_kernel", WIDE, 100, RESPONSE),
    (global_response_norm, "_response_backward_kernel", WIDE, 100, BACKWARD),
]
