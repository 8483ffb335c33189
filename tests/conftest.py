"""Where the tests run: on the GPU when there is one, else in the Triton interpreter on the CPU."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

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


@pytest.fixture(autouse=True, scope="session")
def _light_interpreter() -> None:
    """Leave out what the Triton interpreter does over and over to no effect: most of its time.

    * At each call of a jitted function inside of a launch it puts its language in place again,
      looking through the whole of it for what is left to replace, which is nothing.
    * It computes whether integers overflow for an assertion that only its debug mode makes.
    * It builds a table of all types to look one up.
    """
    from vertebra.kernels._op import INTERPRETED

    if not INTERPRETED or find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    put_in_place, in_place = interpreter._patch_lang, interpreter._LangPatchScope()
    namespaces = language, language.core  # kernels know it by the first, Triton's own by the other

    def once_a_launch(function):
        missing = any(language.core.is_builtin(space.load) for space in namespaces)
        return put_in_place(function) if missing else in_place

    interpreter._patch_lang = once_a_launch
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)

    numpy_type = cache(interpreter._get_np_dtype)
    address = numpy_type(language.uint64)
    interpreter._get_np_dtype = lambda type: (
        address if type.scalar.is_ptr() else numpy_type(type.scalar)
    )


@pytest.fixture(autouse=True, scope="session")
def _no_tables_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let no choice that was measured on this machine decide what a test runs."""
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("torch"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_replayed() -> None:
    """Let no test meet what another had recorded or chosen: some put others in place."""
    choices = sys.modules.get("vertebra.kernels._choices")
    if choices is not None:
        choices.forget()


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """Let no test meet what others compiled: the same code Dynamo compiles a few times only."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()


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
def on_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as it is outside of the tests: kernels are not interpreted."""
    from vertebra import backend

    for name, module in list(sys.modules.items()):
        if name.startswith("vertebra.kernels.") and hasattr(module, "INTERPRETED"):
            monkeypatch.setattr(module, "INTERPRETED", False)
    with backend("auto"):
        yield


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recordings (`vertebra.kernels._recording.Text`) that were run."""
    from vertebra.kernels import _recording

    found: list[Any] = []

    class Noting(_recording.Text):
        def compiled(self) -> Callable[[torch.Tensor], torch.Tensor]:
            run = super().compiled()

            def noting(x: torch.Tensor) -> torch.Tensor:
                found.append(self)
                return run(x)

            return noting

    monkeypatch.setattr(_recording, "Text", Noting)
    return found


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
