"""The per-image passes that ops share: sums over an image's pixels, and the way back."""

import pytest
import torch
import triton
import triton.language as tl

from vertebra.kernels._triton import _pool
from vertebra.kernels._triton._per_image import combine
from vertebra.kernels._triton._pool import MAX_IMAGE_SPLITS, image_sum, pool, value
from vertebra.kernels._triton._tile import geometry
from vertebra.testing.budget import assert_within_budget
from vertebra.testing.cases import LAYOUTS, Case, Draw

SHAPES = [(2, 8, 8, 8), (3, 17, 7, 7), (1, 1, 3, 5), (2, 40, 1, 1), (33, 3, 1, 2), (1, 8, 37, 29)]
parametrize = pytest.mark.parametrize(
    ("shape", "layout"),
    [pytest.param(s, k, id=f"{'x'.join(map(str, s))}-{k}") for s in SHAPES for k in LAYOUTS[:4]],
)


@triton.jit
def _product_and_other(x, other):
    return (x * other, other)


def two_maps(shape, layout, dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    draw = Draw(Case("pool", shape, dtype, layout), device, seed=0)
    return draw.x(), draw.map(draw.normal(*shape))


def added(sums: torch.Tensor, N: int) -> torch.Tensor:
    """Add up the splits: (count, N, C)."""
    return sums.unflatten(1, (N, -1)).sum(2)


@parametrize
def test_sums_of_one_map(shape, layout, device) -> None:
    x, _ = two_maps(shape, layout, torch.float32, device)
    sums = pool(x, None, value, 1)
    assert sums.shape[0] == 1
    assert sums.dtype == torch.float32
    terms = shape[2] * shape[3]
    truth, eager = x.double().sum((2, 3)), x.sum((2, 3))
    assert_within_budget("sum", added(sums, shape[0])[0], eager, truth, terms)


@parametrize
def test_sums_of_two_maps(shape, layout, device) -> None:
    """In fp16, whose own sums would be far off, and of maps in different memory formats."""
    x, other = two_maps(shape, layout, torch.float16, device)
    other = other.contiguous()
    found = added(pool(x, other, _product_and_other, 2), shape[0])
    terms = shape[2] * shape[3]
    for name, mine, summand in zip(
        ("product", "other"), found, (x.float() * other, other.float()), strict=True
    ):
        truth = summand.double().sum((2, 3))
        assert_within_budget(name, mine, summand.sum((2, 3)), truth, terms)


def test_double_precision(device) -> None:
    x, _ = two_maps((2, 3, 7, 5), "nchw", torch.float64, device)
    sums = pool(x, None, value, 1)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(added(sums, 2)[0], x.sum((2, 3)))


@pytest.mark.parametrize("sms", [1, 3, 132])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_few_images_are_split_and_many_are_not(sms: int, layout, device, monkeypatch) -> None:
    monkeypatch.setattr(_pool, "processors", lambda device: sms)
    for shape in ((1, 4, 40, 61), (16, 4, 12, 11)):
        x, _ = two_maps(shape, layout, torch.float32, device)
        sums = pool(x, None, value, 1)
        splits = sums.shape[1] // shape[0]
        assert 1 <= splits <= MAX_IMAGE_SPLITS
        assert splits == 1 or shape[0] * splits <= 8 * sms
        assert (splits > 1) == (shape[0] == 1)
        terms = shape[2] * shape[3]
        truth, eager = x.double().sum((2, 3)), x.sum((2, 3))
        assert_within_budget("sum", added(sums, shape[0])[0], eager, truth, terms)


@triton.jit
def _image_sums(out_ptr, sums_ptr, splits, C, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    n = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)[None, :]
    tl.store(out_ptr + n * C + c, image_sum(sums_ptr, n, splits, c, C, BLOCK_S), mask=c < C)


@pytest.mark.parametrize("splits", [1, 2, 3, 32])
def test_image_sum_adds_an_images_splits(splits: int, device) -> None:
    sums = torch.randn(3 * splits, 5, device=device)
    out = torch.empty(3, 5, device=device)
    block = triton.next_power_of_2(splits)
    _image_sums[(3,)](out, sums, splits, 5, BLOCK_S=block, BLOCK_C=8)
    torch.testing.assert_close(out, sums.unflatten(0, (3, splits)).sum(1))


@parametrize
def test_combine(shape, layout, device) -> None:
    """Two maps of different memory formats, a bias and a spread sum; each left out as well."""
    N, C, H, W = shape
    x, other = two_maps(shape, layout, torch.float16, device)
    other = other.contiguous()
    a, b, spread = torch.randn(3, N, C, device=device).unbind()
    bias = torch.randn(C, device=device)
    for maps, slopes, options in (
        ((x, other), (a, b), {"bias": bias, "spread": spread}),
        ((x,), (b,), {"bias": bias}),
        ((), (), {"spread": spread}),
    ):
        y = torch.empty_like(x).fill_(float("nan"))
        combine(y, maps, slopes, **options)
        truth = torch.zeros(shape, dtype=torch.float64, device=device)
        for slope, m in zip(slopes, maps, strict=True):
            truth += slope.double()[:, :, None, None] * m
        if "bias" in options:
            truth += bias[:, None, None]
        if "spread" in options:
            truth += spread[:, :, None, None] / (H * W)
        assert_within_budget("y", y, truth.half(), truth)
    assert geometry(shape, y.stride()).channels_last == geometry(shape, x.stride()).channels_last
