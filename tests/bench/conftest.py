"""Plain PyTorch on images of a few pixels."""

import pytest


@pytest.fixture(autouse=True)
def _eager(eager_on_one_thread: None) -> None:
    """What is tested here is the measuring."""
