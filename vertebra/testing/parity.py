"""Two implementations of one network side by side: the same keys, weights, outputs, statistics."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)


def build_on_meta(builder: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Build without memory, and without an initialisation that is replaced anyway."""
    with torch.device("meta"):
        return builder(*args, **kwargs)


@torch.no_grad()
def randomize(model: Module) -> Module:
    """Fill every parameter and every statistic with random values that keep activations tame."""
    if next(model.parameters()).is_meta:
        model = model.to_empty(device="cpu")
    for key, value in model.state_dict().items():
        if value.dim() > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif key.endswith(("weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.normal_(0, 0.1)
        else:
            value.fill_(7)  # num_batches_tracked
    return model


def share_weights(ours: nn.Module, peer: nn.Module) -> None:
    """Load the peer's weights into ours and ours into the peer: both strictly."""
    assert list(ours.state_dict()) == list(peer.state_dict())
    ours.load_state_dict(peer.state_dict())
    peer.load_state_dict(ours.state_dict())


def assert_same_output(ours: nn.Module, peer: nn.Module, x: Tensor) -> None:
    """Require the same bits, first in eval mode and then in training."""
    for training in (False, True):
        torch.manual_seed(1)  # dropout
        expected = peer.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(ours.train(training)(x), expected)


def assert_same_state(ours: nn.Module, peer: nn.Module) -> None:
    """Require the same keys in the same order, and the same bits under each."""
    actual, expected = ours.state_dict(), peer.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def relative_error(actual: Tensor | None, expected: Tensor | None) -> float:
    """Return the largest difference, relative to the largest expected magnitude."""
    assert actual is not None
    assert expected is not None
    difference, largest = (actual - expected).abs().max(), expected.abs().max()
    return (difference / largest.clamp_min(1e-30)).item()


def copies(model: Module) -> Iterator[Module]:
    """Yield copies of a model, made in every way that Python and PyTorch have."""
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    yield torch.load(saved, weights_only=False)


def assert_frozen(model: nn.Module, x: Tensor) -> None:
    """Require that training changes no norm, and that every parameter gets a gradient."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.eval()(x)
    assert torch.equal(model.train()(x), expected)
    model(x).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is not None for parameter in model.parameters())
