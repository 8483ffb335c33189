"""Convolution by tensor descriptors: boxes of pixels come and go in bulk copies (TMA).

One program owns BLOCK_K filters on a box of images, rows and columns of y; images count, so that
boxes fill maps of 56, 28, 14 and 7 pixels without a rest. It walks the window row by row, pixel by
pixel, BLOCK_C channels at a time: the window's step only shifts the box of x, and what lies outside
of the image comes as zeros. At stride 2 rows and columns are seen as pairs, of which a window takes
one; where windows do not overlap, rows are seen as those of the windows. Pixels are the right
operand of the product, filters the left one: the left one would pass through registers on its way,
had it to be flattened from a box.

A gate scales x, box by box: as the right operand it only passes through registers on its way to
shared memory, and a box may have several images: 8x1x16 pixels at 14x14, of which 6 % are in vain,
2x1x64 at 7x7, of which 23 % are. Shares of y's means are sums over the rows and
columns of boxes of a run's pixels, of which an image must have as many as runs; others are refused.
"""

import math
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._act import ACTIVATIONS
from ._conv import Affine, Site, add_share, block, covered
from ._device import Device
from ._launch import launch
from ._tile import load_channels

FROM_SHARED = ("_tiles_kernel",)


class Config(NamedTuple):
    """A box of pixels, a tile of filters and channels, and how it runs."""

    BOX_N: int
    BOX_P: int
    BOX_Q: int
    BLOCK_K: int
    BLOCK_C: int
    num_warps: int
    num_stages: int


# filters, pixels, warps of the tiles to measure
TILES = (
    (128, 128, 8),
    (64, 128, 4),
    (64, 256, 4),
    (128, 256, 8),
    (256, 128, 8),
    (128, 64, 4),
    (64, 64, 4),
)


def configs(site: Site, precision: str, device: Device) -> list[Config]:
    """Return what may be worth measuring, the analytic choice first."""
    best = pick(site, precision, device)
    found = [best]
    for BLOCK_K, pixels, num_warps in TILES:
        if BLOCK_K >= 2 * max(64, site.filters) or pixels >= 2 * max(64, _pixels(site)):
            continue
        box = box_of(site, pixels)
        for num_stages in (3, 4):
            config = Config(*box, BLOCK_K, best.BLOCK_C, num_warps, num_stages)
            if num_stages * _round(config, site.x.itemsize) <= device.shared:
                found.append(config)
    return list(dict.fromkeys(found))


def pick(site: Site, precision: str, device: Device) -> Config:
    """Choose a tile by arithmetic, such that two programs share a multiprocessor.

    While one of them ends, the other one multiplies: 128 filters on 128 pixels in 8 warps take 94
    registers a thread, and three rounds of 64 halves 96 KiB, less than half of what there is.
    """
    BLOCK_K = max(64, block(site.filters, 128))
    tiles = triton.cdiv(_pixels(site), 128) * triton.cdiv(site.filters, BLOCK_K)
    box = box_of(site, 64 if tiles < device.processors else 128)
    widest = 128 // site.x.itemsize
    is_matrix = site.window == (1, 1)
    BLOCK_C = block(site.channels, widest) if is_matrix else gcd(site.channels, widest)
    num_warps = 8 if BLOCK_K * math.prod(box) >= 128 * 128 else 4
    config = Config(*box, BLOCK_K, BLOCK_C, num_warps, 2)
    rounds = math.prod(site.window) * triton.cdiv(site.channels, BLOCK_C)
    fit = device.shared // 2 // _round(config, site.x.itemsize)
    return config._replace(num_stages=max(2, min(4, rounds, fit)))


def refuses(site: Site, precision: str, device: Device, config: Config) -> str | None:
    """Return why a configuration does not serve a convolution."""
    if device.arch < 90:
        return "tensor descriptors need an NVIDIA GPU of compute capability 9.0"
    if site.groups > 1:
        return "groups"
    if site.x.dtype == torch.float32 and precision == "ieee":
        return "fp32 is not to be multiplied as TF32"
    if _view(site) is None:
        return f"stride {site.stride} on {tuple(site.x.shape[2:])} (1, or 2 on even sides)"
    if math.prod(site.window) > 1 and site.channels % config.BLOCK_C:
        return f"{site.channels} channels are not blocks of {config.BLOCK_C}"
    if config.BLOCK_C < 16:  # a product takes no fewer, and a box no less than 32 bytes
        return f"{site.channels} channels leave blocks of {config.BLOCK_C}"
    for name, t in zip(("y", "x", "weight", "residual"), site.maps):
        if t is not None and not _is_aligned(t):
            return f"{name} is not aligned to 16 bytes, its channels together"
    if not site.weight.permute(0, 2, 3, 1).is_contiguous():
        return "weight is not dense in channels_last"
    if _view(site) == "pairs" and site.x.stride(3) != site.channels:
        return "x is not dense along its rows"
    if site.gate is not None and _view(site) != "pixels":
        return f"a gate at stride {site.stride}"
    pixels = math.prod(config[:3])
    if site.gate is not None and config.BLOCK_K * pixels > 64 * 32 * config.num_warps:
        return f"a gate beside {config.BLOCK_K}x{pixels} sums, which spill"
    if site.shares is not None and not _has_runs(site, (config.BOX_P, config.BOX_Q)):
        return f"boxes of {config.BOX_P}x{config.BOX_Q} pixels are no runs of {site.run}"
    return None


def _has_runs(site: Site, box: tuple[int, int]) -> bool:
    """Return whether boxes are to an image what runs of pixels are: as large and as many."""
    P, Q = site.y.shape[2:]
    is_run = math.prod(box) == site.run
    return is_run and covered(P, box[0]) * covered(Q, box[1]) == covered(P * Q, site.run)


def _is_aligned(t: Tensor) -> bool:
    steps = [t.stride(d) * t.itemsize for d in (0, 2, 3) if t.shape[d] > 1]
    at = t.storage_offset() * t.itemsize if t.is_meta else t.data_ptr()
    return (t.stride(1) == 1 or t.shape[1] == 1) and math.gcd(16, at, *steps) == 16


def _view(site: Site) -> str | None:
    """Return how rows and columns are counted, None where no box has the pixels of a step."""
    H, W = site.x.shape[2:]
    if site.stride == (1, 1):
        return "pixels"
    if site.stride == (2, 2) and H % 2 == W % 2 == 0:
        return "pairs"
    disjoint = (site.window[1], site.stride[1], site.padding) == (1, 1, (0, 0))
    if disjoint and (site.window[0], site.dilation[0]) == (site.stride[0], 1):
        return "rows"
    return None


def _pixels(site: Site) -> int:
    return site.y.numel() // site.y.shape[1]


def box_of(site: Site, pixels: int) -> tuple[int, int, int]:
    """Return the images, rows and columns of a box of `pixels` of which the fewest are in vain.

    Of those, the one with the fewest images: its windows overlap most. Each image of a box has a
    gate of its own, in fp32, which counts for as many pixels as it takes bytes.
    """
    N, _, P, Q = site.y.shape
    sizes = [2**i for i in range(pixels.bit_length())]
    boxes = [(pixels // (p * q), p, q) for p in sizes for q in sizes if p * q <= pixels]
    if site.shares is not None:
        boxes = [box for box in boxes if _has_runs(site, box[1:])] or boxes

    def cost(box: tuple[int, int, int]) -> tuple[int, ...]:
        area = math.prod(covered(n, size) for n, size in zip((N, P, Q), box))
        if site.gate is not None:
            area *= pixels * site.x.itemsize + box[0] * site.gate.itemsize
        return area, box[0], abs(box[1] - box[2])

    return min(boxes, key=cost)


def _round(config: Config, itemsize: int) -> int:
    """Return the bytes that one round of the loop multiplies."""
    pixels = config.BOX_N * config.BOX_P * config.BOX_Q
    return (pixels + config.BLOCK_K) * config.BLOCK_C * itemsize


@triton.jit
def advanced(r, s, c, C, S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the step of a window after (r, s, c): channels come first, then columns."""
    c += BLOCK_C
    ends = c >= C
    c = tl.where(ends, 0, c)
    s += ends.to(tl.int32)
    ends = s >= S
    return r + ends.to(tl.int32), tl.where(ends, 0, s), c


@triton.jit
def _gated(x, gate_ptr, n, c, N, C):
    """Return a box of x times the gate of its images."""
    images = n + tl.arange(0, x.shape[0])[:, None, None, None].to(tl.int64)
    channels = c + tl.arange(0, x.shape[-1])[None, None, None, :]
    mask = (images < N) & (channels < C)
    gate = tl.load(gate_ptr + images * C + channels, mask=mask, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * gate).to(x.dtype)


@triton.jit
def _tiles_kernel(
    affine,
    gate_ptr,
    shares_ptr,
    sizes,
    steps,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    VIEW: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_P: tl.constexpr,
    BOX_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    y_desc,
    x_desc,
    weight_desc,
    residual_desc,
):
    N, P, Q, C, K = sizes
    PIXELS: tl.constexpr = BOX_N * BOX_P * BOX_Q
    blocks_k, boxes_q, boxes_p = tl.cdiv(K, BLOCK_K), tl.cdiv(Q, BOX_Q), tl.cdiv(P, BOX_P)
    k = tl.program_id(0) % blocks_k * BLOCK_K
    box = tl.program_id(0) // blocks_k
    q = box % boxes_q * BOX_Q
    p = box // boxes_q % boxes_p * BOX_P
    n = box // (boxes_q * boxes_p) * BOX_N

    acc = tl.zeros((BLOCK_K, PIXELS), tl.float32)
    r, s, c = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    # at least one round, and the compiler knows: else ptxas may serialize the products
    for i in range(tl.maximum(WINDOW[0] * WINDOW[1] * tl.cdiv(C, BLOCK_C), 1)):
        h, w = r * steps[2] - steps[0], s * steps[3] - steps[1]
        if VIEW == "pixels":
            x = x_desc.load([n, p + h, q + w, c])
        elif VIEW == "pairs":
            x = x_desc.load([n, p + (h >> 1), h & 1, q + (w >> 1), (w & 1) * C + c])
        else:
            x = x_desc.load([n, p, r, q, c])
        if gate_ptr is not None:
            x = _gated(x, gate_ptr, n, c, N, C)
        weight = weight_desc.load([k, i * BLOCK_C])
        acc = tl.dot(weight, x.reshape(PIXELS, BLOCK_C).T, acc, input_precision=PRECISION)
        r, s, c = advanced(r, s, c, C, WINDOW[1], BLOCK_C)

    scale_ptr, bias_ptr = affine
    filters = (k + tl.arange(0, BLOCK_K))[:, None]
    z = acc * load_channels(scale_ptr, filters, K, tl.float32, 1.0)
    z += load_channels(bias_ptr, filters, K, tl.float32, 0.0)
    if residual_desc is not None:
        residual = residual_desc.load([n, p, q, k]).reshape(PIXELS, BLOCK_K)
        z += residual.T.to(tl.float32)
    y = ACT(z).to(x_desc.dtype)
    if shares_ptr is not None:
        pixels = tl.arange(0, PIXELS)[None, :]
        inside = (p + pixels // BOX_Q % BOX_P < P) & (q + pixels % BOX_Q < Q)
        run = box % (boxes_q * boxes_p)
        for i in tl.static_range(BOX_N):
            counts = inside & (pixels // (BOX_P * BOX_Q) == i)
            at = ((n + i).to(tl.int64) * (boxes_q * boxes_p) + run) * K + k + tl.arange(0, BLOCK_K)
            mask = (k + tl.arange(0, BLOCK_K) < K) & (n + i < N)
            add_share(shares_ptr, y, at, counts, mask, P * Q, 1)
    if y_desc is not None:
        y_desc.store([n, p, q, k], y.T.reshape(BOX_N, BOX_P, BOX_Q, BLOCK_K))


def run(site: Site, affine: Affine, act: str, precision: str, config: Config) -> None:
    """Write y, and the shares if there are any."""
    (N, K, P, Q), (R, S) = site.y.shape, site.window
    box = (config.BOX_N, config.BOX_P, config.BOX_Q)
    filters = site.weight.permute(0, 2, 3, 1).flatten(1)
    boxes = math.prod(triton.cdiv(n, size) for n, size in zip((N, P, Q), box))
    launch(
        _tiles_kernel,
        (boxes * triton.cdiv(K, config.BLOCK_K),),
        site.x.device,
        affine=affine,
        gate_ptr=site.gate,
        shares_ptr=site.shares,
        sizes=(N, P, Q, site.channels, K),
        steps=(*site.padding, *site.dilation),
        ACT=ACTIVATIONS[act][0],
        PRECISION=precision if site.x.dtype == torch.float32 else None,
        WINDOW=(R, S),
        VIEW=_view(site),
        **config._asdict(),
        y_desc=_boxes(site.y if site.writes else None, (*box, config.BLOCK_K)),
        x_desc=_boxes_of_input(site, (*box, config.BLOCK_C)),
        weight_desc=described(filters, (config.BLOCK_K, config.BLOCK_C)),
        residual_desc=_boxes(site.residual, (*box, config.BLOCK_K)),
    )


def _boxes(t: Tensor | None, box: tuple[int, int, int, int]) -> TensorDescriptor | None:
    return None if t is None else described(t.permute(0, 2, 3, 1), box)


def _boxes_of_input(site: Site, box: tuple[int, int, int, int]) -> TensorDescriptor:
    x, view = site.x.permute(0, 2, 3, 1), _view(site)
    if view == "pixels":
        return described(x, box)
    x = x.unflatten(1, (-1, site.stride[0]))
    if view == "pairs":
        x = x.unflatten(3, (-1, 2)).flatten(4)
    return described(x, (box[0], box[1], 1, *box[2:]))


def described(t: Tensor, box: tuple[int, ...]) -> TensorDescriptor:
    """Return a descriptor, which wants aligned strides even where nothing is stepped over."""
    *steps, _ = (16 if n == 1 else stride for n, stride in zip(t.shape, t.stride()))
    return TensorDescriptor(t, list(t.shape), [*steps, 1], list(box))
