"""Which libraries build the same network: known without importing them, and held by a test."""

from __future__ import annotations

from dataclasses import fields

from ..models import _convnext_config, _regnet_config, _resnet_config
from ..models._pretrained import weights_of

_CONFIGS = {
    **_resnet_config.CONFIGS,
    **_regnet_config.CONFIGS,
    **_convnext_config.CONFIGS,
}

# the options that transformers has, and those that its weights make up for
_TRANSFORMERS = {
    "block",
    "layers",
    *("layer_type", "depth", "w_0", "w_a", "w_m", "group_width", "group_min_ratio"),
    *("init", "zero_init_residual"),
    *("depths", "dims", "use_grn", "ls_init_value", "conv_mlp"),
}


def libraries_with(name: str) -> tuple[str, ...]:
    """Return who has a model: torchvision and timm by this name, transformers by its config."""
    has = {
        "torchvision": weights_of(name) is not None,  # it has weights for each of its models
        "timm": not name.startswith(("regnet_x_", "regnet_y_")),  # as torchvision calls them
        "transformers": _is_in_transformers(name),
    }
    return tuple(library for library in has if name in _CONFIGS and has[library])


def _is_in_transformers(name: str) -> bool:
    config = _CONFIGS.get(name)
    return config is not None and all(
        field.name in _TRANSFORMERS or getattr(config, field.name) == field.default
        for field in fields(config)
    )
