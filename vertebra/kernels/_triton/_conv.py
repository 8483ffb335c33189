"""What convolution kernels share: the site they serve, where its pixels lie, what ends them.

A convolution is a product of matrices: M = N*P*Q pixels of y by K filters, summed over R*S*C.
Where windows do not overlap and nothing is padded (1x1 at any stride, 2x2 at stride 2, 4x4 at
stride 4), a row of a window is a run of memory, and `simplest` views it as the channels of one
pixel: the sum is shorter, its runs longer. What is 1x1 at stride 1 by then and dense is a matrix,
and viewed as one row of pixels.
"""

import re
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._tile import load_channels, multiple

Pair = tuple[int, int]
Affine = tuple[Tensor | None, Tensor | None]  # scale, bias


class Site(NamedTuple):
    """One convolution: what it reads and writes, and the steps of its window.

    Attributes:
        gate: (N, C), what x is multiplied by, for kernels that go image by image.
        shares: (N, T, K), the parts of y's means, which such kernels write.
        writes: whether y is written; where not, it may be a meta tensor.
        run: pixels of an image, row by row or box by box, that each have a share.
    """

    y: Tensor
    x: Tensor
    weight: Tensor
    residual: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    gate: Tensor | None = None
    shares: Tensor | None = None
    writes: bool = True
    run: int = 0

    @property
    def window(self) -> Pair:
        """R and S."""
        R, S = self.weight.shape[2:]
        return R, S

    @property
    def maps(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The tensors."""
        return self.y, self.x, self.weight, self.residual

    @property
    def by_image(self) -> bool:
        """Whether a pixel's image matters."""
        return self.gate is not None or self.shares is not None

    @property
    def channels(self) -> int:
        """Channels of one group."""
        return self.weight.shape[1]

    @property
    def filters(self) -> int:
        """Filters of one group."""
        return self.weight.shape[0] // self.groups

    @property
    def is_pointwise(self) -> bool:
        """Whether every pixel of y comes from the pixel of x in its place."""
        return (*self.window, *self.stride, *self.padding) == (1, 1, 1, 1, 0, 0)


def block(extent: int, largest: int) -> int:
    """Return the size of blocks that cover `extent`, 16 to `largest`: halved if that saves 1/4."""
    size = largest
    while size > 16 and size >= 2 * extent:
        size //= 2
    while size > 16 and 4 * covered(extent, size // 2) <= 3 * covered(extent, size):
        size //= 2
    return size


def covered(extent: int, size: int) -> int:
    """Return how much blocks of `size` take to cover `extent`."""
    return -(-extent // size) * size


def written(config: Any) -> str:
    """Return a configuration as text: its blocks, warps and stages, as in 128x64:w8:s2."""
    *blocks, num_warps, num_stages = config
    return f"{'x'.join(map(str, blocks))}:w{num_warps}:s{num_stages}"


def parsed(kind: Any, text: str) -> Any:
    """Return the configuration of a `kind` that a text names, None if it names none."""
    match = re.fullmatch(r"(\d+(?:x\d+)*):w(\d+):s(\d+)", text)
    if match is None:
        return None
    values = [*map(int, match[1].split("x")), int(match[2]), int(match[3])]
    return kind(*values) if len(values) == len(kind._fields) else None


def simplest(site: Site) -> Site:
    """Return the same convolution, by views, with the least to step over."""
    if site.padding == (0, 0):
        site = _trimmed(site)
        if site.gate is None and _has_rows_in_memory(site):
            site = _rows_as_channels(site)
    if site.is_pointwise:
        site = _in_one_row(site)
    return site


def _trimmed(site: Site) -> Site:
    """Drop the pixels of x that no window has."""
    x, stride = site.x, site.stride
    spans = [d * (r - 1) + 1 for d, r in zip(site.dilation, site.window)]
    for dim in (0, 1):
        step = stride[dim] if spans[dim] == 1 else 1
        length = (site.y.shape[2 + dim] - 1) * stride[dim] + spans[dim]
        x = x[(slice(None),) * (2 + dim) + (slice(0, length, step),)]
    kept = tuple(1 if span == 1 else s for span, s in zip(spans, stride))
    return site._replace(x=x, stride=kept)


def _has_rows_in_memory(site: Site) -> bool:
    """Return whether a row of a window is a run of x and of weight that no other window has."""
    _, x, weight, *_ = site
    C, S = x.shape[1], site.window[1]
    if S == 1 or (site.stride[1], site.dilation[1], site.groups) != (S, 1, 1):
        return False
    dense = C == 1 or (x.stride(1) == 1 and weight.stride(1) == 1)
    return dense and x.stride(3) == C and weight.stride(3) == C


def _rows_as_channels(site: Site) -> Site:
    _, x, weight, *_ = site
    (N, C, H, _), (R, S), Q = x.shape, site.window, site.y.shape[3]
    return site._replace(
        x=x.as_strided((N, S * C, H, Q), (x.stride(0), 1, x.stride(2), S * C)),
        weight=weight.as_strided(
            (weight.shape[0], S * C, R, 1), (weight.stride(0), 1, weight.stride(2), 1)
        ),
        stride=(site.stride[0], 1),
    )


def _in_one_row(site: Site) -> Site:
    """View dense maps as images of one row each, or one that has the pixels of the whole batch."""
    y, x, _, residual = site.maps
    images = y.shape[0] if site.by_image else 1
    rows = [None if t is None else t.permute(0, 2, 3, 1) for t in (y, x, residual)]
    if not all(t is None or t.is_contiguous() for t in rows):
        return site
    y, x, residual = (
        None if t is None else t.view(images, 1, -1, t.shape[3]).permute(0, 3, 1, 2) for t in rows
    )
    return site._replace(y=y, x=x, residual=residual)


@triton.jit
def pixel(m, P, Q):
    """Return the image, row and column of pixel m of images of P rows of Q."""
    return m // (P * Q), m // Q % P, m % Q


@triton.jit
def position(stride, n, h, w, c, UNIT: tl.constexpr):
    """Offset of a channel of a pixel; 64-bit, for tensors past 2^31 elements."""
    at = n.to(tl.int64) * multiple(stride[0], UNIT) + h.to(tl.int64) * multiple(stride[2], UNIT)
    return at + w.to(tl.int64) * multiple(stride[3], UNIT) + c.to(tl.int64) * stride[1]


@triton.jit
def finish(
    z, maps, affine, place, K, mask, ACT: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr
):
    """Return y = act(z * scale + bias + residual) as KIND, and store it where there is a y.

    `place` is (n, p, q, k), `maps` (y, its strides, residual, its strides).
    """
    y_ptr, y_stride, residual_ptr, residual_stride = maps
    scale_ptr, bias_ptr = affine
    n, p, q, k = place
    z *= load_channels(scale_ptr, k, K, tl.float32, 1.0)
    z += load_channels(bias_ptr, k, K, tl.float32, 0.0)
    if residual_ptr is not None:
        at = position(residual_stride, n, p, q, k, UNIT)
        z += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = ACT(z).to(KIND)
    if y_ptr is not None:
        tl.store(y_ptr + position(y_stride, n, p, q, k, UNIT), y, mask=mask)
    return y


@triton.jit
def add_share(shares_ptr, y, at, counts, mask, pixels, AXIS: tl.constexpr):
    """Store what the pixels of y in `counts` add to the means of an image of `pixels`."""
    total = tl.sum(tl.where(counts, y.to(tl.float32), 0.0), axis=AXIS)
    tl.store(shares_ptr + at, total / pixels, mask=mask)
