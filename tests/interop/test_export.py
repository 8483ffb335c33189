"""Programs exported where kernels are, for batches of any size: the same answers, none refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

import vertebra
from vertebra.bench import peers
from vertebra.kernels import _op
from vertebra.models import RegNetConfig, ResNetConfig
from vertebra.models.regnet import RegNet
from vertebra.models.resnet import ResNet
from vertebra.testing.parity import randomize


@pytest.fixture(autouse=True)
def _on_kernels() -> Iterator[None]:
    with vertebra.backend("auto"):
        yield


def _resnet() -> nn.Module:
    return ResNet(ResNetConfig("bottleneck", layers=(2,), hidden_sizes=(16,), embedding_size=8))


def _regnet() -> nn.Module:
    config = RegNetConfig("y", hidden_sizes=(16,), depths=(2,), group_width=8, stem_width=8)
    return RegNet(config)


def _torchvision() -> nn.Module:
    regnet = peers.torchvision_module("models.regnet")
    blocks = regnet.BlockParams([2], [16], [8], [1.0], [2], se_ratio=0.25)
    return regnet.RegNet(blocks, num_classes=5)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain resnet": _resnet,
    "plain regnet": _regnet,
    "fused resnet": lambda: vertebra.fuse(randomize(_resnet()).eval()),
    "fused regnet": lambda: vertebra.fuse(randomize(_regnet()).eval()),
    "accelerated": lambda: vertebra.accelerate(_torchvision()),
    "fused, of torchvision": lambda: vertebra.fuse(randomize(_torchvision()).eval()),
}


def exported(model: nn.Module, strict: bool = False) -> ExportedProgram:
    x = torch.randn(2, 3, 16, 16, device=next(model.parameters()).device)
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=({0: Dim("N")},), strict=strict)


def ops(program: ExportedProgram) -> set[str]:
    """Return the names of our ops in a program."""
    targets = {str(node.target) for node in program.graph.nodes}
    return {name.split(".")[1] for name in targets if name.startswith("vertebra.")}


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_any_size(name: str, device: torch.device) -> None:
    model = randomize(MODELS[name]()).eval().to(device)
    program = exported(model)
    wanted = {"conv2d_act"} if name.startswith("fused") else {"scale_bias_act"}
    assert wanted <= ops(program)
    with torch.no_grad():
        for N in (3, 1, 0):
            x = torch.randn(N, 3, 16, 16, device=device)
            y = program.module()(x)
            with vertebra.backend("eager"):
                torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-3)


def test_by_dynamo(device: torch.device) -> None:
    model = randomize(_resnet()).eval().to(device)
    program = exported(model, strict=True)
    assert "scale_bias_act" in ops(program)
    assert program.module()(torch.randn(5, 3, 16, 16, device=device)).shape == (5, 1000)


def test_what_is_too_large_is_refused_when_it_runs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = exported(randomize(_regnet()).eval().to(device)).module()
    monkeypatch.setattr(_op, "_MAX_PIXELS", 3 * 8 * 8)
    assert program(torch.randn(2, 3, 16, 16, device=device)).shape == (2, 1000)
    with pytest.raises(NotImplementedError, match=r"scale_bias_act.*32-bit.*smaller batches"):
        program(torch.randn(3, 3, 16, 16, device=device))


@torch.no_grad()
def test_sizes_that_are_known_are_asked_for(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = randomize(_regnet()).eval().to(device), torch.randn(2, 3, 16, 16, device=device)
    assert ops(torch.export.export(model, (x,)))
    monkeypatch.setattr(_op, "_MAX_PIXELS", 1)
    assert not ops(torch.export.export(model, (x,)))
