"""The geometry of tiles: what merging dimensions and picking configs must never change."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from vertebra.kernels._triton._affine import MAX_SPLITS, pick
from vertebra.kernels._triton._tile import geometry, offset

SIZES = st.tuples(*[st.integers(1, 5)] * 4)


@st.composite
def tensors(draw, shape):
    """Any dense permutation of `shape`, sliced out of a larger one, or expanded."""
    order = draw(st.permutations(range(4)))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in range(4)]
    pads = [draw(st.sampled_from([0, 0, 1])) for _ in range(4)]
    whole = [n * s + p for n, s, p in zip(shape, steps, pads, strict=True)]
    x = torch.empty([whole[i] for i in order]).permute([order.index(i) for i in range(4)])
    x = x[tuple(slice(p, None, s) for p, s in zip(pads, steps, strict=True))]
    expanded = draw(st.sampled_from([None, None, 0, 1, 2, 3]))
    if expanded is not None:
        x = x.narrow(expanded, 0, 1).expand(x.shape)
    return x


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_merged_view_addresses_the_same_elements(data) -> None:
    shape = data.draw(SIZES)
    maps = [data.draw(tensors(shape)) for _ in range(data.draw(st.integers(1, 3)))]
    (M, C, HW, W), strides, _ = geometry(tuple(maps[0].shape), *(t.stride() for t in maps))
    N, channels, H, width = maps[0].shape
    assert (N * H * width, channels) == (M, C)
    for t, stride in zip(maps, strides, strict=True):
        found = [
            (m // HW) * stride[0]
            + c * stride[1]
            + (m % HW // W) * stride[2]
            + (m % HW % W) * stride[3]
            for m in range(M)
            for c in range(C)
        ]
        n, h, w, c = torch.meshgrid(*map(torch.arange, (N, H, width, C)), indexing="ij")
        s = t.stride()
        assert found == (n * s[0] + c * s[1] + h * s[2] + w * s[3]).flatten().tolist()


@pytest.mark.parametrize(
    ("format", "sizes", "stride", "channels_last"),
    [
        (torch.contiguous_format, (210, 3, 35, 1), (105, 35, 1, 0), False),
        (torch.channels_last, (210, 3, 1, 1), (3, 1, 0, 0), True),
    ],
)
def test_dense_maps_merge_fully(format, sizes, stride, channels_last) -> None:
    x = torch.empty(6, 3, 5, 7).contiguous(memory_format=format)
    assert geometry(tuple(x.shape), x.stride()) == (sizes, (stride,), channels_last)


@given(
    M=st.integers(1, 2**31 - 2**16 - 1),
    C=st.integers(1, 5000),
    channels_last=st.booleans(),
    tile=st.sampled_from([2048, 4096]),
    sms=st.sampled_from([2, 40, 132, 148]),
)
def test_pick(M: int, C: int, channels_last: bool, tile: int, sms: int) -> None:
    BLOCK_M, BLOCK_C, num_warps, splits = pick(M, C, channels_last, tile, sms)
    assert tile >= BLOCK_M * BLOCK_C
    assert {BLOCK_M.bit_count(), BLOCK_C.bit_count()} == {1}
    assert num_warps in (1, 4)
    assert 1 <= splits <= MAX_SPLITS
    tiles = -(-M // BLOCK_M)
    split_m = -(-tiles // splits) * BLOCK_M
    assert (splits - 1) * split_m < M <= splits * split_m  # none is empty, all is covered


@triton.jit
def _offset_kernel(out_ptr, stride, sizes, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, offset(stride, sizes, i + sizes[0] - BLOCK, i * 0 + sizes[1] - 1))


@pytest.mark.parametrize(
    "shape",
    [(1024, 256, 112, 112), (3, 70001, 130, 130), (2, 2, 32768, 40000)],
    ids=str,
)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_offsets_past_32_bits(shape, format, device) -> None:
    """The last pixels of maps of more than 2^31 elements, by address arithmetic alone."""
    x = torch.empty(shape, device="meta").to(memory_format=format)
    assert x.numel() > 2**31
    sizes, (stride,), _ = geometry(shape, x.stride())
    out = torch.empty(8, dtype=torch.int64, device=device)
    _offset_kernel[(1,)](out, stride, sizes, BLOCK=8)
    N, C, H, W = shape
    s = x.stride()
    pixels = range(N * H * W - 8, N * H * W)
    expected = [
        m // (H * W) * s[0] + (C - 1) * s[1] + m % (H * W) // W * s[2] + m % W * s[3]
        for m in pixels
    ]
    assert out.tolist() == expected
