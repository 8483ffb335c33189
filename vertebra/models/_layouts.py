"""The names that other libraries give the weights of the same network, there and back.

A layout says what a library calls what is called something here; the way back is read off it for
the keys of a model. Where a library also shapes a weight differently, the elements are the same and
in the same order.

    resnet     torchvision (ours), timm (alike), transformers
    regnet     torchvision (ours), timm, transformers
    convnext   timm (ours), torchvision, transformers, original (of the ConvNeXt repositories)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """One library's names and shapes for one family.

    Attributes:
        rename: from our key, and all of our keys, to theirs.
        reshape: from their key and our weight to their weight.
        alike: keys that are ours and theirs.
        lacks: options of ours that no weight shows, and theirs does not have.
    """

    rename: Callable[[str, Collection[str]], str]
    reshape: Callable[[str, Tensor], Tensor] = lambda key, weight: weight
    alike: Collection[str] = ()
    lacks: Collection[str] = ()

    def names(self, keys: Collection[str]) -> dict[str, str]:
        """Return their key for each of ours."""
        return {key: self.rename(key, keys) for key in keys}


# ------------------------------------------------------------------------------------------ ResNet

_KINDS = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}


def _ours(key: str, keys: Collection[str]) -> str:
    return key


def _resnet_transformers(key: str, keys: Collection[str]) -> str:
    match key.split("."):
        case ["fc", leaf]:
            return f"classifier.1.{leaf}"
        case [("conv1" | "bn1") as name, leaf]:
            return f"resnet.embedder.embedder.{_KINDS[name[:-1]]}.{leaf}"
        case [stage, block, "downsample", i, leaf] if stage.startswith("layer") and i in _KINDS:
            layer = f"{_stage(stage)}.layers.{block}"
            return f"resnet.encoder.stages.{layer}.shortcut.{_KINDS[i]}.{leaf}"
        case [stage, block, name, leaf] if stage.startswith("layer") and name[:-1] in _KINDS:
            layer = f"{_stage(stage)}.layers.{block}.layer.{int(name[-1]) - 1}"
            return f"resnet.encoder.stages.{layer}.{_KINDS[name[:-1]]}.{leaf}"
        case _:
            return key


def _stage(name: str) -> int:
    """Return the number of a stage, from 0, where its name ends in that number from 1."""
    return int(name.removeprefix("layer").removeprefix("block")) - 1


# ------------------------------------------------------------------------------------------ RegNet


def _regnet_timm(key: str, keys: Collection[str]) -> str:
    match key.split("."):
        case ["fc", leaf]:
            return f"head.fc.{leaf}"
        case [("stem" | "final_conv") as name, i, leaf]:
            return f"{name}.{_CONV_BN[i]}.{leaf}"
        case ["trunk_output", stage, block, *rest]:
            layer = f"s{_stage(stage) + 1}.b{_block(block) + 1}"
            return ".".join([layer, *_regnet_timm_part(rest, keys)])
        case _:
            return key


_CONV_BN = {"0": "conv", "1": "bn"}


def _regnet_timm_part(names: list[str], keys: Collection[str]) -> list[str]:
    """Return what timm calls a part of a block."""
    norm_first = any(".norm." in other for other in keys)
    match names:
        case ["norm", leaf]:
            return ["norm1", leaf]
        case ["proj", leaf]:
            return ["downsample", leaf]
        case ["proj", i, leaf]:
            if any(other.endswith(".proj.0.weight") for other in keys):
                return ["downsample", _CONV_BN[i], leaf]
            return ["downsample", "1", *([] if norm_first else [_CONV_BN[str(int(i) - 1)]]), leaf]
        case ["f", "a", leaf]:
            return ["conv1", leaf]
        case ["f", ("a" | "b" | "c") as name, i, leaf]:
            number = "abc".index(name) + 1
            if norm_first:
                return [f"{'norm' if i == '0' else 'conv'}{number}", leaf]
            return [f"conv{number}", _CONV_BN[i], leaf]
        case ["f", "se", *leaf]:
            return ["se", *leaf]
        case _:
            return names


def _regnet_transformers(key: str, keys: Collection[str]) -> str:
    match key.split("."):
        case ["fc", leaf]:
            return f"classifier.1.{leaf}"
        case ["stem", i, leaf]:
            return f"regnet.embedder.embedder.{_KINDS[i]}.{leaf}"
        case ["trunk_output", stage, block, *rest]:
            layer = f"regnet.encoder.stages.{_stage(stage)}.layers.{_block(block)}"
            match rest:
                case ["proj", i, leaf] if i in _KINDS:
                    return f"{layer}.shortcut.{_KINDS[i]}.{leaf}"
                case ["f", "se", ("fc1" | "fc2") as name, leaf]:
                    return f"{layer}.layer.2.attention.{0 if name == 'fc1' else 2}.{leaf}"
                case ["f", ("a" | "b" | "c") as name, i, leaf] if i in _KINDS:
                    has_se = any(".se." in other for other in keys)  # between b and c
                    place = ("abxc" if has_se else "abc").index(name)
                    return f"{layer}.layer.{place}.{_KINDS[i]}.{leaf}"
                case _:
                    return key
        case _:
            return key


def _block(name: str) -> int:
    """Return the number of a block, from 0: `block2-5` is the fifth but one of stage 2."""
    return int(name.rpartition("-")[2])


# ---------------------------------------------------------------------------------------- ConvNeXt


def _convnext_torchvision(key: str, keys: Collection[str]) -> str:
    parts = {"conv_dw": "0", "norm": "2", "fc1": "3", "fc2": "5"}
    match key.split("."):
        case ["stem", *rest]:
            return ".".join(["features.0", *rest])
        case ["stages", s, "downsample", *rest]:
            return ".".join([f"features.{2 * int(s)}", *rest])
        case ["stages", s, "blocks", i, "gamma"]:
            return f"features.{2 * int(s) + 1}.{i}.layer_scale"
        case ["stages", s, "blocks", i, *_, name, leaf] if name in parts:
            return f"features.{2 * int(s) + 1}.{i}.block.{parts[name]}.{leaf}"
        case ["head", ("norm" | "fc") as name, leaf]:
            return f"classifier.{0 if name == 'norm' else 2}.{leaf}"
        case _:
            return key


def _convnext_original(key: str, keys: Collection[str]) -> str:
    match key.split("."):
        case ["stem", *rest]:
            return ".".join(["downsample_layers.0", *rest])
        case ["stages", s, "downsample", *rest]:
            return ".".join([f"downsample_layers.{s}", *rest])
        case ["stages", s, "blocks", i, "mlp", "grn", leaf]:
            return f"stages.{s}.{i}.grn.{'gamma' if leaf == 'weight' else 'beta'}"
        case ["stages", s, "blocks", i, *rest]:
            return f"stages.{s}.{i}.{_original_part('.'.join(rest))}"
        case ["head", "norm", leaf]:
            return f"norm.{leaf}"
        case ["head", "fc", leaf]:
            return f"head.{leaf}"
        case _:
            return key


def _original_part(name: str) -> str:
    return name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")


def _convnext_transformers(key: str, keys: Collection[str]) -> str:
    prefix = "convnextv2" if any(".grn." in other for other in keys) else "convnext"
    match key.split("."):
        case ["stem", i, leaf]:
            return f"{prefix}.embeddings.{'patch_embeddings' if i == '0' else 'layernorm'}.{leaf}"
        case ["stages", s, "downsample", *rest]:
            return ".".join([f"{prefix}.encoder.stages.{s}.downsampling_layer", *rest])
        case ["stages", s, "blocks", i, *rest]:
            part = _original_part(".".join(rest)).removeprefix("mlp.")
            part = {"gamma": "layer_scale_parameter"}.get(part, part.replace("norm.", "layernorm."))
            return f"{prefix}.encoder.stages.{s}.layers.{i}.{part}"
        case ["head", "norm", leaf]:
            return f"{prefix}.layernorm.{leaf}"
        case ["head", "fc", leaf]:
            return f"classifier.{leaf}"
        case _:
            return key


def _like_torchvision(key: str, weight: Tensor) -> Tensor:
    if key.endswith("layer_scale"):
        return weight[:, None, None]
    return _with_linear_mlps(key, weight)


def _like_the_original(key: str, weight: Tensor) -> Tensor:
    if ".grn." in key:
        return weight[None, None, None]
    return _with_linear_mlps(key, weight)


def _with_linear_mlps(key: str, weight: Tensor) -> Tensor:
    is_mlp = weight.dim() == 4 and weight.shape[2:] == (1, 1) and weight.shape[1] > 1
    return weight.flatten(1) if is_mlp else weight


_STRIDES = ("downsample_in_first_stage", "downsample_in_bottleneck")

LAYOUTS: Mapping[str, Mapping[str, Layout]] = {
    "resnet": {
        "torchvision": Layout(_ours, lacks=("aa_layer", *_STRIDES)),
        "timm": Layout(_ours, lacks=_STRIDES),
        "transformers": Layout(_resnet_transformers, lacks=("aa_layer",)),
    },
    "regnet": {
        "torchvision": Layout(_ours),
        "timm": Layout(_regnet_timm, alike=("stem.weight",)),  # of blocks that start with a norm
        "transformers": Layout(_regnet_transformers),
    },
    "convnext": {
        "timm": Layout(_ours),
        "torchvision": Layout(_convnext_torchvision, _like_torchvision),
        "transformers": Layout(_convnext_transformers, _like_the_original, lacks=("norm_eps",)),
        "original": Layout(_convnext_original, _like_the_original),
    },
}

# what transformers' models for classification call the backbone; other models of theirs are it
_BACKBONE = re.compile(r"^(resnet|regnet|convnext|convnextv2)\.")


def recognise(
    own: Collection[str], weights: Mapping[str, Tensor], family: str
) -> dict[str, Tensor]:
    """Return `weights` under our names, read in the layout that explains most of them.

    Args:
        own: the keys of the model that they are for.
        weights: in any layout of its family, with or without a classifier.
        family: of the model.
    """
    best: dict[str, str] = {}
    for layout in LAYOUTS[family].values():
        names = layout.names(own)
        for back in (
            {theirs: key for key, theirs in names.items()},
            {_BACKBONE.sub("", theirs): key for key, theirs in names.items()},
        ):
            if len(back.keys() & weights.keys()) > len(best.keys() & weights.keys()):
                best = back
    return {best.get(key, key): weight for key, weight in weights.items()}


def _layout(family: str, layout: str) -> Layout:
    if layout not in LAYOUTS[family]:
        raise ValueError(
            f"the layouts of {family} are {', '.join(LAYOUTS[family])}; got {layout!r}"
        )
    return LAYOUTS[family][layout]


def check_options(config: Any, family: str, layout: str) -> None:
    """Raise ValueError if a library's network with these weights would compute something else."""
    defaults = {field.name: field.default for field in fields(config)}
    for option in _layout(family, layout).lacks:
        value = getattr(config, option)
        if value != defaults[option]:
            raise ValueError(
                f"{layout} has no {family} with {option}={value!r}, which no weight shows: its "
                f"network would compute something else; choose another of "
                f"{', '.join(LAYOUTS[family])}"
            )


def export(weights: Mapping[str, Tensor], family: str, layout: str) -> dict[str, Tensor]:
    """Return our `weights` under another library's names, in its shapes.

    Raises:
        ValueError: there is no such layout, or it has no name for some of the weights.
    """
    found = _layout(family, layout)
    names = found.names(weights.keys())
    alike = names if found.rename is _ours else found.alike
    nameless = [key for key in names if key == names[key] and key not in alike]
    if nameless:
        raise ValueError(
            f"{layout} has no name for {nameless[0]} ({len(nameless)} such weights): it has no "
            f"{family} with this option; choose another of {', '.join(LAYOUTS[family])}"
        )
    return {names[key]: found.reshape(names[key], weight) for key, weight in weights.items()}
