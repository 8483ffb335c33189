"""Fused networks at their peak hold no more memory than the networks that they were made from."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import vertebra
from vertebra.bench import peers
from vertebra.bench.memory import peak_bytes
from vertebra.kernels._op import INTERPRETED
from vertebra.models import ConvNeXtConfig, RegNetConfig, ResNetConfig
from vertebra.models.convnext import ConvNeXt
from vertebra.models.regnet import RegNet
from vertebra.models.resnet import ResNet
from vertebra.testing.parity import randomize

CPU = torch.device("cpu")
MIB = 2**20


def test_what_is_held_at_once_is_counted_once() -> None:
    x = torch.ones(MIB)
    assert peak_bytes(lambda: None, CPU) == 0
    assert peak_bytes(lambda: -x, CPU) == 4 * MIB
    assert peak_bytes(lambda: (-x).abs().neg(), CPU) == 8 * MIB  # of three, two at a time
    assert peak_bytes(lambda: [-x, x.abs(), x * x], CPU) == 12 * MIB
    assert peak_bytes(lambda: (x * x).add_(x).view(2, -1)[0].t(), CPU) == 4 * MIB


def test_what_was_there_before_and_what_operations_hide_is_told_apart() -> None:
    x = [torch.ones(MIB)]
    assert peak_bytes(x.clear, CPU) == 0
    y, weight = torch.randn(1, 64, 8, 8), torch.randn(64, 64, 3, 3)
    alone = peak_bytes(lambda: torch.conv2d(y, weight), CPU)
    assert alone > 64 * 36 * 4  # also what a convolution makes of its weight


def test_an_error_ends_the_count() -> None:
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 // 0, CPU)
    assert peak_bytes(lambda: torch.ones(MIB), CPU) == 4 * MIB


# ---------------------------------------------------------------------------------- fused networks


def _resnet(block: str) -> nn.Module:
    return ResNet(ResNetConfig(block, layers=(3, 2), hidden_sizes=(32, 64), embedding_size=16))


def _regnet(kind: str) -> nn.Module:
    shape = {"hidden_sizes": (16, 32), "depths": (2, 3), "group_width": 8, "stem_width": 16}
    return RegNet(RegNetConfig(kind, **shape))


def _convnext(v2: bool) -> nn.Module:
    options = {"use_grn": True, "ls_init_value": None} if v2 else {}
    return ConvNeXt(ConvNeXtConfig(depths=(2, 2), dims=(16, 32), **options))


def _torchvision_resnet(block: str) -> nn.Module:
    resnet = peers.torchvision_module("models.resnet")
    return resnet.ResNet(getattr(resnet, block), (2, 2, 1, 1), num_classes=5)


def _torchvision_regnet(**options: Any) -> nn.Module:
    regnet = peers.torchvision_module("models.regnet")
    blocks = regnet.BlockParams([2, 3], [16, 32], [8, 8], [1.0, 1.0], [2, 2], **options)
    return regnet.RegNet(blocks, num_classes=5)


def _timm_regnet() -> nn.Module:
    regnet = peers.timm().models.regnet
    shape = {"depth": 6, "w0": 16, "wa": 16, "wm": 1.7, "group_size": 8, "stem_width": 16}
    return regnet.RegNet(regnet.RegNetCfg(**shape, se_ratio=0.25), num_classes=5)


def _timm_convnext(**options: Any) -> nn.Module:
    shape: dict[str, Any] = {"depths": (2, 2, 1, 1), "dims": (16, 32, 32, 32), "num_classes": 5}
    return peers.timm().models.convnext.ConvNeXt(**shape, **options)


def _transformers(family: str, **options: Any) -> nn.Module:
    library = peers.transformers()
    shape = {"hidden_sizes": [16, 32], "depths": [2, 3], "num_labels": 5, **options}
    config = getattr(library, f"{family}Config")(**shape)
    return getattr(library, f"{family}ForImageClassification")(config)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: _resnet("basic"),
    "bottleneck": lambda: _resnet("bottleneck"),
    "regnet x": lambda: _regnet("x"),
    "regnet y": lambda: _regnet("y"),
    "convnext": lambda: _convnext(v2=False),
    "convnext v2": lambda: _convnext(v2=True),
    "torchvision basic": lambda: _torchvision_resnet("BasicBlock"),
    "torchvision bottleneck": lambda: _torchvision_resnet("Bottleneck"),
    "torchvision regnet x": _torchvision_regnet,
    "torchvision regnet y": lambda: _torchvision_regnet(se_ratio=0.25),
    "timm regnet y": _timm_regnet,
    "timm convnext": _timm_convnext,
    "timm convnext v2": lambda: _timm_convnext(use_grn=True, ls_init_value=None),
    "transformers bottleneck": lambda: _transformers("ResNet", embedding_size=16),
    "transformers regnet y": lambda: _transformers("RegNet", embedding_size=16, groups_width=8),
    "transformers convnext": lambda: _transformers("ConvNext", num_stages=2),
    "transformers convnext v2": lambda: _transformers("ConvNextV2", num_stages=2),
}


@pytest.fixture
def _freed_by_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the Triton interpreter, too, let go of what a launch was given when that is done.

    It leaves a cycle of references to it for the garbage collector to find.
    """
    if not INTERPRETED:
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__

    def launch_and_collect(*args: Any, **kwargs: Any) -> None:
        launch(*args, **kwargs)
        gc.collect()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_and_collect)
    gc.collect()
    gc.freeze()  # all that was there before need not be looked through each time
    yield
    gc.unfreeze()


def peaks(
    model: nn.Module, x: torch.Tensor, backend: Any, device: torch.device = CPU, calls: int = 1
) -> tuple[int, int]:
    """Return the peak of a model in eager PyTorch, and that of the model fused."""
    model = randomize(model).eval().to(device, memory_format=torch.channels_last)
    x = x.to(device, memory_format=torch.channels_last)
    fused = vertebra.fuse(model)
    with torch.inference_mode(), vertebra.backend("eager"):
        model(x)
        eager = peak_bytes(lambda: model(x), device)
    with torch.inference_mode(), vertebra.backend(backend):
        fused(x)  # packs the weights, which stay
        # also of the call that is recorded, on CPUs, and of the recording
        return eager, max(peak_bytes(lambda: fused(x), device) for _ in range(calls))


@pytest.mark.usefixtures("on_onednn")
@pytest.mark.parametrize("name", NETWORKS)
def test_on_onednn(name: str) -> None:
    eager, fused = peaks(NETWORKS[name](), torch.randn(2, 3, 64, 48), "auto", calls=3)
    assert 0 < fused <= eager


@pytest.mark.usefixtures("_freed_by_the_interpreter")
@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="older Pythons keep a call's arguments until it returns"
)
@pytest.mark.parametrize("name", NETWORKS)
def test_on_kernels(name: str, device: torch.device) -> None:
    # no kernel of ours is depthwise
    backend = "auto" if "convnext" in name else "triton"
    eager, fused = peaks(NETWORKS[name](), torch.randn(1, 3, 32, 32), backend, device)
    assert 0 < fused <= eager
