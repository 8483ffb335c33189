"""Anti-aliased strides against timm's."""

import copy
import inspect

import pytest
import torch
from torch import nn

import vertebra
from vertebra.nn import BlurPool2d, ConvNormAct, create_aa


@pytest.mark.parity
@pytest.mark.parametrize(
    "options",
    [
        {"channels": 6},
        {},
        {"channels": 6, "filt_size": 5},
        {"channels": 6, "filt_size": 4, "stride": 1},
        {"channels": 6, "filt_size": 2, "stride": 2},
        {"channels": 6, "stride": 3},
        {"channels": 6, "stride": 4, "pad_mode": "constant"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_as_timm(options, dtype) -> None:
    from timm.layers import BlurPool2d as Peer

    start = torch.randn(2, 6, 11, 8).to(dtype)
    results: list[list[torch.Tensor]] = []
    for layer in (BlurPool2d, Peer):
        x = start.clone().requires_grad_()
        y = layer(**options, dtype=dtype)(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        results.append([y.detach(), dx])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parity
def test_signature_and_keys_are_timms() -> None:
    from timm.layers import BlurPool2d as Peer

    found, wanted = (inspect.signature(layer).parameters for layer in (BlurPool2d, Peer))
    assert {k: p.default for k, p in found.items()} == {k: p.default for k, p in wanted.items()}
    assert list(BlurPool2d(4).state_dict()) == list(Peer(4).state_dict()) == []


@pytest.mark.parity
@pytest.mark.parametrize("aa_layer", ["avg", "avg_pool", "blur", "BlurPool", "blur-pc"])
def test_names_are_timms(aa_layer: str) -> None:
    from timm.layers import ConvNormAct as Peer

    for stride in (1, 2):
        theirs = Peer(4, 6, 3, stride=stride, aa_layer=aa_layer)
        ours = ConvNormAct(4, 6, 3, stride=stride, aa_layer=aa_layer)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 4, 12, 11)
        with vertebra.backend("eager"):
            assert torch.equal(ours(x), theirs(x))


def test_loading_weights_restores_the_filter() -> None:
    """The filter is no weight: a model that got memory from `to_empty` must not miss it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BlurPool2d(4))
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 4, 1), BlurPool2d(4))
    empty.to_empty(device="cpu")[1].filt.fill_(torch.nan)
    empty.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(empty(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_factories_are_called_with_channels_and_stride() -> None:
    found = create_aa(lambda channels, stride: nn.MaxPool2d(channels, stride), 4, 2)
    assert (found.kernel_size, found.stride) == (4, 2)
    assert create_aa(nn.AvgPool2d, 4, 2).kernel_size == 2


def test_refuses_what_it_cannot_build() -> None:
    with pytest.raises(ValueError, match="filt_size must be at least 2; got 1"):
        BlurPool2d(4, filt_size=1)
    with pytest.raises(ValueError, match=r"aa_layer must be one of avg, .*; got 'gauss'"):
        create_aa("gauss", 4, 2)
