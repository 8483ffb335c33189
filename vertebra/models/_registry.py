"""The registry: every model under the name torchvision or timm gives it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from ._features import Indices
from ._network import Network
from ._pretrained import member_of, weights_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from ._weights import Source

Builder = Callable[..., Network]
B = TypeVar("B", bound=Builder)
C = TypeVar("C", bound="DataclassInstance")

_builders: dict[str, Builder] = {}


def register_model(builder: B, *, name: str | None = None) -> B:
    """Make a builder reachable through `create_model`; use it as a decorator.

    The builder takes the keyword arguments of `create_model` and is known by its own name, unless
    `name` gives another (a `functools.partial` has none).
    """
    key: str = name or getattr(builder, "__name__", "")
    if not key:
        raise ValueError(f"a builder without a name needs name=...; got {builder!r}")
    if key in _builders:
        raise ValueError(f"model {key!r} is registered already; choose another name")
    _builders[key] = builder
    return builder


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Return the sorted names that match a shell pattern.

    With `pretrained`, only those of models with weights in `get_weight`'s list.

    >>> list_models("wide_*")
    ['wide_resnet101_2', 'wide_resnet50_2']
    """
    names = sorted(name for name in _builders if fnmatchcase(name, pattern))
    return [name for name in names if weights_of(name)] if pretrained else names


def family_of(name: str) -> str | None:
    """Return the family of a model, None where its builder does not say what it returns."""
    builder: Any = _builders[name]
    built = get_type_hints(getattr(builder, "func", builder)).get("return")
    return getattr(built, "family", None)


def create_model(
    name: str,
    *,
    weights: Source | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: Indices = None,
    output_stride: int = 32,
    **overrides: Any,
) -> Network:
    """Build a model by name.

    Args:
        name: one of `list_models()`.
        weights: what `load_weights` takes: a path, a state dict, a `Weights` member, a hub id. Or a
            member of this model's weights by its own name: "DEFAULT". None for random weights.
        num_classes: outputs of the classifier; 0 for none. Published weights of another number of
            classes leave the classifier random.
        in_chans: channels of the image; a checkpoint for three is adapted.
        features_only: return feature maps, a list of them, described by `model.feature_info`; what
            comes after the last one is dropped. Keys stay what they are.
        out_indices: which maps, negative numbers from the end, or how many last ones; None for all.
        output_stride: 32, or 16 or 8 to trade the last strides for dilation.
        overrides: any other field of the family's config, by our, timm's or transformers' name.
            None stands for the default.

    >>> create_model("resnet18", num_classes=10).fc
    Linear(in_features=512, out_features=10, bias=True)
    """
    if name not in _builders:
        close = difflib.get_close_matches(name, _builders, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "list_models() has them all"
        raise KeyError(f"no model is called {name!r}; {hint}")
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices={out_indices!r} is for features_only=True; give both")
    if isinstance(weights, str):
        weights = member_of(name, weights) or weights
    model = _builders[name](
        weights=weights,
        num_classes=0 if features_only else num_classes,
        in_chans=in_chans,
        output_stride=output_stride,
        **{key: value for key, value in overrides.items() if value is not None},
    )
    if features_only:
        model.keep_features(out_indices)
    return model


def override(config: C, overrides: Mapping[str, Any], synonyms: Mapping[str, str]) -> C:
    """Return `config` with some fields replaced, each by its own name or by a peer's."""
    fields = sorted(field.name for field in dataclasses.fields(config))
    changes: dict[str, Any] = {}
    for given, value in overrides.items():
        field = synonyms.get(given, given)
        if field not in fields:
            raise TypeError(f"unknown option {given!r}; the options are {', '.join(fields)}")
        if field in changes:
            raise TypeError(f"option {field!r} is given twice, once as a synonym")
        changes[field] = value
    return dataclasses.replace(config, **changes)
