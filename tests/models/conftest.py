"""The peers, where they are installed, and random weights that leave nothing at its default."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

import vertebra
from vertebra.testing.parity import randomize


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


@pytest.fixture
def no_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave weights as they are: filling those of the meta device takes most of building there."""
    for name in ("constant_", "kaiming_normal_", "kaiming_uniform_", "uniform_", "zeros_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.fixture(name="randomize", scope="session")
def _randomize():
    return randomize
