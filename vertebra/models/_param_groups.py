"""Parameter groups for an optimizer: what decays, and how fast each layer learns."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatch
from typing import Any

from torch import nn

Matcher = dict[str, str | list[tuple[str, tuple[int, ...] | None]]]
"""timm's way to say which layer a parameter belongs to.

Kinds of layers in order, each with a pattern for names; what its groups catch is the number of the
layer. Or several patterns, each with what follows that number; `WITH_PREVIOUS` there joins the
layer to the one before it. What no pattern matches is the last layer.
"""

WITH_PREVIOUS = (99999,)


def param_groups_weight_decay(
    model: nn.Module,
    weight_decay: float = 1e-5,
    no_weight_decay_list: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return the parameters that do not decay and those that do, as timm's function of this name.

    Biases and all other vectors do not: the weights of norms, and the layer scales of a ConvNeXt,
    which have shape (C,) here and in timm. In torchvision they have shape (C, 1, 1), and rules that
    ask for vectors let them decay.

    Args:
        model: whose parameters; frozen ones are left out.
        weight_decay: of those that decay; with 0 all are in one group.
        no_weight_decay_list: names of more that do not, with wildcards as in a file name.

    >>> groups = param_groups_weight_decay(nn.Linear(2, 3), 0.05)
    >>> [(group["weight_decay"], len(group["params"])) for group in groups]
    [(0.0, 1), (0.05, 1)]
    """
    kept: list[nn.Parameter] = []
    decaying: list[nn.Parameter] = []
    for name, parameter in _learning(model):
        is_kept = not weight_decay or parameter.ndim <= 1 or name.endswith(".bias")
        is_kept = is_kept or _matches(name, no_weight_decay_list)
        (kept if is_kept else decaying).append(parameter)
    groups = (
        {"params": kept, "weight_decay": 0.0},
        {"params": decaying, "weight_decay": weight_decay},
    )
    return [group for group in groups if group["params"]]


def param_groups_layer_decay(
    model: nn.Module,
    weight_decay: float = 0.05,
    layer_decay: float = 0.75,
    no_weight_decay_list: Collection[str] = (),
    min_scale: float = 0.0,
) -> list[dict[str, Any]]:
    """Return the parameters by layer, and by whether they decay, as timm's function of this name.

    Each group has an `lr_scale`, 1 for the head and less by the factor `layer_decay` for each layer
    before it. torch's optimizers carry it along and do not read it: a scheduler multiplies by it,
    as timm's do. Vectors do not decay; for layer scales see `param_groups_weight_decay`.

    Args:
        model: one that has a `group_matcher`, as all networks here and in timm; frozen parameters
            are left out.
        weight_decay: of those that decay.
        layer_decay: factor from one layer to the one before it.
        no_weight_decay_list: names of more that do not decay, with wildcards as in a file name.
        min_scale: the least `lr_scale`.

    Raises:
        ValueError: the model does not say what its layers are.
    """
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            f"layer decay needs a model with a group_matcher, and {type(model).__name__} has none; "
            "give the network itself, without the head or wrapper around it"
        )
    matcher: Any = model.group_matcher
    layers = number_layers((name for name, _ in model.named_parameters()), matcher(coarse=False))
    last = max(layers.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in _learning(model):
        is_kept = parameter.ndim <= 1 or _matches(name, no_weight_decay_list)
        group = groups.setdefault(
            (layers[name], is_kept),
            {
                "lr_scale": max(min_scale, layer_decay ** (last - layers[name])),
                "weight_decay": 0.0 if is_kept else weight_decay,
                "params": [],
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def number_layers(names: Iterable[str], matcher: Matcher) -> dict[str, int]:
    r"""Return the number of the layer of each parameter, counted from the image.

    >>> matcher = {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
    >>> number_layers(["stem.weight", "stages.0.weight", "stages.4.weight", "fc.weight"], matcher)
    {'stem.weight': 0, 'stages.0.weight': 1, 'stages.4.weight': 2, 'fc.weight': 3}
    """
    places = {name: _place(name, matcher) for name in names}
    numbers: dict[tuple[float, ...], int] = {}
    number = -1
    for place in sorted(set(places.values())):
        if number < 0 or place[-1:] != WITH_PREVIOUS:
            number += 1
        numbers[place] = number
    return {name: numbers[place] for name, place in places.items()}


def _place(name: str, matcher: Matcher) -> tuple[float, ...]:
    for kind, patterns in enumerate(matcher.values()):
        for pattern, suffix in [(patterns, None)] if isinstance(patterns, str) else patterns:
            if found := re.match(pattern, name):
                return (kind, *(int(n) for n in found.groups() if n is not None), *(suffix or ()))
    return (math.inf,)


def _learning(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
