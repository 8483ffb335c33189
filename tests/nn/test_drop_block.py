"""DropBlock against timm's, by the seed, and what it promises of the map it leaves."""

import inspect

import pytest
import torch
from torch import nn

from vertebra.nn import BatchNormAct2d, DropBlock2d


@pytest.mark.parity
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 5, "gamma_scale": 0.25},
        {"block_size": 3},
        {"block_size": 4},
        {"block_size": 1},
        {"couple_channels": False},
        {"scale_by_keep": False},
        {"with_noise": True},
        {"inplace": True},
        {"drop_prob": 0.0},
        {"drop_prob": 1.0, "block_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(9, 12), (4, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_timm(options, size, dtype) -> None:
    """The same squares, outputs and gradients for the same seed, bit for bit."""
    from timm.layers import DropBlock2d as Peer

    options = {"drop_prob": 0.3, **options}
    start = torch.randn(4, 3, *size).to(dtype)
    results: list[list[torch.Tensor]] = []
    for layer in (DropBlock2d, Peer):
        x = start.clone().requires_grad_()
        torch.manual_seed(1)
        y = layer(**options)(x * 1)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        results.append([y.detach(), dx])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parity
def test_signature_is_timms() -> None:
    from timm.layers import DropBlock2d as Peer

    wanted = dict(inspect.signature(Peer).parameters)
    wanted.pop("kwargs")  # options of old, which it ignores
    found = inspect.signature(DropBlock2d).parameters
    assert {k: p.default for k, p in found.items()} == {k: p.default for k, p in wanted.items()}


def test_drops_squares_and_keeps_the_mean() -> None:
    """Every zero lies in a square of them; how many there are, a binomial distribution says."""
    N, H, size, drop_prob = 512, 14, 3, 0.1
    y = DropBlock2d(drop_prob, size)(torch.ones(N, 2, H, H))
    dropped = (y == 0).float()
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    padded = nn.functional.pad(dropped[:, :1], [2] * 4, value=1.0)  # a square may hang over
    squares = -nn.functional.max_pool2d(-padded, size, 1)
    assert torch.equal(nn.functional.max_pool2d(squares, size, 1), dropped[:, :1])
    gamma = drop_prob * H**2 / size**2 / (H - size + 1) ** 2
    reach = nn.functional.avg_pool2d(torch.ones(1, 1, H, H), size, 1, 1) * size**2
    expected = float((1 - (1 - gamma) ** reach).mean())
    seeds = N * H**2 * gamma
    assert abs(float(dropped.mean()) / expected - 1) < 6 / seeds**0.5
    torch.testing.assert_close(y.mean(), torch.tensor(1.0))


def test_idle_returns_its_input() -> None:
    x = torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    assert DropBlock2d(0.5).eval()(x) is x
    assert DropBlock2d(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_map_that_is_all_dropped_is_zero(dtype) -> None:
    y = DropBlock2d(1.0, block_size=7)(torch.ones(1, 2, 7, 7, dtype=dtype))
    assert not y.any()


@pytest.mark.parametrize("training", [False, True])
def test_stands_between_norm_and_activation(training) -> None:
    norm = BatchNormAct2d(8, drop_layer=lambda: DropBlock2d(0.5, block_size=3)).train(training)
    bare = BatchNormAct2d(8, apply_act=False).train(training)
    x, residual = torch.randn(2, 4, 8, 9, 9).unbind()
    torch.manual_seed(1)
    y = norm(x, residual)
    torch.manual_seed(1)
    torch.testing.assert_close(y, torch.relu(norm.drop(bare(x)) + residual))
