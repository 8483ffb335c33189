"""Plain PyTorch on one thread: what is tested here is the measuring, on images of a few pixels."""

from collections.abc import Iterator

import pytest
import torch

import vertebra


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with vertebra.backend("eager"):
        yield
    torch.set_num_threads(threads)
