"""Convolution by pointers: takes any window, steps, padding, groups and slices; channels together.

One program owns BLOCK_M pixels of y and BLOCK_K filters of one group, or of a *bundle* of groups
where a group is narrower than the matrix units: to it the weights of a bundle are a block-diagonal
matrix, whose zeros are filled in as it is loaded (and make a NaN in one group one in all of its
bundle). It walks the window row by row, pixel by pixel, BLOCK_C channels at a time, in one loop, so
that loads run ahead of products across the window; the indices are carried along, because divided
out of a counter they have been compiled wrongly (pytorch#173068). Programs that share pixels run
next to each other and find them in the L2 cache.

With a gate, or with shares of y's means to write, pixels are counted image by image, each image's
up to a multiple of BLOCK_M, so that no tile has pixels of two. That is 2 % more of them at 56x56,
14 % at 28x28 and 31 % at 14x14 and 7x7 (in tiles of 128, 128, 128 and 64). The gate is then one
vector to a program, and scales the weights: these are the product's right operand, which goes
through shared memory anyway, where x, the left one, would be multiplied out of registers.
"""

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._act import ACTIVATIONS
from ._conv import Affine, Site, add_share, block, covered, finish, pixel, position
from ._device import Device
from ._launch import launch
from ._tile import multiple

FROM_SHARED = ("_gather_kernel",)
# left to itself, ptxas makes do with 128 of them for an sm_100, and spills
MAXNREG = {"_gather_kernel": 255}
_OF_Y = ("BLOCK_M", "BLOCK_K")
# which blocks the tile of each map is: see testing/aot.py
TILES_OF_MAPS = {
    "_gather_kernel": {
        "maps[0]": _OF_Y,
        "maps[1]": ("BLOCK_M", "BLOCK_C"),
        "maps[2]": ("BLOCK_K", "BLOCK_C"),
        "maps[3]": _OF_Y,
    }
}


class Config(NamedTuple):
    """A tile of pixels, filters and channels, how many groups make a bundle, and how it runs."""

    BLOCK_M: int
    BLOCK_K: int
    BLOCK_C: int
    bundle: int
    num_warps: int
    num_stages: int


# pixels, filters, warps of the tiles to measure; 128 sums a thread spill with a residual
TILES = (
    (128, 128, 8),
    (128, 64, 4),
    (128, 32, 4),
    (64, 128, 4),
    (64, 64, 4),
    (64, 32, 4),
    (256, 64, 8),
)


def configs(site: Site, precision: str, device: Device) -> list[Config]:
    """Return what may be worth measuring, the analytic choice first."""
    best = pick(site, precision, device)
    found = [best]
    for BLOCK_M, BLOCK_K, num_warps in TILES:
        if BLOCK_K > triton.next_power_of_2(site.filters * best.bundle):
            continue
        for num_stages in (3, 4):
            config = best._replace(
                BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, num_warps=num_warps, num_stages=num_stages
            )
            if _shared(config, site.x.itemsize, device) <= device.shared:
                found.append(config)
    return list(dict.fromkeys(found))


def pick(site: Site, precision: str, device: Device) -> Config:
    """Choose a tile by arithmetic: as much reuse as registers allow, little that is padding.

    64 halves are the 128 bytes that wgmma's widest swizzle takes, and 128 filters on 128 pixels
    need a quarter of the operands' shared memory bandwidth. Products in fp32 are sums on the
    ordinary units, whose operands take registers.
    """
    bundle = _bundle(site)
    channels, filters = site.channels * bundle, site.filters * bundle
    (N, _, P, Q), itemsize = site.y.shape, site.x.itemsize
    exact = precision == "ieee"
    BLOCK_K = block(filters, 64 if exact else 128)
    BLOCK_C = triton.next_power_of_2(channels) if bundle > 1 else block(channels, 128 // itemsize)
    BLOCK_C = max(16, min(BLOCK_C, 16) if exact and bundle == 1 else BLOCK_C)
    of_image = max(64, block(P * Q, 128)) if site.by_image else 128
    tiles = triton.cdiv(N * P * Q, 128) * triton.cdiv(filters, BLOCK_K) * site.groups // bundle
    BLOCK_M = 64 if exact or tiles < device.processors else of_image
    num_warps = 8 if BLOCK_M * BLOCK_K >= 128 * 128 else 4
    rounds = site.window[0] * site.window[1] * triton.cdiv(channels, BLOCK_C)
    for num_stages in range(min(4, max(2, rounds)), 0, -1):
        config = Config(BLOCK_M, BLOCK_K, BLOCK_C, bundle, num_warps, num_stages)
        if _shared(config, itemsize, device) <= device.shared:
            return config
    raise AssertionError(f"no tile fits {device}")


def refuses(site: Site, precision: str, device: Device, config: Config) -> str | None:
    """Return why a configuration does not serve a convolution."""
    if config.bundle > 1 and config.bundle * site.channels > config.BLOCK_C:
        return f"a bundle of {config.bundle} groups of {site.channels} channels in {config.BLOCK_C}"
    sums = config.BLOCK_M * config.BLOCK_K
    if site.gate is not None and precision == "ieee" and sums > 64 * 64:
        return f"a gate beside {sums} sums of fp32, which spill"
    if site.shares is not None and config.BLOCK_M % site.run:
        return f"tiles of {config.BLOCK_M} pixels have no runs of {site.run}"
    return None


def _bundle(site: Site) -> int:
    """Return how many groups make up one product: of up to 32 channels and filters."""
    width = max(site.channels, site.filters)
    return min(triton.next_power_of_2(site.groups), 2 ** max(0, (32 // width).bit_length() - 1))


def _shared(config: Config, itemsize: int, device: Device) -> int:
    """Return the bytes of the operands in flight: of every round, or of all but the running one."""
    rounds = config.num_stages if device.arch >= 90 else max(1, config.num_stages - 1)
    return rounds * (config.BLOCK_M + config.BLOCK_K) * config.BLOCK_C * itemsize


@triton.jit
def _gather_kernel(
    maps,
    affine,
    gate_ptr,
    shares_ptr,
    strides,
    sizes,
    steps,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    y_ptr, x_ptr, weight_ptr, residual_ptr = maps
    M, P, Q, pixels, H, W, all_c, all_k, bundle_c, bundle_k = sizes
    UNIT_C: tl.constexpr = UNITS[0]
    UNIT_WEIGHT: tl.constexpr = UNITS[1]
    UNIT_K: tl.constexpr = UNITS[2]
    bundle_c, bundle_k = multiple(bundle_c, UNIT_C), multiple(bundle_k, UNIT_K)
    blocks_k = tl.cdiv(bundle_k, BLOCK_K)
    columns = tl.cdiv(all_k, bundle_k) * blocks_k
    column = tl.program_id(0) % columns
    first_c, first_k = column // blocks_k * bundle_c, column // blocks_k * bundle_k
    C = tl.minimum(bundle_c, multiple(all_c, UNIT_C) - first_c)
    K = tl.minimum(bundle_k, multiple(all_k, UNIT_K) - first_k)
    first_m = tl.program_id(0) // columns * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    k = column % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_C)

    if RUN is None:
        n, p, q = pixel(m, P, Q)
        inside = m < M
    else:  # each image has `pixels` places, of which the last may be in vain
        image = (first_m // pixels).to(tl.int64)
        m -= first_m // pixels * pixels
        n, p, q = image + m * 0, m // Q, m % Q
        inside = m < P * Q
    h, w = p * steps[0] - steps[2], q * steps[1] - steps[3]
    x_ptrs = x_ptr + position(strides[1], n, h, w, first_c, UNIT_C)[:, None] + c[None, :]
    step_r = steps[4] * multiple(strides[1][2], UNIT_C).to(tl.int64)
    step_s = steps[5] * multiple(strides[1][3], UNIT_C)
    filters = (first_k + k).to(tl.int64) * multiple(strides[2][0], UNIT_WEIGHT)
    weight_ptrs = weight_ptr + filters[None, :] + c[:, None]
    weight_step_r = multiple(strides[2][2], UNIT_WEIGHT)
    weight_step_s = multiple(strides[2][3], UNIT_WEIGHT)
    of_weight = (k < K)[None, :]
    if GROUP is not None:  # a filter of a bundle sees the channels of its own group
        own = k // GROUP[1] * GROUP[0]
        weight_ptrs -= own[None, :]
        of_weight &= (c[:, None] >= own[None, :]) & (c[:, None] < (own + GROUP[0])[None, :])

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    r, s, c0 = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    # at least one round, and the compiler knows: else ptxas may serialize the products
    for _ in range(tl.maximum(WINDOW[0] * WINDOW[1] * tl.cdiv(C, BLOCK_C), 1)):
        of_x = inside
        if PADDED:
            i, j = h + r * steps[4], w + s * steps[5]
            of_x &= (i >= 0) & (i < H) & (j >= 0) & (j < W)
        of_c = c < C - c0
        x = tl.load(
            x_ptrs + (r * step_r + s * step_s + c0), mask=of_x[:, None] & of_c[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptrs + (r * weight_step_r + s * weight_step_s + c0),
            mask=of_weight & of_c[:, None],
            other=0.0,
        )
        if gate_ptr is not None:
            gates = gate_ptr + image * all_c + (first_c + c0 + c)
            gate = tl.load(gates, mask=of_c, other=0.0).to(tl.float32)
            weight = (weight.to(tl.float32) * gate[:, None]).to(weight.dtype)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        c0 += BLOCK_C
        ends = c0 >= C
        c0 = tl.where(ends, 0, c0)
        s += ends.to(tl.int32)
        ends = s >= WINDOW[1]
        s = tl.where(ends, 0, s)
        r += ends.to(tl.int32)

    place = (n[:, None], p[:, None], q[:, None], (first_k + k)[None, :])
    mask = inside[:, None] & (k < K)[None, :]
    ends = (y_ptr, strides[0], residual_ptr, strides[3])
    y = finish(acc, ends, affine, place, all_k, mask, ACT, UNIT_K, x_ptr.dtype.element_ty)
    if shares_ptr is not None:
        runs = tl.cdiv(P * Q, RUN)
        for i in tl.static_range(BLOCK_M // RUN):
            run = first_m % pixels // RUN + i
            at = (image * runs + run) * all_k + first_k + k
            counts = inside & (m // RUN == run)
            add_share(shares_ptr, y, at, counts[:, None], (k < K) & (run < runs), P * Q, 0)


def run(site: Site, affine: Affine, act: str, precision: str, config: Config) -> None:
    """Write y, and the shares if there are any."""
    y, x, *rest = site.maps
    (N, K, P, Q), (R, S), padding = y.shape, site.window, site.padding
    pixels = covered(P * Q, config.BLOCK_M) if site.by_image else P * Q
    bundle_c, bundle_k = (n // site.groups * config.bundle for n in (x.shape[1], K))
    launch(
        _gather_kernel,
        (
            triton.cdiv(N * pixels, config.BLOCK_M)
            * triton.cdiv(K, bundle_k)
            * triton.cdiv(bundle_k, config.BLOCK_K),
        ),
        x.device,
        maps=(y if site.writes else None, x, *rest),
        affine=affine,
        gate_ptr=site.gate,
        shares_ptr=site.shares,
        strides=tuple((y if t is None else t).stride() for t in site.maps),
        sizes=(N * P * Q, P, Q, pixels, *x.shape[2:], x.shape[1], K, bundle_c, bundle_k),
        steps=(*site.stride, *padding, *site.dilation),
        ACT=ACTIVATIONS[act][0],
        PRECISION=precision if x.dtype == torch.float32 else None,
        WINDOW=(R, S),
        PADDED=max(padding) > 0,
        GROUP=None if config.bundle == 1 else (x.shape[1] // site.groups, K // site.groups),
        RUN=site.run if site.by_image else None,
        UNITS=_units(site, bundle_c, bundle_k),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        BLOCK_C=config.BLOCK_C,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _units(site: Site, bundle_c: int, bundle_k: int) -> tuple[int, int, int]:
    """Return what divides offsets in x, in weight, and in y and the residual; 8 at most."""
    y, x, weight, residual = site.maps
    outputs = [t for t in (y, residual) if t is not None]
    steps = [t.stride(d) for t in outputs for d in (0, 2, 3) if t.shape[d] > 1]
    together = all(t.stride(1) == 1 for t in outputs)
    return (
        gcd(8, bundle_c, x.shape[1], *(x.stride(d) for d in (0, 2, 3) if x.shape[d] > 1)),
        gcd(8, weight.shape[1], *(weight.stride(d) for d in (0, 2, 3) if weight.shape[d] > 1)),
        gcd(8, bundle_k, y.shape[1], *steps) if together else 1,
    )
