"""The peers, where they are installed, on plain PyTorch."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import vertebra


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
def timm() -> ModuleType:
    return pytest.importorskip("timm")


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers")
