"""Whole networks on the Triton path, against fp64 and no worse than twice eager PyTorch.

Rounding errors grow through fifty layers, in eager as here, and which tensor they hit most is
chance: every tensor's relative error is held to twice the largest of eager.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import vertebra


def _pass(model: nn.Module, x: Tensor, dy: Tensor, path: str) -> dict[str, Tensor]:
    """Run a copy of `model` forward and backward; return the logits, gradients and statistics."""
    model = copy.deepcopy(model).to(x.dtype)
    with vertebra.backend(path):
        y = model(x)
        y.backward(dy)
    named = {"y": y.detach()}
    named |= {f"d {name}": p.grad for name, p in model.named_parameters()}
    return named | {name: b for name, b in model.named_buffers() if b.is_floating_point()}


SMALL = {"hidden_sizes": (32, 64, 96), "layers": (1, 1, 1)}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("resnet18", SMALL, 32),
        ("resnet50", SMALL, 32),
        pytest.param("resnet18", {}, 64, marks=pytest.mark.thorough),
        pytest.param("resnet50", {}, 64, marks=pytest.mark.thorough),
        pytest.param("convnext_atto", {}, 64, marks=pytest.mark.thorough),
        pytest.param("convnextv2_atto", {}, 64, marks=pytest.mark.thorough),
    ],
)
def test_network_on_triton(name: str, options, size: int, training: bool, device, randomize):
    model = randomize(vertebra.create_model(name, num_classes=10, **options))
    model = model.to(device).train(training)
    x, dy = torch.randn(2, 3, size, size, device=device), torch.randn(2, 10, device=device)
    model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    truth = _pass(model, x.double(), dy.double(), "eager")
    eager = _pass(model, x, dy, "eager")
    found = _pass(model, x, dy, "triton")
    largest = max(_error(eager[key], value) for key, value in truth.items())
    for key, value in truth.items():
        assert _error(found[key], value) <= 2 * largest, key


def _error(actual: Tensor, truth: Tensor) -> float:
    eps = torch.finfo(actual.dtype).eps
    return ((actual - truth).norm() / truth.norm()).item() + eps
