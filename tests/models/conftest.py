"""The peers, where they are installed, and random weights that leave nothing at its default."""

from collections.abc import Iterator
from types import ModuleType
from typing import TypeVar

import pytest
import torch
from torch import nn

import vertebra

Module = TypeVar("Module", bound=nn.Module)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Run on plain PyTorch: what is tested here is the models, and the interpreter is slow."""
    with vertebra.backend("eager"):
        yield


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Images this small do not feed two threads, least of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    pytest.importorskip("torchvision.ops")
    return pytest.importorskip("torchvision.models.resnet")


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    return pytest.importorskip("timm")


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")


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


@pytest.fixture
def no_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave weights as they are: filling those of the meta device takes most of building there."""
    for name in ("constant_", "kaiming_normal_", "kaiming_uniform_", "uniform_", "zeros_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.fixture(name="randomize", scope="session")
def _randomize():
    return randomize
