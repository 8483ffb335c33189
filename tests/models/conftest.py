"""Plain PyTorch, and random weights that leave nothing at its default."""

import pytest
from torch import nn

from vertebra.testing.parity import randomize


@pytest.fixture(autouse=True)
def _eager(eager_on_one_thread: None) -> None:
    """What is tested here is the models."""


@pytest.fixture
def no_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave weights as they are: filling those of the meta device takes most of building there."""
    for name in ("constant_", "kaiming_normal_", "kaiming_uniform_", "uniform_", "zeros_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.fixture(name="randomize", scope="session")
def _randomize():
    return randomize
