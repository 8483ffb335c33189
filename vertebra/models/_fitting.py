"""Whether weights fit a network, what keeps them from it, and which networks they do fit.

By names and shapes alone; nothing here reads a file or copies a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ._layouts import recognise
from ._registry import create_model, family_of, list_models

COUNTER = "num_batches_tracked"  # old checkpoints and frozen norms do without
_SHOWN = 5


class Sizes(NamedTuple):
    """What weights fix of a network besides its name, as `create_model` takes it."""

    num_classes: int
    in_chans: int


def sizes_of(name: str, weights: Mapping[str, Tensor], **options: Any) -> Sizes | None:
    """Return the classes and the image channels of weights for a model, None if they do not fit."""
    layout = _build_layout(name, **options) if options else _layout(name)
    last = f"{layout.classifier}weight"
    known = {*layout.weights, last, f"{layout.classifier}bias"}
    found = reshape(recognise(known, weights, layout.family), layout.weights)
    for key in differences(layout.weights, found):
        if key != layout.stem and not key.startswith(layout.classifier):
            return None
    if layout.stem not in found or found[layout.stem].dim() != 4:
        return None
    classes = len(found[last]) if last in found else 0
    return Sizes(classes, found[layout.stem].shape[1])


def fitting_models(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the models that have these weights, but for image channels and classes."""
    known = {family: _known(name, weights) for family, name in _SMALLEST.items()}
    best = max(known, key=lambda family: known[family])
    if known[best] == 0:
        return []
    return [
        name
        for name in list_models()  # of one family: to build all takes long
        if family_of(name) in (best, None) and sizes_of(name, weights) is not None
    ]


def recognise_model(weights: Mapping[str, Tensor]) -> str:
    """Return the model that weights are for, where they can be for no other.

    Raises:
        ValueError: they fit none, or several that compute different things.
    """
    names = fitting_models(weights)
    if not names:
        raise ValueError("these weights fit no model of list_models()")
    with torch.device("meta"):
        configs: list[Any] = [create_model(name).config for name in names]
    if any(_what_runs(config) != _what_runs(configs[0]) for config in configs):
        raise ValueError(f"these weights fit {', '.join(names)}, which differ in more than weights")
    return names[0]


def _what_runs(config: Any) -> dict[str, Any]:
    """Return the options of a network but those that its weights make up for."""
    return {key: value for key, value in asdict(config).items() if key not in _MADE_UP_FOR}


_MADE_UP_FOR = ("init", "zero_init_residual", "head_init_scale", "group_min_ratio")


def reshape(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fit the weights that differ from the model's in axes of length one alone."""

    def fit(key: str, weight: Tensor) -> Tensor:
        shape = own[key].shape if key in own else weight.shape
        alike = [n for n in shape if n > 1] == [n for n in weight.shape if n > 1]
        return weight.reshape(shape) if alike else weight

    return {key: fit(key, weight) for key, weight in weights.items()}


def classifier_of(model: nn.Module) -> tuple[str, bool]:
    """Return the prefix of the classifier's keys, and whether there is a classifier."""
    classifier = cast("Any", model).get_classifier()
    name = next(name for name, module in model.named_modules() if module is classifier)
    return f"{name}.", not isinstance(classifier, nn.Identity)


def stem_of(model: nn.Module) -> str:
    """Return the key of the weight that reads the image."""
    convs = (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return f"{next(convs)}.weight"


def differences(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what keeps `weights` from being copied over `own`, by key."""
    found: dict[str, str] = {}
    for key in {**own, **weights}:
        if key.endswith(COUNTER) and not (key in own and key in weights):
            continue
        ours, theirs = (_describe(values.get(key)) for values in (own, weights))
        if ours != theirs:
            found[key] = f"{theirs}, the model has {ours}"
    return found


def _describe(value: Tensor | None) -> str:
    if value is None:
        return "nothing"
    kind = "floats" if value.is_floating_point() else "integers"
    return f"{kind} of shape {tuple(value.shape)}"


def explain(found: Mapping[str, str], classifier: str, weights: Mapping[str, Tensor]) -> str:
    """Return the `differences` that were found as an error says them, with the likely fix."""
    shown = [f"  {key}: {what}" for key, what in list(found.items())[:_SHOWN]]
    if len(found) > _SHOWN:
        shown.append(f"  and {len(found) - _SHOWN} more")
    if all(key.startswith(classifier) for key in found):
        hint = (
            "Only the classifier differs: create the model with the num_classes of the weights and "
            "then call reset_classifier, or use load_weights(..., keep_classifier=True)"
        )
    elif names := _hinted(weights):
        hint = f"They fit {' or '.join(names)}, with their own in_chans and num_classes"
    else:
        hint = "They fit no registered model"
    return "\n".join(["these weights do not fit the model:", *shown, f"{hint}."])


def _hinted(weights: Mapping[str, Tensor]) -> list[str]:
    with suppress(Exception):  # a hint never hides the error it is for
        return fitting_models(weights)
    return []


_SMALLEST = {"resnet": "resnet18", "regnet": "regnet_x_400mf", "convnext": "convnext_atto"}


def _known(name: str, weights: Mapping[str, Tensor]) -> int:
    """Return how many of the weights a model has, in some layout."""
    layout = _layout(name)
    found = recognise(layout.weights.keys(), weights, layout.family)
    return len(found.keys() & layout.weights.keys())


class _Layout(NamedTuple):
    """A model's state dict, without memory, and what its keys mean."""

    weights: dict[str, Tensor]
    stem: str
    classifier: str
    family: str


@cache
def _layout(name: str) -> _Layout:
    return _build_layout(name)


def _build_layout(name: str, **options: Any) -> _Layout:
    with torch.device("meta"):
        model = create_model(name, **options)
    return _Layout(model.state_dict(), stem_of(model), classifier_of(model)[0], model.family)
