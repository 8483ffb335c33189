"""The geometry of tiles: what merging dimensions and picking configs must never change."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from vertebra.kernels._triton._affine import MAX_SPLITS, pick
from vertebra.kernels._triton._tile import Geometry, geometry, offset

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
    view = geometry(tuple(maps[0].shape), *(t.stride() for t in maps))
    (M, C, HW, W), strides = view.sizes, view.strides
    N, channels, H, width = maps[0].shape
    assert (N * H * width, channels) == (M, C)
    axis, run = (1, C) if view.channels_last else (2, HW) if W == 1 else (3, W)
    others = [s for stride in strides for i, s in enumerate(stride) if i != axis]
    assert all(n % view.unit == 0 for n in [run, *others])
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
    ("shape", "format", "expected"),
    [
        ((6, 3, 5, 7), torch.contiguous_format, ((210, 3, 35, 1), ((105, 35, 1, 0),), False, 1)),
        ((6, 3, 5, 7), torch.channels_last, ((210, 3, 1, 1), ((3, 1, 0, 0),), True, 1)),
        (
            (2, 3, 14, 14),
            torch.contiguous_format,
            ((392, 3, 196, 1), ((588, 196, 1, 0),), False, 4),
        ),
        ((2, 104, 3, 5), torch.channels_last, ((30, 104, 1, 1), ((104, 1, 0, 0),), True, 8)),
    ],
)
def test_dense_maps_merge_fully(shape, format, expected) -> None:
    x = torch.empty(shape).contiguous(memory_format=format)
    assert geometry(shape, x.stride()) == expected


@given(
    M=st.integers(1, 2**31 - 2**16 - 1),
    C=st.integers(1, 5000),
    channels_last=st.booleans(),
    unit=st.sampled_from([1, 4, 8]),
    itemsize=st.sampled_from([2, 4, 8]),
    tile_bytes=st.sampled_from([2048, 4096, 8192]),
    sms=st.sampled_from([2, 40, 132, 148]),
)
@settings(deadline=None)
def test_pick(M, C, channels_last, unit, itemsize, tile_bytes, sms) -> None:
    view = Geometry((M, C, 1, 1), (), channels_last, unit)
    config = pick(view, itemsize, tile_bytes=tile_bytes, programs=8 * sms)
    BLOCK_M, BLOCK_C, num_warps, splits = config
    assert BLOCK_M * BLOCK_C * itemsize <= tile_bytes
    assert {BLOCK_M.bit_count(), BLOCK_C.bit_count()} == {1}
    assert num_warps in (1, 4)
    assert 1 <= splits <= MAX_SPLITS
    tiles = -(-M // BLOCK_M)
    split_m = -(-tiles // splits) * BLOCK_M
    assert (splits - 1) * split_m < M <= splits * split_m  # none is empty, all is covered


@triton.jit
def _offset_kernel(
    out_ptr, stride, sizes, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.arange(0, BLOCK)
    m = i + sizes[0] - BLOCK
    c = i * 0 + sizes[1] - 1
    tl.store(out_ptr + i, offset(stride, sizes, m, c, CHANNELS_LAST, UNIT))


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
    sizes, (stride,), channels_last, unit = geometry(shape, x.stride())
    out = torch.empty(8, dtype=torch.int64, device=device)
    _offset_kernel[(1,)](out, stride, sizes, channels_last, unit, BLOCK=8)
    N, C, H, W = shape
    s = x.stride()
    pixels = range(N * H * W - 8, N * H * W)
    expected = [
        m // (H * W) * s[0] + (C - 1) * s[1] + m % (H * W) // W * s[2] + m % W * s[3]
        for m in pixels
    ]
    assert out.tolist() == expected
