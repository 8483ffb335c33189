"""What is special about `layer_norm_2d`: statistics, dtypes, what it keeps, and its invariances."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vertebra.kernels import backend, layer_norm_2d
from vertebra.kernels._triton._tile import Geometry, geometry
from vertebra.kernels._triton.layer_norm_2d import pick
from vertebra.testing.budget import assert_within_budget

PATHS = ["eager", "triton"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def reference(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return what torch computes in double precision."""
    weight, bias = (None if v is None else v.double() for v in (weight, bias))
    rows = x.double().permute(0, 2, 3, 1)
    return F.layer_norm(rows, (x.shape[1],), weight, bias, 1e-6).permute(0, 3, 1, 2)


def randn(*shape: int, format: torch.memory_format, **kwargs) -> Tensor:
    return torch.randn(shape, **kwargs).contiguous(memory_format=format)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("format", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["fp32", "same"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_output_has_the_inputs_dtype_and_layout(
    path: str, format, dtype, parameters, autocast: bool, device
) -> None:
    x = randn(2, 6, 3, 4, format=format, device=device).to(dtype)
    weight, bias = torch.randn(2, 6, device=device).to(parameters or dtype)
    with backend(path), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = layer_norm_2d(x, weight, bias)
    assert (y.dtype, y.stride()) == (x.dtype, x.stride())
    truth = reference(x, weight, bias)
    assert_within_budget("y", y, truth.to(dtype), truth)


@pytest.mark.parametrize("format", LAYOUTS, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_saves_the_input_and_8_bytes_a_pixel(format, autocast: bool, device) -> None:
    """Not doubled under autocast, where torch's layer_norm saves a copy of x in fp32."""
    x = randn(2, 16, 3, 4, format=format, device=device).bfloat16().requires_grad_()
    weight, bias = torch.randn(2, 16, device=device).unbind()
    weight.requires_grad_()
    saved: dict[int, Tensor] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t
    )
    with backend("triton"), torch.autocast(device.type, torch.bfloat16, enabled=autocast), hooks:
        layer_norm_2d(x, weight, bias)
    assert {x.data_ptr(), weight.data_ptr()} <= saved.keys()
    assert sum(t.nbytes for t in saved.values()) == x.nbytes + 8 * 2 * 3 * 4 + weight.nbytes


@pytest.mark.parametrize("shape", [(2, 12, 3, 4), (1, 300, 2, 4)], ids=str)
@pytest.mark.parametrize("format", LAYOUTS, ids=str)
def test_saved_statistics(shape, format, device) -> None:
    """In fp32, and to an ulp of a mean that is a thousand standard deviations away."""
    x = randn(*shape, format=format, device=device) + 1000
    with backend("triton"):
        _, mean, rstd = torch.ops.vertebra.layer_norm_2d(x, None, None, 1e-6, True)
    var, center = torch.var_mean(x.double(), dim=1, keepdim=True, correction=0)
    assert mean.shape == rstd.shape == center.shape
    assert mean.dtype == rstd.dtype == torch.float32
    assert (mean - center).abs().max() <= 2**-14  # an ulp of 1000
    truth = (var + 1e-6).rsqrt()
    assert_within_budget("rstd", rstd, truth.float(), truth, terms=shape[1])


def test_no_gradient_no_statistics(device) -> None:
    x = torch.randn(2, 6, 3, 4, device=device)
    _, mean, rstd = torch.ops.vertebra.layer_norm_2d(x, None, None, 1e-6, False)
    assert mean.numel() == rstd.numel() == 0


@pytest.mark.parametrize("C", [12, 300])
@pytest.mark.parametrize("format", LAYOUTS, ids=str)
def test_fp16_does_not_overflow(C: int, format, device) -> None:
    """Squares of fp16 values past 256 are infinite in fp16: what ConvNeXt runs into there."""
    x = (randn(1, C, 2, 4, format=format, device=device) * 1e4).clamp(-6e4, 6e4).half()
    x.requires_grad_()
    with backend("triton"):
        y = layer_norm_2d(x)
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y) * 1e4)
    assert_within_budget("y", y, reference(x).half(), reference(x))
    assert dx.isfinite().all()


@pytest.mark.parametrize("C", [1, 12, 300])
@pytest.mark.parametrize("format", LAYOUTS, ids=str)
def test_equal_channels_have_no_deviation(C: int, format, device) -> None:
    """Not a rounding error times 1 / sqrt(eps), which is a thousand."""
    x = randn(1, 1, 2, 4, format=format, device=device).mul(1e4).expand(1, C, 2, 4)
    x = x.contiguous(memory_format=format)
    bias = torch.randn(C, device=device)
    with backend("triton"):
        y = layer_norm_2d(x, None, bias)
    torch.testing.assert_close(y, bias[:, None, None].expand_as(y))


@pytest.mark.parametrize("C", [12, 300])
@pytest.mark.parametrize("format", LAYOUTS, ids=str)
def test_nan_stays_in_its_pixel(C: int, format, device) -> None:
    x = randn(1, C, 2, 4, format=format, device=device)
    x[0, 3, 1, 2] = float("nan")
    with backend("triton"):
        y = layer_norm_2d(x)
    assert y[:, :, 1, 2].isnan().all()
    assert y.isnan().sum() == C


@st.composite
def maps(draw) -> Tensor:
    """Draw an fp64 map of any small size, in either memory format."""
    N, C, H, W = (draw(st.integers(1, n)) for n in (2, 9, 3, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(N, C, H, W, generator=generator, dtype=torch.float64)
    return x.contiguous(memory_format=draw(st.sampled_from(LAYOUTS)))


@given(x=maps(), shift=st.floats(-100, 100), scale=st.floats(0.1, 10))
@settings(max_examples=8, deadline=None)
def test_neither_shift_nor_scale_matters(x: Tensor, shift: float, scale: float) -> None:
    with backend("triton"):
        plain = layer_norm_2d(x, eps=1e-300)
        moved = layer_norm_2d(x * scale + shift, eps=1e-300)
    if x.shape[1] > 1:
        torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)
    else:
        assert not plain.any()


@given(x=maps(), data=st.data())
@settings(max_examples=8, deadline=None)
def test_pixels_do_not_know_each_other(x: Tensor, data) -> None:
    """Not a bit, where strides are the same: another memory order adds in another order."""
    order = torch.tensor(data.draw(st.permutations(range(x.shape[3]))))
    shuffled = x.clone(memory_format=torch.preserve_format)
    shuffled.copy_(x[..., order])
    with backend("triton"):
        assert torch.equal(layer_norm_2d(shuffled), layer_norm_2d(x)[..., order])


@given(
    M=st.integers(1, 2**31 - 2**16 - 1),
    C=st.integers(1, 9000),
    channels_last=st.booleans(),
    unit=st.sampled_from([1, 4, 8]),
    itemsize=st.sampled_from([2, 4, 8]),
    backward=st.booleans(),
    sms=st.sampled_from([2, 132]),
)
@settings(deadline=None)
def test_pick(M, C, channels_last, unit, itemsize, backward: bool, sms: int) -> None:
    view = Geometry((M, C, 1, 1), (), channels_last, unit)
    BLOCK_M, BLOCK_C, num_warps, whole = pick(view, itemsize, backward, sms)
    assert {n.bit_count() for n in (BLOCK_M, BLOCK_C, num_warps)} == {1}
    assert whole == (BLOCK_C >= C)
    assert 1 <= num_warps <= 16
    assert BLOCK_M * BLOCK_C * itemsize <= 64 * 32 * 16  # what 16 warps hold
    assert BLOCK_M < 2**16  # the last tile's pixels still fit 32 bits


@pytest.mark.parametrize(
    ("C", "HW", "format", "forward", "backward"),
    [  # the sizes ConvNeXt ships, in bf16 at batch 256: BLOCK_M, BLOCK_C, warps
        (96, 56, torch.channels_last, (32, 128, 4), (16, 128, 4)),
        (768, 7, torch.channels_last, (4, 1024, 4), (4, 1024, 8)),
        (96, 56, torch.contiguous_format, (32, 128, 4), (32, 128, 8)),
        (192, 28, torch.contiguous_format, (32, 256, 8), (32, 64, 4)),
        (768, 7, torch.contiguous_format, (32, 32, 8), (32, 32, 8)),
    ],
)
def test_tiles_of_convnext(C, HW, format, forward, backward) -> None:
    x = torch.empty(256, C, HW, HW, device="meta").to(memory_format=format)
    view = geometry(tuple(x.shape), x.stride())
    for is_backward, tile in enumerate((forward, backward)):
        assert pick(view, 2, bool(is_backward), 132)[:3] == tile
