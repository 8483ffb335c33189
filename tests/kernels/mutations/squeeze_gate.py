from vertebra.kernels._triton import squeeze_gate
from vertebra.testing.cases import example

GATE = {
    "forgets the gate": ("GATE(v), mask", "v, mask"),
    "mixes up images": ("fc, n, c, N", "fc, n // 2, c, N"),
    "writes the first channels alone": ("blocks_n * BLOCK_C", "blocks_n * 0"),
    "forgets the activation": ("N, C, R, ACT, IMAGES", "N, C, R, GATE, IMAGES"),
}

# more images than a program owns, more channels too
MANY = example("squeeze_gate", shape=(9, 40, 7, 7))
PLANS = [(squeeze_gate, "_gate_kernel", MANY, 1, GATE)]
