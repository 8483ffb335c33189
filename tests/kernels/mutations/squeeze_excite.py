from dataclasses import replace

from vertebra.kernels._triton import _fcs, squeeze_excite
from vertebra.testing.cases import example

SQUEEZE = {
    "forgets the mean": ("BLOCK_S) / P", "BLOCK_S)"),
    "reads another row": ("at = r * stride_r", "at = r // 2 * stride_r"),
    "shifts the bias": ("bias_ptr + r, mask", "bias_ptr + r // 2, mask"),
    "stores the sum for s": ("n * C + c, s, mask", "n * C + c, s * P, mask"),
}
SCALE = {
    "mixes up images": ("n = first + tl", "n = first // 2 + tl"),
    "forgets the gate": ("gates = GATE(v)", "gates = v"),
    "keeps v of another split": ("(split == 0)", "(split == 0) & (n < N - 1)[:, None]"),
    "forgets the residual": ("if residual_ptr is not None:", "if False:"),
}
SUMS = {
    "forgets the activation": ("dz *= DACT(z)", "dz *= 1.0"),
    "keeps only the last tile": ("total += dz * x", "total = dz * x"),
    "sums dz": ("total += dz * x", "total += dz"),
}
DHIDDEN = {
    "forgets the gate's derivative": ("dv = DGATE(", "dv = 1.0 + 0.0 * ("),
    "forgets the activation": ("du = DACT(", "du = 1.0 + 0.0 * ("),
    "swaps the weight's strides": ("r * stride_r + c * stride_c", "r * stride_c + c * stride_r"),
}
DWEIGHTS = {
    "forgets the activation": ("N, R, C, ACT,", "N, R, C, IDENTITY,"),
    "swaps the vectors": ("_outer(du_ptr, s_ptr", "_outer(u_ptr, s_ptr"),
    "loses the tail": ("inside = (r < R) & (c < C)", "inside = (r < R) & (c < C - 1)"),
}
DX = {
    "forgets the pixels": ("BLOCK_C) / P", "BLOCK_C)"),
    "forgets the means": ("dz * gate + through_s", "dz * gate"),
    "forgets the activation": ("dz *= DACT(x * gate)", "dz *= 1.0"),
    "mixes up images": ("_of_image(ds, n, image,", "_of_image(ds, n, first,"),
}

# several images a program, more than one program's hidden channels
MANY = example(
    "squeeze_excite",
    shape=(9, 20, 2, 3),
    act="silu",
    layout="nhwc",
    options=("bias", "residual", "gelu", "r=18"),
)
# z recomputed from x, and in the second case two splits of the pixels, the last one ragged
BARE = replace(MANY, options=("bias", "gelu", "r=3"))
SPLIT = replace(BARE, shape=(2, 4, 17, 19), layout="nchw")
PLANS = [
    (_fcs, "_squeeze_kernel", MANY, 1, SQUEEZE),
    (squeeze_excite, "_scale_kernel", MANY, 1, SCALE),
    (squeeze_excite, "_sums_kernel", SPLIT, 1, SUMS),
    (squeeze_excite, "_dhidden_kernel", MANY, 1, DHIDDEN),
    (squeeze_excite, "_dweights_kernel", MANY, 1, DWEIGHTS),
    (squeeze_excite, "_dx_kernel", BARE, 1, DX),
]
