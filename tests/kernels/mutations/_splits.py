from vertebra.kernels._triton import _splits
from vertebra.testing.cases import example

ADD_SPLITS = {
    "loses the last split": ("(s < splits)", "(s < splits - 1)"),
    "swaps the sums": ("(i * splits + s) * C", "((1 - i) * splits + s) * C"),
    "keeps only the last block of splits": ("total += tl.load", "total = tl.load"),
}
# 150 splits, more than one block of them
MANY = example("scale_bias_act", shape=(3, 4, 113, 113), layout="nhwc", options=("affine", "stats"))
PLANS = [(_splits, "_add_splits_kernel", MANY, 64, ADD_SPLITS)]
