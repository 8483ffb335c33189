"""Two 1x1 convolutions back to back: a tile of the map between them is used while it is on chip.

Maps are matrices of pixels by channels. One program owns BLOCK_M pixels, of which it keeps all C
channels of x in shared memory and all D sums of z in registers. It goes over the K filters in
between BLOCK_K at a time: their sums over C, which is one product, bias, residual and activation
make a tile of y, which is stored, and multiplied with the weights behind it on its way. Loads of
the weights and of the residual run ahead, by tensor descriptors (TMA), which also fill in zeros and
cut off what lies outside.

Pixels are the right operand of both products, filters the left one: the right one is always read
from shared memory, where the compiler puts the tile of y. As a left operand it would come from
registers, of which ptxas up to CUDA 13.3 may overwrite one that is still being read (triton#11781).

    z = next_act(next_weight @ act(weight @ x + bias + residual) + next_bias)
        D x pixels    D x K          K x C    C x pixels

Every program reads both weights, from the L2 cache: at 128 pixels and C = D = K / 4 that is 0.4 to
0.8 of what it moves from and to memory. Programs that stay, and keep their weights in shared
memory, would have room for them up to C = 64; one kernel for the whole bottleneck of that width
would need more (docs/kernels/conv2d_b2b.md).
"""

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._act import ACTIVATIONS
from ._conv import parsed, written
from ._device import Device, facts
from ._launch import launch
from ._tile import load_channels

FROM_SHARED = ("_b2b_kernel",)


class Pair(NamedTuple):
    """Two convolutions, the second of which reads y: what they read and write."""

    y: Tensor
    z: Tensor
    x: Tensor
    weight: Tensor
    residual: Tensor | None
    next_weight: Tensor

    @property
    def widths(self) -> tuple[int, int, int]:
        """C, K and D: channels of x, y and z."""
        return self.x.shape[1], self.y.shape[1], self.z.shape[1]

    @property
    def pixels(self) -> int:
        """N*H*W."""
        return self.x.numel() // self.x.shape[1]


class Config(NamedTuple):
    """A tile of pixels and filters, and how it runs."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


LARGE, SMALL = Config(128, 64, 8, 2), Config(64, 64, 4, 2)
# what else to measure
OTHERS = (Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(128, 128, 8, 2))
_MOST_CHANNELS = 256  # of a box


def fills(pair: Pair) -> bool:
    """Return whether there is a tile of the least size for every multiprocessor."""
    return pair.pixels >= 64 * facts(pair.x.device).processors


def configurations(pair: Pair) -> list[str]:
    """Return the configurations worth measuring, the analytic choice first."""
    device = facts(pair.x.device)
    found = (pick(pair, device), LARGE, SMALL, *OTHERS)
    held = (config for config in found if config is not None and _holds(pair, config, device))
    return [written(config) for config in dict.fromkeys(held)]


def pick(pair: Pair, device: Device) -> Config | None:
    """Choose a tile by arithmetic, None where none fits.

    128 pixels halve what is read of the weights. Up to C = D = 64 two programs share a
    multiprocessor: 126 registers a thread, 96 KiB.
    """
    is_large = pair.pixels >= LARGE.BLOCK_M * device.processors
    fit = (c for c in (LARGE, SMALL)[not is_large :] if _holds(pair, c, device))
    return next(fit, None)


def refuses(pair: Pair, precision: str, configuration: str = "") -> str | None:
    """Return why the kernel does not run a pair, or not in a configuration."""
    device = facts(pair.x.device)
    if device.arch < 90:
        return "tensor descriptors need an NVIDIA GPU of compute capability 9.0"
    if pair.x.dtype == torch.float32 and precision == "ieee":
        return "fp32 is not to be multiplied as TF32"
    for name, width in zip(("C", "D"), (pair.widths[0], pair.widths[2])):
        if width > _MOST_CHANNELS:
            return f"{name} of {width} (up to {_MOST_CHANNELS})"
    for name, t in pair._asdict().items():
        if t is not None and _matrix(t) is None:
            return f"{name} is no matrix of aligned pixels (.to(memory_format=torch.channels_last))"
    if not configuration:
        return None if pick(pair, device) else f"{pair.widths} channels, for which no tile fits"
    config = parsed(Config, configuration)
    if config is None:
        return f"{configuration!r} is no configuration; give its blocks, as in 128x64:w8:s2"
    return None if _holds(pair, config, device) else f"{configuration} does not fit"


def _blocks(widths: tuple[int, int, int]) -> tuple[int, int]:
    """Return BLOCK_C and BLOCK_D, which cover C and D; 64 sums are the least that wgmma makes."""
    C, _, D = (1 << (n - 1).bit_length() for n in widths)
    return max(16, C), max(64, D)


def _holds(pair: Pair, config: Config, device: Device) -> bool:
    """Return whether a program finds room: for its operands, and for its sums.

    Shared memory has x, the weights of all rounds in flight, the residual of all but the running
    one, y to be multiplied, and y to be stored. Sums are of both products.
    """
    block_c, block_d = _blocks(pair.widths)
    BLOCK_M, BLOCK_K, num_warps, num_stages = config
    maps = BLOCK_M * (block_c + BLOCK_K * (2 + (num_stages - 1) * (pair.residual is not None)))
    weights = num_stages * BLOCK_K * (block_c + block_d)
    sums = BLOCK_M * (BLOCK_K + block_d) // (32 * num_warps)
    # sums a thread that compile without spills, beside a residual in as many registers as y
    most = ((160, 96) if BLOCK_M <= 64 else (96, 64))[pair.x.itemsize == 4]
    return (maps + weights) * pair.x.itemsize <= device.shared and sums <= most


def _matrix(t: Tensor) -> Tensor | None:
    """View a map as pixels by channels, in 16-byte steps; None where it is not one."""
    C, (N, H, W) = t.shape[1], (t.shape[0], *t.shape[2:])
    if C > 1 and t.stride(1) != 1:
        return None
    pixels = [(n, t.stride(d)) for n, d in ((W, 3), (H, 2), (N, 0)) if n > 1]
    step = pixels[0][1] if pixels else C
    following = step
    for n, stride in pixels:
        if stride != following:
            return None
        following *= n
    at = t.storage_offset() * t.itemsize if t.is_meta else t.data_ptr()
    if gcd(16, at, step * t.itemsize) < 16:
        return None
    return t.as_strided((N * H * W, C), (step, 1))


@triton.jit
def _b2b_kernel(
    biases,
    sizes,
    ACT: tl.constexpr,
    NEXT_ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    y_desc,
    z_desc,
    x_desc,
    weight_desc,
    residual_desc,
    next_weight_desc,
):
    K, D = sizes
    bias_ptr, next_bias_ptr = biases
    m = tl.program_id(0) * BLOCK_M
    x = x_desc.load([m, 0])
    sums = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    # at least one round, and the compiler knows: else ptxas may serialize the products
    for k in range(0, tl.maximum(K, 1), BLOCK_K):
        filters = (k + tl.arange(0, BLOCK_K))[:, None]
        y = tl.dot(weight_desc.load([k, 0]), x.T, input_precision=PRECISION)
        y += load_channels(bias_ptr, filters, K, tl.float32, 0.0)
        if residual_desc is not None:
            y += residual_desc.load([m, k]).T.to(tl.float32)
        y = ACT(y).to(y_desc.dtype)
        y_desc.store([m, k], y.T)
        # behind the last filter there are weights of 0, and act(0) is finite
        sums = tl.dot(next_weight_desc.load([0, k]), y, sums, input_precision=PRECISION)
    z = sums + load_channels(next_bias_ptr, tl.arange(0, BLOCK_D)[:, None], D, tl.float32, 0.0)
    z_desc.store([m, 0], NEXT_ACT(z).to(z_desc.dtype).T)


def forward(
    pair: Pair,
    biases: tuple[Tensor | None, Tensor | None],
    acts: tuple[str, str],
    precision: str,
    configuration: str,
) -> None:
    """Write y and z."""
    reason = refuses(pair, precision, configuration)
    if reason is not None:
        raise NotImplementedError(f"conv2d_b2b cannot run as one kernel: {reason}")
    device = facts(pair.x.device)
    config = parsed(Config, configuration) or pick(pair, device)
    assert config is not None
    # left to itself, ptxas makes do with 80 of them for an sm_100, and spills; for an sm_90 with
    # 126, so that two programs share a multiprocessor
    registers = {"maxnreg": 255} if device.arch >= 100 else {}
    (block_c, block_d), (_, K, D) = _blocks(pair.widths), pair.widths
    act, next_act = (ACTIVATIONS[name][0] for name in acts)
    launch(
        _b2b_kernel,
        (triton.cdiv(pair.pixels, config.BLOCK_M),),
        pair.x.device,
        biases=biases,
        sizes=(K, D),
        ACT=act,
        NEXT_ACT=next_act,
        PRECISION=precision if pair.x.dtype == torch.float32 else None,
        **config._asdict(),
        **registers,
        BLOCK_D=block_d,
        y_desc=_described(pair.y, (config.BLOCK_M, config.BLOCK_K)),
        z_desc=_described(pair.z, (config.BLOCK_M, block_d)),
        x_desc=_described(pair.x, (config.BLOCK_M, block_c)),
        weight_desc=_described(pair.weight, (config.BLOCK_K, block_c)),
        residual_desc=_described(pair.residual, (config.BLOCK_M, config.BLOCK_K)),
        next_weight_desc=_described(pair.next_weight, (block_d, config.BLOCK_K)),
    )


def _described(t: Tensor | None, box: tuple[int, int]) -> TensorDescriptor | None:
    matrix = None if t is None else _matrix(t)
    if matrix is None:
        return None
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(box))
