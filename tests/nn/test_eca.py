"""Efficient channel attention against timm's module."""

import pytest
import torch
from torch import nn

import vertebra
from vertebra.nn import EcaModule


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"gate_layer": "hard_sigmoid"}, {"gamma": 1, "beta": 2}])
@pytest.mark.parametrize("channels", [8, 24, 96, 2048])
def test_as_timm(options, channels: int) -> None:
    """The same key, kernel and bits."""
    from timm.layers import EcaModule as Peer

    ours, theirs = EcaModule(channels, **options), Peer(channels, **options)
    ours.load_state_dict(theirs.state_dict())
    assert ours.conv.kernel_size == theirs.conv.kernel_size
    start = torch.randn(2, channels, 5, 3)
    results: list[list[torch.Tensor]] = []
    for module in (ours, theirs):
        x = start.clone().requires_grad_()
        with vertebra.backend("eager"):
            y = module(x)
            y.square().sum().backward()
        results.append([y.detach(), x.grad, module.conv.weight.grad])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parity
def test_kernels_are_timms() -> None:
    from timm.layers import EcaModule as Peer

    for channels in (1, 2, 3, 7, 8, 9, *(2**k for k in range(4, 15)), 320, 1536):
        assert EcaModule(channels).conv.kernel_size == Peer(channels).conv.kernel_size


def test_means_come_from_the_op(device) -> None:
    """The Triton path gives what eager gives, and its gradients."""
    module = EcaModule(kernel_size=5).to(device)
    x = torch.randn(2, 6, 4, 5, device=device, requires_grad=True)
    results: list[tuple[torch.Tensor, ...]] = []
    for path in ("eager", "triton"):
        with vertebra.backend(path):
            y = module(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, module.conv.weight])))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_refuses_an_even_kernel() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd; got 4"):
        EcaModule(kernel_size=4)
    assert isinstance(EcaModule(8, gate_layer=nn.Hardsigmoid).gate, nn.Hardsigmoid)
