"""A network that says what is in images: its weights, its way to prepare them, its words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..bench.cli import log
from ..models import ImageTransform, create_model
from ..models._card import Card, read_card
from ..models._fitting import Sizes, fitting_models, recognise_model, sizes_of
from ..models._network import Network
from ..models._pretrained import member_of
from ..models._weights import read, unwrap
from ._images import open_image
from ._labels import IMAGENET_CLASSES, imagenet_labels, read_labels

DEFAULT_MODEL = "resnet50"
_USUAL = "ImageNet's usual crop"


class Guess(NamedTuple):
    """A class, its name if there are names, and its probability."""

    index: int
    label: str | None
    probability: float


class Seen(NamedTuple):
    """An image's size in pixels, and the likeliest classes, the likeliest first."""

    path: Path
    width: int
    height: int
    top: list[Guess]


@dataclass
class Predictor:
    """A network with its weights, and what turns images into its input and its output into words.

    Attributes:
        weights: where they are from, None if they are random.
        transform_from: who says how images are prepared.
        labels_from: who names the classes; empty if nobody does.
    """

    network: Network
    name: str
    weights: str | None
    labels: tuple[str, ...] | None
    labels_from: str
    transform: ImageTransform
    transform_from: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the network, and the images with it."""
        network: Any = self.network
        network.to(device, dtype)
        self.device, self.dtype = device, dtype

    def resize(self, size: int | None, resize: int | None) -> None:
        """Prepare images for another crop, of a short side in the same proportion, or a given one.

        Raises:
            ValueError: the crop does not fit.
        """
        if size is None and resize is None:
            return
        crop = size or self.transform.crop_size
        short = resize or self.transform.resize_size * crop // self.transform.crop_size
        self.transform = replace(self.transform, crop_size=crop, resize_size=short)
        self.transform_from = "--size, --resize"

    def see(self, paths: Sequence[Path], top: int) -> Iterator[Seen]:
        """Yield what is in each of a few images, which go through the network together.

        Raises:
            ValueError: one cannot be read, or the network's answer is not finite.
        """
        photos = [open_image(path) for path in paths]
        x = torch.stack([self.transform(photo) for photo in photos])
        with torch.no_grad():
            logits = self.network.eval()(x.to(self.device, self.dtype)).float().cpu()
        for path, photo, z in zip(paths, photos, logits, strict=True):
            if not z.isfinite().all():
                raise ValueError(
                    f"{path}: the network's answer in {self.dtype} is not finite; try --dtype fp32"
                )
            best = z.softmax(0).topk(min(top, len(z)))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            guesses = [Guess(i, self.labels[i] if self.labels else None, p) for p, i in pairs]
            yield Seen(path, photo.width, photo.height, guesses)


def prepare(model: str | None, weights: str | None, labels: Path | None) -> Predictor:
    """Build a network, load its weights and find out what belongs to them.

    Raises:
        ImportError, OSError, KeyError, TypeError, ValueError: something is missing or unknown, or
            does not fit.
    """
    if weights is None:
        name = model or DEFAULT_MODEL
        network = create_model(name)
        named = _find_labels(labels, None, network.num_classes)
        return Predictor(network, name, None, *named, ImageTransform(), _USUAL)
    card = read_card(member_of(model or DEFAULT_MODEL, weights) or weights)
    state = unwrap(read(card.found.path))
    name = model or card.model or _recognise(state)
    sizes = _check_sizes(name, state, card)
    network = create_model(name, weights=state, **sizes._asdict(), **card.options)
    named = _find_labels(labels, card, sizes.num_classes)
    source = str(card.found.member or weights)
    if card.transform is None:
        return Predictor(network, name, source, *named, ImageTransform(), _USUAL)
    return Predictor(network, name, source, *named, card.transform, card.transform_from)


def _recognise(state: Mapping[str, torch.Tensor]) -> str:
    with log().status("Looking for the model that these weights are for"):
        try:
            return recognise_model(state)
        except ValueError as error:
            raise ValueError(f"{error}; name it with --model") from None


def _check_sizes(name: str, state: Mapping[str, torch.Tensor], card: Card) -> Sizes:
    path = card.found.path
    sizes = sizes_of(name, state, **card.options)
    if sizes is None:
        fitting = ", ".join(fitting_models(state)) or "no model of `vertebra list`"
        raise ValueError(f"{path} does not fit {name}; it fits {fitting}")
    if sizes.num_classes == 0:
        raise ValueError(f"{path} has no classifier, so there is nothing to predict with")
    if sizes.in_chans != 3:
        raise ValueError(f"{path} is for images of {sizes.in_chans} channels; photographs have 3")
    return sizes


def _find_labels(
    file: Path | None, card: Card | None, classes: int
) -> tuple[tuple[str, ...] | None, str]:
    """Return the names of the classes, and who says so."""
    if file is not None:
        found = read_labels(file)
        if len(found) != classes:
            raise ValueError(f"{file} names {len(found)} classes; the model has {classes}")
        return found, str(file)
    if card is not None and card.labels is not None:
        if len(card.labels) != classes:
            raise ValueError(
                f"{card.labels_from} beside the weights is not theirs: it names "
                f"{len(card.labels)} classes, they have {classes}"
            )
        return card.labels, card.labels_from
    if classes == IMAGENET_CLASSES and (found := imagenet_labels()) is not None:
        return found, "ImageNet-1K, by torchvision"
    return None, ""
