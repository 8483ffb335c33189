"""Loading of weights: read, unwrap, rename, fit to the model, check every key, and only then copy.

A checkpoint has the keys of the model itself, or those of a library in `_layouts`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._hub import download, in_folder, is_repository
from ._layouts import check_options, export, recognise
from ._network import Network
from ._pretrained import Weights, get_weight
from ._registry import create_model, family_of, list_models

Source = str | os.PathLike[str] | Mapping[str, Any] | Weights

_WRAPPERS = ("state_dict", "model", "model_ema")  # what training scripts file the weights under
_COUNTER = "num_batches_tracked"  # old checkpoints and frozen norms do without
_SHOWN = 5


def export_weights(model: Network, layout: str) -> dict[str, Tensor]:
    """Return the weights of `model` as another library names and shapes them.

    Args:
        model: built by `create_model` or a builder of this package.
        layout: "torchvision", "timm", "transformers", or for ConvNeXt "original".

    Raises:
        ValueError: there is no such layout, or that library cannot build the network.

    >>> list(export_weights(create_model("resnet18"), "transformers"))[0]
    'resnet.embedder.embedder.convolution.weight'
    """
    check_options(model.config, model.family, layout)
    return export(model.state_dict(), model.family, layout)


def load_weights(model: Network, source: Source, *, keep_classifier: bool | None = None) -> None:
    """Load a checkpoint into `model`, completely or not at all.

    Args:
        model: built by `create_model` or a builder of this package.
        source: a `.safetensors` file, a file of `torch.save` (read with `weights_only=True`), a
            folder of `save_pretrained`, a state dict, a `Weights` member or its full name, or the
            id of a repository on the Hugging Face hub ("timm/resnet50.a1_in1k"). The weights have
            the names that torchvision, timm, transformers, the original ConvNeXt or this package
            give them, may lie under "state_dict", "model" or "model_ema", and their names may
            carry the prefixes of DDP and `torch.compile`.
        keep_classifier: leave the model's classifier as it is and load the rest. None does so for
            published weights (a member, the hub) of another number of classes, which are a start
            for training; a file of yours that does not fit is an error. A model built with
            `num_classes=0` has no classifier and takes the rest anyway.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or weights that do not fit; the model is then
            unchanged. A stem for RGB images is adapted to the model's `in_chans`.
    """
    own = model.state_dict()
    if any(value.is_meta for value in own.values()):
        raise ValueError(
            "the model must have memory to copy weights into, and it is on the meta device; "
            "call model.to_empty(device=...) first"
        )
    is_published = False
    if not isinstance(source, Mapping):
        source, is_published = _find(source)
        source = _read(source)
    classifier, has_classifier = _classifier(model)
    last = f"{classifier}weight"
    weights = _renamed(model, source, own)
    if keep_classifier is None:
        keep_classifier = is_published and last in own and last in weights
        keep_classifier = keep_classifier and len(own[last]) != len(weights[last])
    if keep_classifier or not has_classifier:
        weights = {key: value for key, value in weights.items() if not key.startswith(classifier)}
        weights |= {key: value for key, value in own.items() if key.startswith(classifier)}
    stem = _stem(model)
    if stem in weights:
        weights[stem] = _adapt_stem(weights[stem], own[stem].shape[1])
    differences = _differences(own, weights)
    if differences:
        raise ValueError(_explain(differences, classifier, weights))
    model.load_state_dict({key: weights.get(key, value) for key, value in own.items()})


def fit_weights(model: Network, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a state dict of any layout with the keys and shapes of `model`.

    For loaders of other libraries, which see to the two that may differ themselves: the weight that
    reads the image, and the classifier.

    Raises:
        ValueError: others differ.
    """
    own = model.state_dict()
    found = _renamed(model, weights, own)
    classifier, _ = _classifier(model)
    stem = _stem(model)
    differences = {
        key: difference
        for key, difference in _differences(own, found).items()
        if key != stem and not key.startswith(classifier)
    }
    if differences:
        raise ValueError(_explain(differences, classifier, found))
    counters = {key: value for key, value in own.items() if key.endswith(_COUNTER)}
    known = {key: w for key, w in found.items() if key in own or not key.endswith(_COUNTER)}
    return {**counters, **known}


def _renamed(
    model: Network, source: Mapping[str, Any], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the names of `model`, and where it can in shape."""
    classifier, _ = _classifier(model)
    # known even where it is left out
    known = {*own, f"{classifier}weight", f"{classifier}bias"}
    return _reshape(recognise(known, _unwrap(source), model.family), own)


def _find(source: str | os.PathLike[str] | Weights) -> tuple[Path, bool]:
    """Return the file with the weights, fetched if need be, and whether they are published."""
    if isinstance(source, Weights):
        return source.download(), True
    name = os.fspath(source)
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if path.exists():
        return (in_folder(path) if path.is_dir() else path), False
    if "_Weights." in name:
        return get_weight(name).download(), True
    repository = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if repository != name or is_repository(name):
        return download(repository), True
    raise FileNotFoundError(f"weights: there is no file {path}")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = _load(path)
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # every reader has its own for a file it cannot make sense of
        raise ValueError(
            f"{path} must be a safetensors file, or hold a state dict of tensors and nothing else; "
            f"save it again with torch.save(model.state_dict(), path). The reader says: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a state dict; got {type(content).__name__}")
    return cast("Mapping[str, Any]", content)


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # not needed for anything else

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights themselves, under the names of the bare model."""
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return _unwrap(content[wrapper])
    weights: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"weights must be tensors, got {type(value).__name__} under {key!r}; pass a state "
                f"dict, alone or under one of {', '.join(_WRAPPERS)}"
            )
        key = key.replace("_orig_mod.", "")
        while key.startswith("module."):
            key = key.removeprefix("module.")
        weights[key] = value
    weights.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    return weights


def _reshape(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fit the weights that differ from the model's in axes of length one alone."""

    def fit(key: str, weight: Tensor) -> Tensor:
        shape = own[key].shape if key in own else weight.shape
        alike = [n for n in shape if n > 1] == [n for n in weight.shape if n > 1]
        return weight.reshape(shape) if alike else weight

    return {key: fit(key, weight) for key, weight in weights.items()}


def _classifier(model: nn.Module) -> tuple[str, bool]:
    """Return the prefix of the classifier's keys, and whether there is a classifier."""
    classifier = cast("Any", model).get_classifier()
    name = next(name for name, module in model.named_modules() if module is classifier)
    return f"{name}.", not isinstance(classifier, nn.Identity)


def _stem(model: nn.Module) -> str:
    """Return the key of the weight that reads the image."""
    convs = (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return f"{next(convs)}.weight"


def _adapt_stem(weight: Tensor, channels: int) -> Tensor:
    """Fit the weight of a stem to another number of image channels, by timm's rule.

    One channel gets the sum over all. More get those of RGB in turn, scaled to keep the sum's size.
    """
    if weight.dim() != 4 or weight.shape[1] == channels:
        return weight
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    if weight.shape[1] != 3:
        return weight
    repeated = weight.float().repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels]
    return (repeated * (3 / channels)).to(weight.dtype)


def _differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what keeps `weights` from being copied over `own`, by key."""
    differences: dict[str, str] = {}
    for key in {**own, **weights}:
        if key.endswith(_COUNTER) and not (key in own and key in weights):
            continue
        ours, theirs = (_describe(values.get(key)) for values in (own, weights))
        if ours != theirs:
            differences[key] = f"{theirs}, the model has {ours}"
    return differences


def _describe(value: Tensor | None) -> str:
    if value is None:
        return "nothing"
    kind = "floats" if value.is_floating_point() else "integers"
    return f"{kind} of shape {tuple(value.shape)}"


def _explain(differences: Mapping[str, str], classifier: str, weights: Mapping[str, Tensor]) -> str:
    shown = [f"  {key}: {what}" for key, what in list(differences.items())[:_SHOWN]]
    if len(differences) > _SHOWN:
        shown.append(f"  and {len(differences) - _SHOWN} more")
    if all(key.startswith(classifier) for key in differences):
        hint = (
            "Only the classifier differs: create the model with the num_classes of the weights and "
            "then call reset_classifier, or use load_weights(..., keep_classifier=True)"
        )
    elif names := _fitting_models(weights):
        hint = f"They fit {' or '.join(names)}, with their own in_chans and num_classes"
    else:
        hint = "They fit no registered model"
    return "\n".join(["these weights do not fit the model:", *shown, f"{hint}."])


def _fitting_models(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the models that have these weights, but for image channels and classes."""
    names: list[str] = []
    with suppress(Exception):  # a hint never hides the error it is for
        best = max(_SMALLEST, key=lambda family: _known(_SMALLEST[family], weights))
        for name in list_models():  # of one family: to build all takes long
            if family_of(name) not in (best, None):
                continue
            own, stem, classifier, family = _layout(name)
            found = _reshape(recognise(own.keys(), weights, family), own)
            if all(key == stem or key.startswith(classifier) for key in _differences(own, found)):
                names.append(name)
    return names


_SMALLEST = {"resnet": "resnet18", "regnet": "regnet_x_400mf", "convnext": "convnext_atto"}


def _known(name: str, weights: Mapping[str, Tensor]) -> int:
    """Return how many of the weights a model has, in some layout."""
    own, _, _, family = _layout(name)
    return len(recognise(own.keys(), weights, family).keys() & own.keys())


@cache
def _layout(name: str) -> tuple[dict[str, Tensor], str, str, str]:
    """Return a model's state dict, without memory, its stem's key, classifier and family."""
    with torch.device("meta"):
        model = create_model(name)
    return model.state_dict(), _stem(model), _classifier(model)[0], model.family
