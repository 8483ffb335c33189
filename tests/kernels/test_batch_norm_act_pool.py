"""`batch_norm_act_pool` where the choice of a maximum shows: ties, NaN, and what is kept of it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vertebra.kernels import backend, batch_norm_act, batch_norm_act_pool

FORMATS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(2, 3, 9, 10), (2, 3, 6, 5), (1, 2, 1, 4), (2, 2, 3, 1), (3, 1, 2, 2), (2, 2, 1, 1)]


def pooled(x: Tensor, act: str, path: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and dx, of windows told apart by dy, by statistics that change no digit of x."""
    C = x.shape[1]
    constant = {"running_mean": torch.zeros(C), "running_var": torch.ones(C)}
    constant = {name: t.to(x.device) for name, t in constant.items()}
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with backend(path), np.errstate(all="ignore"):  # the interpreter computes with numpy
        y = batch_norm_act_pool(x, weight, None, act, training=False, eps=1e-30, **constant)
        dy = torch.arange(1.0, 1 + y.numel(), device=x.device).reshape(y.shape)
        y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ["none", "relu", "hardswish"])
def test_the_first_of_equals_wins(act: str, shape, format, device) -> None:
    """Every gradient goes where eager sends it; integers, so that nothing is rounded."""
    x = torch.randint(-2, 3, shape).float().contiguous(memory_format=format).to(device)
    weight = torch.tensor([1.0, -2.0, 0.0], device=device)[: shape[1]]
    y, dx = pooled(x, act, "triton", weight)
    expected, expected_dx = pooled(x, act, "eager", weight)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_last_nan_wins(shape, format, device) -> None:
    """And minus infinity everywhere is a maximum like any other: the first inside of the border."""
    x = torch.randint(-2, 3, shape).float()
    x[torch.rand(shape) < 0.3] = torch.nan
    x[:, -1] = -torch.inf
    x = x.contiguous(memory_format=format).to(device)
    weight = torch.ones(shape[1], device=device)
    y, dx = pooled(x, "none", "triton", weight)
    expected, expected_dx = pooled(x, "none", "eager", weight)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    assert torch.equal(dx, expected_dx)


def test_a_nan_in_training_is_a_nan_of_its_channel(device) -> None:
    x = torch.randn(2, 3, 6, 6, device=device)
    x[0, 1, 2, 3] = torch.nan
    with backend("triton"), np.errstate(all="ignore"):
        y = batch_norm_act_pool(x)
    assert y.isnan().flatten(2).all(2).all(0).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_those_of_batch_norm_act(dtype: torch.dtype, device) -> None:
    """Bit for bit, and so is what the pool picks from."""
    x = torch.randn(2, 3, 7, 6, device=device, dtype=dtype)
    found: list[tuple[Tensor, ...]] = []
    for op in (batch_norm_act_pool, batch_norm_act):
        running = {"running_mean": torch.ones(3), "running_var": torch.full((3,), 2.0)}
        running = {name: t.to(device) for name, t in running.items()}
        with backend("triton"):
            y = op(x, act="relu", momentum=0.25, **running)
        found.append((y, *running.values()))
    (y, *mine), (whole, *theirs) = found
    assert torch.equal(y, F.max_pool2d(whole, 3, 2, 1))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, torch.ones_like(a))


def saved_bytes(x: Tensor, *, requires: str, **options) -> tuple[int, list[int]]:
    """Return the bytes of maps saved beside x, and the address of every map saved."""
    weight = torch.ones(x.shape[1], device=x.device).requires_grad_("w" in requires)
    x.requires_grad_("x" in requires)
    saved: list[Tensor] = []
    with (
        backend("triton"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        batch_norm_act_pool(x, weight, **options)
    maps = [t for t in saved if t.dim() == 4]
    beside = sum(t.nbytes for t in maps if t.data_ptr() != x.data_ptr())
    return beside, [t.data_ptr() for t in maps]


def test_what_is_kept_for_the_backward_pass(device) -> None:
    x = torch.randn(2, 4, 8, 8, device=device, dtype=torch.bfloat16)
    stats = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    stats = {name: t.to(device) for name, t in stats.items()}
    quarter, places = x.nbytes // 4, x.numel() // 4
    beside, maps = saved_bytes(x, requires="xw")
    assert beside == quarter + places
    assert x.data_ptr() in maps
    beside, maps = saved_bytes(x, requires="x", training=False, **stats)
    assert beside == places
    beside, maps = saved_bytes(x, requires="w", training=False, **stats)
    assert beside == quarter
    assert x.data_ptr() not in maps


def test_only_what_is_wanted_is_computed(device) -> None:
    x = torch.randn(2, 4, 7, 8, device=device)
    weight = torch.rand(4, device=device, requires_grad=True)
    stats = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    stats = {name: t.to(device) for name, t in stats.items()}
    found = []
    for path in ("triton", "eager"):
        with backend(path):
            y = batch_norm_act_pool(x, weight, training=False, **stats)
        found.append(torch.autograd.grad(y.square().sum(), weight)[0])
    torch.testing.assert_close(found[0], found[1])
