"""The peers' models, and weights for them that make a benchmark's check mean something."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..models import create_model, export_weights
from ..models._network import Network
from ..testing.parity import build_on_meta
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
    if name.startswith("convnext"):  # trained with a depth that is random, others are without
        options = {"stochastic_depth_prob": 0.0, **options}
    return models.get_model(name, **options)


def timm_model(name: str) -> nn.Module:
    """Build timm's model of that name."""
    library: Any = timm()
    if not library.is_model(name):
        raise Unavailable(f"timm has no {name}")
    return library.create_model(name)


def transformers_model(name: str) -> nn.Module:
    """Build transformers' model with the configuration that ours of this name has, unfilled."""
    library = transformers()
    ours: Any = build_on_meta(create_model, name)
    config = ours.config
    if ours.family == "resnet":
        options = {"depths": list(config.layers), "layer_type": config.block}
        settings: Any = library.ResNetConfig(
            hidden_sizes=list(config.channels), embedding_size=config.stem_channels, **options
        )
        build: Any = library.ResNetForImageClassification
    elif ours.family == "regnet":
        depths, widths = zip(*((len(s), s[0].out_channels) for s in config.stages()), strict=True)
        settings = library.RegNetConfig(
            hidden_sizes=list(widths),
            depths=list(depths),
            groups_width=config.group_width,
            layer_type=config.layer_type,
        )
        build = library.RegNetForImageClassification
    else:
        options = {"hidden_sizes": list(config.channels), "depths": list(config.depths)}
        if config.use_grn:
            settings = library.ConvNextV2Config(**options)
            build = library.ConvNextV2ForImageClassification
        else:
            settings = library.ConvNextConfig(**options)
            build = library.ConvNextForImageClassification
        settings.layer_norm_eps = 1e-6  # of the last norm: not what published weights have
    settings.num_labels = 1000
    peer = build_on_meta(build, settings)
    shapes = {key: value.shape for key, value in peer.state_dict().items()}
    if shapes != {key: value.shape for key, value in _exported(ours, "transformers").items()}:
        raise Unavailable("transformers cannot express it")
    return peer


LIBRARIES: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "transformers": transformers_model,
}


def reference_model(name: str) -> tuple[str, nn.Module]:
    """Build the model that is right by definition, torchvision's, or timm's where it has none.

    Returns:
        The library, and its model.
    """
    with suppress(Unavailable):
        return "torchvision", torchvision_model(name)
    return "timm", timm_model(name)


def build(library: str, name: str, ours: Network) -> nn.Module:
    """Build a library's model of the network that `ours` is, with the weights of `ours`."""
    weights = _exported(ours, library)
    shapes = {key: weight.shape for key, weight in weights.items()}
    reason = ""
    for namesake in _namesakes(name):
        try:
            model = LIBRARIES[library](namesake)
        except Unavailable as error:
            reason = reason or str(error)
            continue
        if shapes == {key: weight.shape for key, weight in model.state_dict().items()}:
            if any(parameter.is_meta for parameter in model.parameters()):
                model = model.to_empty(device="cpu")
            model.load_state_dict(weights)
            return model
        reason = f"{library}'s {namesake} is another network"
    raise Unavailable(reason)


def _namesakes(name: str) -> list[str]:
    """Return what libraries may call a network: torchvision and timm count RegNets differently."""
    if found := re.fullmatch(r"regnet_([xy])_(\d+)(?:_(\d))?(mf|gf)", name):
        kind, whole, tenths, unit = found.groups()
        size = int(whole) // 100 if unit == "mf" else 10 * int(whole) + int(tenths or 0)
        return [name, f"regnet{kind}_{size:03}", f"regnet{kind}_{size:03}_tv"]
    if found := re.fullmatch(r"regnet([xy])_(\d{3,4})(?:_tv)?", name):
        kind, size = found[1], int(found[2])
        whole = f"{size // 10}_{size % 10}" if size % 10 else f"{size // 10}"
        return [name, f"regnet_{kind}_{f'{100 * size}mf' if size < 10 else f'{whole}gf'}"]
    return [name]


def _exported(ours: Network, library: str) -> dict[str, Tensor]:
    try:
        return export_weights(ours, library)
    except ValueError as error:
        raise Unavailable(str(error)) from None


@torch.no_grad()
def randomise(model: nn.Module, images: Tensor, seed: int) -> None:
    """Give `model` random weights, statistics included, that tell a right answer from a wrong one.

    A freshly built network will not do. Norms of a ResNet-50 are identities, its top-1 is the same
    for every image, and its training gradients are chaotic: in bf16, eager PyTorch's own are 100 %
    wrong. The blocks of a ConvNeXt are scaled to nothing. So: random scales and shifts in every
    norm; small scales where a residual branch ends and shifts that keep most ReLUs open, for well
    conditioned gradients; running statistics near those of `images`, so that activations keep their
    size; and a classifier whose bias removes what all images have in common.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not batch_norms:
        _randomise_plain(model, generator)
    _randomise_batch_norms(model, batch_norms, images, generator)
    classifier = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    classifier.bias -= model.eval()(images).mean(0)


_LAST_OF_A_BRANCH = re.compile(r"\.f\.c\.1|\.conv3\.bn")  # of RegNets, whose start is not at 0


def _randomise_batch_norms(
    model: nn.Module, norms: list[nn.BatchNorm2d], images: Tensor, generator: torch.Generator
) -> None:
    names = {module: name for name, module in model.named_modules()}
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        is_last = not norm.weight.any() or _LAST_OF_A_BRANCH.search(names[norm])
        scale = 0.1 if is_last else 1.0
        norm.weight.uniform_(0.5 * scale, 1.5 * scale, generator=generator)
        norm.bias.normal_(1.0, 0.5, generator=generator)
        norm.momentum = None  # the plain mean, of one batch
        norm.reset_running_stats()
    if not norms:
        return
    for module in model.modules():  # squeeze and excitation has them, at 0
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.normal_(0, 0.5, generator=generator)
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.momentum = momentum
        spread = norm.running_var.sqrt()
        norm.running_mean += 0.1 * spread * torch.randn(len(spread), generator=generator)
        norm.running_var *= torch.empty_like(spread).uniform_(0.8, 1.25, generator=generator)


def _randomise_plain(model: nn.Module, generator: torch.Generator) -> None:
    """Randomise a network that remembers nothing of its images: a ConvNeXt."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.numel() > len(parameter):
            fan_in = parameter[0].numel()
            parameter.normal_(0, fan_in**-0.5, generator=generator)
        elif name.endswith(("gamma", "layer_scale")):
            parameter.uniform_(0.1, 0.5, generator=generator)
        elif ".grn." in name or name.endswith("bias"):
            parameter.normal_(0, 0.5, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
