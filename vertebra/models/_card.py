"""What lies beside weights: the network they are for, the images it wants, its classes' names.

timm and transformers write it into a `config.json` and a `preprocessor_config.json`, in a folder or
in a repository of the hub; a safetensors file may have the entries of such a config in its header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import floor, isclose
from pathlib import Path
from typing import Any, NamedTuple, cast

from . import _hub
from ._pretrained import Weights
from ._transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from ._weights import Found, find

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


class Card(NamedTuple):
    """What is known of weights without a look at them; None where nothing says it.

    Attributes:
        found: the file with the weights.
        model: the name of the network.
        options: of `create_model`, that the weights were trained with.
        transform: what prepares an image.
        transform_from: who says so: a file's name or a member of `Weights`.
        labels: the names of the classes, in order.
        labels_from: who says so.
    """

    found: Found
    model: str | None = None
    options: Mapping[str, Any] = {}
    transform: ImageTransform | None = None
    transform_from: str = ""
    labels: tuple[str, ...] | None = None
    labels_from: str = ""


def read_card(source: str | Weights) -> Card:
    """Return what is known of weights, which are fetched if need be.

    Raises:
        FileNotFoundError: there are no such weights.
        ValueError: there is no such member, or what lies beside them makes no sense.
    """
    found = find(source)
    if found.member is not None:
        member, name = found.member, str(found.member)
        return Card(found, member.meta["model"], {}, member.transforms(), name)
    header = _read_header(found.path)
    beside = _read_json(found, CONFIG)
    card = _of_config(Card(found), {**header, **beside}, CONFIG if beside else found.path.name)
    preprocessor = _read_json(found, PREPROCESSOR)
    if preprocessor:
        transform = of_transformers(preprocessor)
        card = card._replace(transform=transform, transform_from=PREPROCESSOR)
    return card


def _read_json(found: Found, name: str) -> dict[str, Any]:
    """Return a file beside the weights, empty if there is none."""
    if found.repository is not None:
        path = _hub.fetch(found.repository, name)
    else:
        path = found.path.parent / name
        path = path if path.is_file() else None
    return {} if path is None else _parse(path.read_text(encoding="utf-8"), str(path))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} must be JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold a JSON object; got {type(content).__name__}")
    return cast("dict[str, Any]", content)


def _read_header(path: Path) -> dict[str, Any]:
    """Return the entries of a config that a safetensors file carries, each as JSON."""
    if path.suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except SafetensorError:
        return {}  # reading the weights will say so
    found: dict[str, Any] = {}
    for key, value in header.items():
        if key == "architecture":
            found[key] = value
        elif key in _ENTRIES:
            try:
                found[key] = json.loads(value)
            except ValueError as error:
                raise ValueError(f"{key} in the header of {path} must be JSON: {error}") from None
    return found


_ENTRIES = (
    *("pretrained_cfg", "model_args"),
    *("id2label", "label_names", "labels", "label_descriptions"),
)


def _of_config(card: Card, config: Mapping[str, Any], where: str) -> Card:
    """Return `card` with what a `config.json` says."""
    # timm once wrote what it now keeps under "pretrained_cfg" into the config itself
    pretrained: Mapping[str, Any] = config.get("pretrained_cfg") or config
    if "input_size" in pretrained:
        card = card._replace(transform=of_timm(pretrained), transform_from=where)
    labels = labels_of(config) or labels_of(pretrained)
    if labels is not None:
        card = card._replace(labels=labels, labels_from=where)
    options = dict(config.get("model_args") or {})
    for name in ("num_classes", "in_chans", "img_size"):  # which the weights themselves say
        options.pop(name, None)
    if str(config.get("model_type")).startswith("convnext") and "layer_norm_eps" in config:
        options["head_norm_eps"] = config["layer_norm_eps"]
    return card._replace(model=config.get("architecture"), options=options)


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the classes' names that a config of transformers or timm has, if any.

    transformers: "id2label", whose "LABEL_0" and so on are no names. timm: "label_names", which
    "label_descriptions" may explain.
    """
    names = config.get("id2label") or config.get("label_names") or config.get("labels")
    if not names:
        return None
    labels = in_order(names)
    if all(label == f"LABEL_{i}" for i, label in enumerate(labels)):
        return None
    described: Mapping[str, str] = config.get("label_descriptions") or {}
    return tuple(described.get(label, label) for label in labels)


def in_order(names: Mapping[Any, Any] | Sequence[Any]) -> tuple[str, ...]:
    """Return names as a list or by their numbers, which JSON makes strings, in order.

    A name that is a list, of an id and words, ends in the words.
    """
    if isinstance(names, Mapping):
        numbered = {int(number): name for number, name in names.items()}
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError(
                f"the names of classes must be numbered from 0 without a gap; got {len(numbered)} "
                f"names numbered {min(numbered)} to {max(numbered)}"
            )
        names = [numbered[i] for i in range(len(numbered))]
    return tuple(str(name[-1] if isinstance(name, (list, tuple)) else name) for name in names)


# -------------------------------------------------------------------------------- the image


def of_timm(config: Mapping[str, Any]) -> ImageTransform:
    """Return what timm's `create_transform` makes of a model's `pretrained_cfg`."""
    _, height, width = config["input_size"]
    mode = config.get("crop_mode") or "center"
    if height != width or mode not in ("center", "squash"):
        raise ValueError(
            "images are prepared for timm's square inputs, cropped at the center or squashed; got "
            f"input_size {tuple(config['input_size'])}, crop_mode {mode!r}"
        )
    return ImageTransform(
        crop_size=height,
        resize_size=floor(height / (config.get("crop_pct") or 0.875)),
        mean=tuple(config.get("mean") or IMAGENET_MEAN),
        std=tuple(config.get("std") or IMAGENET_STD),
        interpolation=config.get("interpolation") or "bicubic",
        keep_ratio=mode == "center",
    )


_WARPED = 384  # from this size on transformers' ConvNeXts crop nothing
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def of_transformers(config: Mapping[str, Any]) -> ImageTransform:
    """Return what an image processor of transformers does, from its `preprocessor_config.json`.

    Read are those of ConvNeXt, which RegNet and ResNet use too, and those that resize, crop, scale
    and normalise without a rule of their own.
    """
    kind: str = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    is_convnext = "crop_pct" in config or kind.startswith("ConvNext")
    crops = bool(config.get("do_center_crop")) and not is_convnext
    short, keep_ratio = _side(config, "size", None, is_short=is_convnext or crops)
    crop = short
    if is_convnext:
        keep_ratio = crop < _WARPED
        short = int(crop / config.get("crop_pct", 0.875)) if keep_ratio else crop
    elif crops:
        crop, _ = _side(config, "crop_size", short, is_short=False)
    elif keep_ratio:
        raise ValueError(
            f"{PREPROCESSOR} of {kind or 'an unnamed processor'} leaves images of any proportions: "
            "it has neither crop_pct nor do_center_crop"
        )
    scale = config.get("rescale_factor", 1 / 255)
    resample = config.get("resample", 3 if is_convnext else 2)
    if (
        not config.get("do_resize", True)
        or not config.get("do_rescale", True)
        or not isclose(scale, 1 / 255)
        or resample not in _RESAMPLE
    ):
        raise ValueError(
            f"{PREPROCESSOR} must resize, with resample 2 or 3, and rescale by 1/255; got "
            f"do_resize {config.get('do_resize', True)}, resample {resample}, "
            f"do_rescale {config.get('do_rescale', True)}, rescale_factor {scale}"
        )
    normalises = config.get("do_normalize", True)
    return ImageTransform(
        crop_size=crop,
        resize_size=short,
        mean=tuple(config.get("image_mean") or (0.5,) * 3) if normalises else (0.0,) * 3,
        std=tuple(config.get("image_std") or (0.5,) * 3) if normalises else (1.0,) * 3,
        interpolation=_RESAMPLE[resample],
        keep_ratio=keep_ratio,
        round_down=True,
    )


def _side(
    config: Mapping[str, Any], name: str, default: int | None, is_short: bool
) -> tuple[int, bool]:
    """Return a size in pixels, and whether it is that of the short side alone.

    A mere number is, if `is_short`.
    """
    size = config.get(name, default)
    match size:
        case int():
            return size, is_short
        case {"shortest_edge": int(side)}:
            return side, True
        case {"height": int(height), "width": int(width)} if height == width:
            return height, False
        case _:
            raise ValueError(
                f"{name} in {PREPROCESSOR} must be a number, shortest_edge, or height and width of "
                f"a square; got {size!r}"
            )
