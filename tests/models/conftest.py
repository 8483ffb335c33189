"""Plain PyTorch, and random weights that leave nothing at its default."""

import pytest

from vertebra.testing.parity import randomize


@pytest.fixture(autouse=True)
def _eager(eager_on_one_thread: None) -> None:
    """What is tested here is the models."""


@pytest.fixture(name="randomize", scope="session")
def _randomize():
    return randomize
