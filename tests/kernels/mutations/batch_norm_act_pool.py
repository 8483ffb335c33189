from vertebra.kernels._triton import batch_norm_act_pool
from vertebra.testing.cases import example

MAX_POOL = {
    "keeps the row above": ("key, x, at = _row(source, below", "_, _, at = _row(source, below"),
    "reads one column for another": ("c, right, CHANNELS_LAST", "c, 2 * j, CHANNELS_LAST"),
    "forgets to renumber the kept row": ("at -= 6", "at -= 3"),
    "loses the row below": ("below = tl.minimum(2 * i + 1,", "below = tl.minimum(2 * i,"),
}
UNPOOL = {
    "forgets the window across": (" + _to(across, 0)", ""),
    "takes a place of another window": ("_to(right, 3)", "_to(right, 5)"),
    "takes a place of its own from below": ("_to(below, 1)", "_to(below, 7)"),
    "keeps the windows above": ("here = below", "here = here"),
    "forgets E[dz]": ("load_channels(sums[1], c, C, ACC, 0.0) / (N * H * W)", "mean * 0.0"),
}

# walks of several rows; the last window of a row has no right column, the last row none below
STEM = example("batch_norm_act_pool", shape=(2, 3, 85, 5), layout="nhwc")
PAIRS = example("batch_norm_act_pool", shape=(2, 3, 85, 6))
PLANS = [
    (batch_norm_act_pool, "_max_pool_kernel", STEM, 1, MAX_POOL),
    (batch_norm_act_pool, "_unpool_kernel", PAIRS, 1, UNPOOL),
]
