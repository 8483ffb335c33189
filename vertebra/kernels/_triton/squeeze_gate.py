"""The gate of a squeeze and excitation, from what its pool left in parts: the kernels.

    s = sum of shares    u = W1 s + b1    g = gate(W2 act(u) + b2)

Two launches: `squeeze` of `_fcs`, which adds up the parts on its way, and `_gate_kernel`,
whose program owns BLOCK_C channels of IMAGES images. The second fc has a launch of its own, as who
reads the gate are programs of a convolution, each of which needs all of it.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._act import ACTIVATIONS, GATES
from ._fcs import PARTIALS, matrix, project, squeeze
from ._launch import launch

REGISTERS = {"_gate_kernel": 128}


@triton.jit
def _gate_kernel(
    g_ptr,
    u_ptr,
    fc,
    N,
    C,
    R,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    IMAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_n = tl.cdiv(N, IMAGES)  # neighbours read the same weights
    n = tl.program_id(0) % blocks_n * IMAGES + tl.arange(0, IMAGES).to(tl.int64)
    c = tl.program_id(0) // blocks_n * BLOCK_C + tl.arange(0, BLOCK_C)
    v = project(u_ptr, fc, n, c, N, C, R, ACT, IMAGES, CHUNK, BLOCK_C)
    inside = (n < N)[:, None] & (c < C)[None, :]
    tl.store(g_ptr + n[:, None] * C + c[None, :], GATE(v), mask=inside)


def forward(
    g: Tensor,
    shares: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: str,
    gate: str,
) -> None:
    """Write g."""
    fc1, fc2 = matrix(fc1_weight), matrix(fc2_weight)
    (N, C), R = g.shape, fc1.shape[0]
    u = g.new_empty(N, R)
    squeeze(u, None, shares.flatten(0, 1), fc1, fc1_bias, 1)
    # 8 images share a weight; 16 channels by 32 hidden ones of each fill 32 registers of 4 warps
    images, block_c = min(8, triton.next_power_of_2(N)), min(16, triton.next_power_of_2(C))
    partials = PARTIALS[g.dtype] // 4
    chunk = min(triton.next_power_of_2(R), partials // (images * block_c))
    launch(
        _gate_kernel,
        (triton.cdiv(N, images) * triton.cdiv(C, block_c),),
        g.device,
        g_ptr=g,
        u_ptr=u,
        fc=(fc2, fc2_bias, *fc2.stride()),
        N=N,
        C=C,
        R=R,
        ACT=ACTIVATIONS[act][0],
        GATE=GATES[gate][0],
        IMAGES=images,
        CHUNK=chunk,
        BLOCK_C=block_c,
        num_warps=4,
    )
