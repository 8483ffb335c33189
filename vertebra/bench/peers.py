"""The peers' models, and weights for them that make a benchmark's check mean something."""

from __future__ import annotations

import importlib
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .runner import Unavailable

_declared: list[torch.library.Library] = []


def torchvision() -> ModuleType:
    """Import torchvision, also where its compiled ops do not load."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    # A wheel built for another torch (its CUDA build beside a CPU one) registers none of its ops,
    # then fails to attach meta functions to two of them. No classification model uses either, so
    # declaring them, without an implementation, is enough for the Python part to import.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")


def torchvision_module(name: str) -> Any:
    """Import `torchvision.<name>`."""
    torchvision()
    return importlib.import_module(f"torchvision.{name}")


def timm() -> ModuleType:
    """Import timm, which imports torchvision."""
    torchvision()
    return importlib.import_module("timm")


def transformers() -> Any:
    """Import transformers, which imports torchvision where that is installed."""
    with suppress(ImportError):
        torchvision()
    return importlib.import_module("transformers")


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """Build torchvision's model of that name; the seed in force decides its weights."""
    models = torchvision_module("models")
    if name not in models.list_models(models):
        raise Unavailable(f"torchvision has no {name}")
    if name.startswith(("resnet", "resnext", "wide_resnet")):
        options = {"zero_init_residual": True, **options}
    return models.get_model(name, **options)


def timm_model(name: str) -> nn.Module:
    """Build timm's model of that name."""
    library: Any = timm()
    if not library.is_model(name):
        raise Unavailable(f"timm has no {name}")
    return library.create_model(name)


def reference_model(name: str) -> nn.Module:
    """Build the model that is right by definition: torchvision's, or timm's where it has none."""
    try:
        return torchvision_model(name)
    except Unavailable:
        return timm_model(name)


def load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load weights of the reference model into a peer's."""
    if model.state_dict().keys() != state.keys():
        raise Unavailable("its weights have other names than the reference model's")
    model.load_state_dict(state)
    return model


@torch.no_grad()
def randomise(model: nn.Module, images: Tensor, seed: int) -> None:
    """Give `model` random weights, statistics included, that tell a right answer from a wrong one.

    A freshly built ResNet-50 will not do: its norms are identities, its top-1 is the same for every
    image, and its training gradients are chaotic: in bf16, eager PyTorch's own are 100 % wrong. So:
    random scales and shifts in every norm; small scales where a residual branch ends (the
    architecture starts them at 0) and shifts that keep most ReLUs open, for well conditioned
    gradients; running statistics near those of `images`, so that activations keep their size; and a
    classifier whose bias removes what all images have in common.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        scale = 1.0 if norm.weight.any() else 0.1
        norm.weight.uniform_(0.5 * scale, 1.5 * scale, generator=generator)
        norm.bias.normal_(1.0, 0.5, generator=generator)
        norm.momentum = None  # the plain mean, of one batch
        norm.reset_running_stats()
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.momentum = momentum
        spread = norm.running_var.sqrt()
        norm.running_mean += 0.1 * spread * torch.randn(len(spread), generator=generator)
        norm.running_var *= torch.empty_like(spread).uniform_(0.8, 1.25, generator=generator)
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    classifier.bias -= model.eval()(images).mean(0)
