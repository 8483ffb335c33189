"""Where the tests run: on the GPU when there is one, else in the Triton interpreter on the CPU."""

import os
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

# Triton reads this once, at import: before anything of vertebra or of the peers
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from torch import nn


def _declare_torchvision_ops() -> torch.library.Library | None:
    """Declare the two operators that torchvision's CUDA wheel misses beside a CPU torch.

    Its import looks them up. Nothing here calls them.
    """
    if torch.cuda.is_available():
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_TORCHVISION = _declare_torchvision_ops()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device Triton kernels run on here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def _one_thread_per_worker() -> None:
    """Let parallel workers share the cores instead of each taking all."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_replayed() -> None:
    """Let no test meet launches recorded by another: some put other kernels in place."""
    replay = sys.modules.get("vertebra.kernels._triton._replay")
    if replay is not None:
        replay.forget()


@pytest.fixture
def eager_on_one_thread() -> Iterator[None]:
    """Plain PyTorch, for what does not test kernels: the interpreter is slow, images are small."""
    from vertebra import backend

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with backend("eager"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave weights as they are: filling those of the meta device takes most of building there."""
    for name in ("constant_", "kaiming_normal_", "kaiming_uniform_", "uniform_", "zeros_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


# the peers, where they are installed


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
