"""Two 1x1 convolutions back to back: a tile of the map between them is used while it is on chip.

One program owns BLOCK_M pixels, of which it keeps all C channels of h, which is x unless there is a
3x3 in front, in shared memory and all D sums of z in registers. It goes over the K filters in
between BLOCK_K at a time: their sums over C, which is one product, bias, residual and activation
make a tile of y, which is stored, and multiplied with the weights behind it on its way. Loads of
the weights and of the residual run ahead, by tensor descriptors (TMA), which also fill in zeros and
cut off what lies outside.

Pixels are the right operand of both products, filters the left one: the right one is always read
from shared memory, where the compiler puts the tile of y. As a left operand it would come from
registers, of which ptxas up to CUDA 13.3 may overwrite one that is still being read (triton#11781).

    z = next_act(next_weight @ act(weight @ h + bias + residual) + next_bias)
        D x pixels    D x K          K x C    C x pixels

Maps are matrices of pixels by channels, BLOCK_M pixels of which follow each other; or, if there is
a 3x3 in front, images, and the pixels a box of images, rows and columns. It is then shifted to each
of the nine taps, as in `_conv_tiles`, and the sums of those become h: rounded and, as y, the right
operand of the next product. Its loads have their own stages, in the shared memory that the rest
needs later.

Every program reads all weights, from the L2 cache: of the two 1x1s, at 128 pixels and C = D =
K / 4, that is 0.4 to 0.8 of what it moves from and to memory. Programs that stay, and keep their
weights in shared memory, would have room for those up to C = 64. What a 3x3 adds to it:
docs/kernels/conv2d_b2b.md.
"""

from math import gcd, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._act import ACTIVATIONS
from ._conv import Site, parsed, written
from ._conv_tiles import advanced, box_of, described
from ._device import Device, facts
from ._launch import launch
from ._tile import load_channels

FROM_SHARED = ("_b2b_kernel",)


class Pair(NamedTuple):
    """Two convolutions, the second of which reads y: what they read and write.

    With a `mid_weight`, and a 3x3 in front of them, which reads x for them.
    """

    y: Tensor
    z: Tensor
    x: Tensor
    mid_weight: Tensor | None
    weight: Tensor
    residual: Tensor | None
    next_weight: Tensor

    @property
    def widths(self) -> tuple[int, int, int]:
        """C, K and D: channels of h, y and z."""
        return self.weight.shape[1], self.y.shape[1], self.z.shape[1]

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
    if pair.mid_weight is not None:
        if not pair.mid_weight.is_contiguous(memory_format=torch.channels_last):
            return "mid_weight is not dense in channels_last"
        if (block_b := _block_b(pair)) < 16:  # a product takes no fewer
            return f"{pair.x.shape[1]} channels of x leave blocks of {block_b}"
    if not configuration:
        return None if pick(pair, device) else f"{pair.widths} channels, for which no tile fits"
    config = parsed(Config, configuration)
    if config is None:
        return f"{configuration!r} is no configuration; give its blocks, as in 128x64:w8:s2"
    return None if _holds(pair, config, device) else f"{configuration} does not fit"


def _block_b(pair: Pair) -> int:
    """Return BLOCK_B, which divides the channels of x: 128 bytes of them are a round of the 3x3."""
    return gcd(pair.x.shape[1], 128 // pair.x.itemsize)


def _blocks(pair: Pair) -> tuple[int, int]:
    """Return BLOCK_C and BLOCK_D, which cover C and D; 64 sums are the least that wgmma makes."""
    C, _, D = (1 << (n - 1).bit_length() for n in pair.widths)
    return max(16 if pair.mid_weight is None else 64, C), max(64, D)


def _shared(pair: Pair, config: Config) -> int:
    """Return the bytes of shared memory that the two 1x1s take.

    They are of h, the weights of all rounds in flight, the residual of all but the running one, y
    to be multiplied, and y to be stored.
    """
    block_c, block_d = _blocks(pair)
    BLOCK_M, BLOCK_K, _, num_stages = config
    maps = BLOCK_M * (block_c + BLOCK_K * (2 + (num_stages - 1) * (pair.residual is not None)))
    weights = num_stages * BLOCK_K * (block_c + block_d)
    return (maps + weights) * pair.x.itemsize


def _mid_stages(pair: Pair, config: Config) -> int:
    """Return the rounds of the 3x3 in flight: 2 to 4, as the memory of what follows has room."""
    return max(2, min(4, _shared(pair, config) // _mid_round(pair, config)))


def _mid_round(pair: Pair, config: Config) -> int:
    """Return the bytes that one round of the 3x3 multiplies."""
    return (config.BLOCK_M + _blocks(pair)[0]) * _block_b(pair) * pair.x.itemsize


def _holds(pair: Pair, config: Config, device: Device) -> bool:
    """Return whether a program finds room: for its operands, and for its sums.

    Sums are of both products; those of a 3x3 are gone by then.
    """
    block_c, block_d = _blocks(pair)
    BLOCK_M, BLOCK_K, num_warps, _ = config
    shared, filters = _shared(pair, config), BLOCK_K + block_d
    if pair.mid_weight is not None:
        shared = max(shared, 2 * _mid_round(pair, config))
        filters = max(filters, block_c)
    # sums a thread that compile without spills, beside a residual in as many registers as y
    most = ((160, 96) if BLOCK_M <= 64 else (96, 64))[pair.x.itemsize == 4]
    return shared <= device.shared and BLOCK_M * filters // (32 * num_warps) <= most


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


Image = tuple[int, int, int]


def _boxes(pair: Pair, pixels: int) -> tuple[Image, Image]:
    """Return the images, rows and columns that maps have, and boxes of `pixels` of them.

    Where every pixel is for itself, all are one row.
    """
    if pair.mid_weight is None:
        return (1, 1, pair.pixels), (1, 1, pixels)
    N, _, H, W = pair.x.shape
    mid = Site(pair.y, pair.x, pair.mid_weight, None, (1, 1), (1, 1), (1, 1), 1)
    return (N, H, W), box_of(mid, pixels)


@triton.jit
def _b2b_kernel(
    biases,
    sizes,
    MID_ACT: tl.constexpr,
    ACT: tl.constexpr,
    NEXT_ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    VIEW: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MID_STAGES: tl.constexpr,
    y_desc,
    z_desc,
    x_desc,
    mid_weight_desc,
    weight_desc,
    residual_desc,
    next_weight_desc,
):
    P, Q, B, C, K, D = sizes
    mid_bias_ptr, bias_ptr, next_bias_ptr = biases
    boxes_q, boxes_p = tl.cdiv(Q, BOX[2]), tl.cdiv(P, BOX[1])
    q = tl.program_id(0) % boxes_q * BOX[2]
    p = tl.program_id(0) // boxes_q % boxes_p * BOX[1]
    n = tl.program_id(0) // (boxes_q * boxes_p) * BOX[0]

    # in all loops at least one round, and the compiler knows: else ptxas may serialize the products
    if VIEW == "matrix":
        h = x_desc.load([n, p, q, 0]).reshape(BLOCK_M, BLOCK_C).T
    else:
        of_mid = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
        r, s, b = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
        for i in tl.range(tl.maximum(9 * tl.cdiv(B, BLOCK_B), 1), num_stages=MID_STAGES):
            x = x_desc.load([n, p + r - 1, q + s - 1, b]).reshape(BLOCK_M, BLOCK_B).T
            mid_weight = mid_weight_desc.load([0, i * BLOCK_B])
            of_mid = tl.dot(mid_weight, x, of_mid, input_precision=PRECISION)
            r, s, b = advanced(r, s, b, B, 3, BLOCK_B)
        channels = tl.arange(0, BLOCK_C)[:, None]
        of_mid += load_channels(mid_bias_ptr, channels, C, tl.float32, 0.0)
        # behind the last channel and the last filter there are weights of 0, and act(0) is finite
        h = MID_ACT(of_mid).to(x_desc.dtype)

    sums = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    for k in range(0, tl.maximum(K, 1), BLOCK_K):
        filters = (k + tl.arange(0, BLOCK_K))[:, None]
        y = tl.dot(weight_desc.load([k, 0]), h, input_precision=PRECISION)
        y += load_channels(bias_ptr, filters, K, tl.float32, 0.0)
        if residual_desc is not None:
            residual = residual_desc.load([n, p, q, k]).reshape(BLOCK_M, BLOCK_K)
            y += residual.T.to(tl.float32)
        y = ACT(y).to(y_desc.dtype)
        y_desc.store([n, p, q, k], y.T.reshape(BOX[0], BOX[1], BOX[2], BLOCK_K))
        sums = tl.dot(next_weight_desc.load([0, k]), y, sums, input_precision=PRECISION)
    z = sums + load_channels(next_bias_ptr, tl.arange(0, BLOCK_D)[:, None], D, tl.float32, 0.0)
    z = NEXT_ACT(z).to(z_desc.dtype).T
    z_desc.store([n, p, q, 0], z.reshape(BOX[0], BOX[1], BOX[2], BLOCK_D))


def forward(
    pair: Pair,
    biases: tuple[Tensor | None, ...],
    acts: tuple[str, ...],
    precision: str,
    configuration: str,
) -> None:
    """Write y and z; `biases` and `acts` are of the convolutions in order, the 3x3's too."""
    reason = refuses(pair, precision, configuration)
    if reason is not None:
        raise NotImplementedError(f"conv2d_b2b cannot run as one kernel: {reason}")
    device = facts(pair.x.device)
    config = parsed(Config, configuration) or pick(pair, device)
    assert config is not None
    # left to itself, ptxas makes do with 80 of them for an sm_100, and spills; for an sm_90 with
    # 126, so that two programs share a multiprocessor
    registers = {"maxnreg": 255} if device.arch >= 100 else {}
    block_c, block_d = _blocks(pair)
    block_b, stages, taps = 0, 0, None
    if pair.mid_weight is not None:
        block_b, stages = _block_b(pair), _mid_stages(pair, config)
        taps = described(pair.mid_weight.permute(0, 2, 3, 1).flatten(1), (block_c, block_b))
    image, box = _boxes(pair, config.BLOCK_M)
    mid_act, act, next_act = (ACTIVATIONS[name][0] for name in acts)

    def boxes(t: Tensor | None, channels: int) -> TensorDescriptor | None:
        matrix = None if t is None else _matrix(t)
        return None if matrix is None else described(matrix.unflatten(0, image), (*box, channels))

    launch(
        _b2b_kernel,
        (prod(triton.cdiv(n, size) for n, size in zip(image, box)),),
        pair.x.device,
        biases=biases,
        sizes=(*image[1:], pair.x.shape[1], *pair.widths),
        MID_ACT=mid_act,
        ACT=act,
        NEXT_ACT=next_act,
        PRECISION=precision if pair.x.dtype == torch.float32 else None,
        VIEW="matrix" if taps is None else "images",
        BOX=box,
        **config._asdict(),
        **registers,
        BLOCK_B=block_b,
        BLOCK_C=block_c,
        BLOCK_D=block_d,
        MID_STAGES=stages,
        y_desc=boxes(pair.y, config.BLOCK_K),
        z_desc=boxes(pair.z, block_d),
        x_desc=boxes(pair.x, block_b or block_c),
        mid_weight_desc=taps,
        weight_desc=described(pair.weight.flatten(1), (config.BLOCK_K, block_c)),
        residual_desc=boxes(pair.residual, config.BLOCK_K),
        next_weight_desc=described(pair.next_weight.flatten(1), (block_d, config.BLOCK_K)),
    )
