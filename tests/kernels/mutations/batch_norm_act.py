from vertebra.kernels._triton import _moments, batch_norm_act
from vertebra.testing.cases import example

MOMENTS = {
    "counts every lane alike": (
        "count = tl.maximum(count, 0).to(ACC)",
        "count = tl.maximum(count * 0 + tl.cdiv(stop - start, BLOCK_M), 0).to(ACC)",
    ),
    "updates past the end": ("delta = tl.where(m < stop, x - mean, 0.0)", "delta = x - mean"),
    "merges M2 without the means": ("m2 + count * (mean - merged) * (mean - merged)", "m2"),
}
MERGE = {
    "weighs the last split as the others": (
        "count = tl.minimum(M - s * split_m, split_m)",
        "count = (s * 0 + split_m)",
    ),
    "tracks the biased variance": ("m2 / (M - 1)", "m2 / M"),
    "swaps old and new": (
        "(1.0 - momentum) * old + momentum * statistic",
        "momentum * old + (1.0 - momentum) * statistic",
    ),
}
DX = {
    "forgets E[dz]": ("dz - dbias - deviation * dweight", "dz - deviation * dweight"),
    "forgets the projection": ("dz - dbias - deviation * dweight", "dz - dbias"),
    "forgets the activation": ("dz *= DACT(deviation * slope + bias)", "dz *= 1.0"),
}

# two splits of two tiles, the last one ragged
BN = example("batch_norm_act", shape=(3, 4, 13, 21), act="silu", options=("affine", "stats"))
PLANS = [
    (_moments, "_moments_kernel", BN, 1, MOMENTS),
    (_moments, "_merge_kernel", BN, 1, MERGE),
    (batch_norm_act, "_dx_kernel", BN, 1, DX),
]
