"""Our models in timm's registry, for programs that build theirs with `timm.create_model`.

`register()` lists each of them as `vertebra_` and its name: no name of timm's starts so, and none
is ever shadowed. Where timm has a network of the name, its tags go along, with their weights on the
hub, their images and their classes; the others have torchvision's. They are entry points like
timm's own: attributes of this module, once they are registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..models import Weights, create_model, list_models
from ..models._features import Indices
from ..models._network import Network
from ..models._pretrained import weights_of
from ..models._registry import family_of
from ..models._weights import fit_weights

__all__ = ["register"]

PREFIX = "vertebra_"

# a config's layers by the names that they have here
_RENAMED = {"regnet": {"stem.conv": "stem.0", "head.fc": "fc"}}
_LAYERS = {
    "resnet": {"first_conv": "conv1", "classifier": "fc"},
    "regnet": {"first_conv": "stem.0", "classifier": "fc"},
    "convnext": {"first_conv": "stem.0", "classifier": "head.fc"},
}

default_cfgs: dict[str, Any] = {}  # where timm's register_model looks for them


def register() -> list[str]:
    """Make timm create and list our models; return the names it gives them.

    Again, it adds what `vertebra.register_model` has got meanwhile. The names are `vertebra_` and
    ours, and after a dot a tag of timm's; `num_classes`, `in_chans`, `features_only`,
    `out_indices`, `pretrained`, `checkpoint_path`, `pretrained_cfg` and its overlay are timm's, all
    other options those of `vertebra.create_model`. Weights in the layout of any library are
    recognised where `pretrained` loads them, also from a file
    (`pretrained_cfg_overlay={"file": path}`); `checkpoint_path` takes files with our keys.

    Features are returned by the network itself, pruned (`Network.keep_features`), with the keys of
    the whole one; `feature_cls` chooses one of timm's wrappers.

    Raises:
        ImportError: timm is not installed.

    >>> register()[:2]  # doctest: +SKIP
    ['vertebra_convnext_atto', 'vertebra_convnext_atto_ols']
    """
    timm = _import_timm()
    names = [PREFIX + name for name in list_models()]
    for name in names:
        if name not in globals():
            default_cfgs.update(_configs(timm, name))
            globals()[name] = timm.models.register_model(_entry_point(timm, name))
    return names


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("the registry to register in is timm's; pip install timm") from error
    return timm


def _configs(timm: Any, name: str) -> dict[str, Any]:
    """Return what timm keeps of a model: its sets of weights by tag, the first the default."""
    ours = name.removeprefix(PREFIX)
    family = family_of(ours) or ""
    if found := timm.models.get_arch_pretrained_cfgs(ours):
        renamed = _RENAMED.get(family, {})
        configs = {config.tag or "": config.to_dict() for config in found.values()}
        for config in configs.values():
            for key in ("first_conv", "classifier"):
                config[key] = renamed.get(config[key], config[key])
    else:
        layers = _LAYERS.get(family, {})
        published = [] if (enum := weights_of(ours)) is None else [enum["DEFAULT"], *enum]
        configs = {f"tv_{weights.name.lower()}": _config(weights) for weights in published}
        configs = {tag: {**layers, **config} for tag, config in (configs or {"": {}}).items()}
    tagged = {f"{name}.{tag}" if tag else name: config for tag, config in configs.items()}
    return timm.models.generate_default_cfgs(tagged)


def _config(weights: Weights) -> dict[str, Any]:
    """Return what timm keeps of weights that torchvision publishes."""
    transform = weights.transforms()
    return {
        "url": weights.url,
        "input_size": (3, transform.crop_size, transform.crop_size),
        "interpolation": transform.interpolation,
        "crop_pct": transform.crop_size / transform.resize_size,
        "mean": transform.mean,
        "std": transform.std,
        "license": weights.meta.get("license", "bsd-3-clause"),
        "origin_url": "https://github.com/pytorch/vision",
    }


def _entry_point(timm: Any, name: str) -> Callable[..., Any]:
    """Return what timm calls to build a model."""
    ours = name.removeprefix(PREFIX)

    def build(device: Any = None, dtype: torch.dtype | None = None, **options: Any) -> Network:
        with torch.device(device or torch.get_default_device()):
            return create_model(ours, **options).to(dtype=dtype)

    def entry_point(pretrained: bool = False, **options: Any) -> Any:
        features: dict[str, Any] = {"feature_cls": _keep_features}
        if family_of(ours) == "convnext":
            features["out_indices"] = (0, 1, 2, 3)  # its stem is no feature
        return timm.models.build_model_with_cfg(
            build,
            name,
            pretrained,
            pretrained_filter_fn=_fit,
            feature_cfg=features,
            **options,
        )

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"Build our {ours}; see `vertebra.create_model`."
    return entry_point


def _fit(weights: dict[str, Any], model: Network) -> dict[str, torch.Tensor]:
    return fit_weights(model, weights)


def _keep_features(model: Network, out_indices: Indices) -> Network:
    """Do what timm's wrappers of features do, without a wrapper."""
    model.keep_features(out_indices)
    return model
