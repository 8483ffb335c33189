"""`vertebra predict`: what a network sees in photographs."""

from __future__ import annotations

import json as json_
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.bar import Bar
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ..bench.cli import console, log
from ._app import Dtype, choose_device, refusing

if TYPE_CHECKING:
    import torch

    from ..models._card import Card
    from ..models._network import Network
    from ..models._transforms import ImageTransform

_BATCH = 32
_BAR = 24  # characters


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE",
            exists=True,
            dir_okay=False,
            help="Photographs, of any kind Pillow reads.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="A name of `vertebra list`; default: that of the weights, else resnet50."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A file or a folder, in the layout of any library; a hub id, OWNER/NAME; "
            "a member: DEFAULT, ResNet50_Weights.IMAGENET1K_V2. Without it they are random."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="The names of the classes: one a line, or JSON; default: those that the weights "
            "come with, else torchvision's for 1000 classes.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and images.")] = Dtype.FP32,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in photographs: the likeliest classes, with their probabilities.

    Images are prepared by what comes with the weights, else by ImageNet's usual crop.
    """
    place = choose_device(device)
    with refusing():
        predictor = prepare(model, weights, labels)
    network: Any = predictor.network
    network.to(place, dtype.of_torch())
    predictor.place, predictor.dtype = place, dtype
    if predictor.weights is None:
        _warn_of_random_weights(predictor.name)
    if not json:
        _show_header(predictor)
    found: list[Seen] = []
    for seen in _seen_in(predictor, images, top):
        found.append(seen)
        if not json:
            _show(seen)
    if json:
        typer.echo(json_.dumps(_report(predictor, found), indent=1))


# ---------------------------------------------------------------------------------- the network


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
    transform: ImageTransform
    transform_from: str
    labels: tuple[str, ...] | None
    labels_from: str
    place: torch.device | None = None
    dtype: Dtype = Dtype.FP32


def prepare(model: str | None, weights: str | None, labels: Path | None) -> Predictor:
    """Build the network, load its weights and find out what belongs to them.

    Raises:
        OSError, KeyError, TypeError, ValueError: something is missing, unknown or does not fit.
    """
    from ..models import ImageTransform, create_model

    if weights is None:
        name = model or "resnet50"
        network = create_model(name)
        names = _find_labels(labels, None, 1000)
        return Predictor(network, name, None, ImageTransform(), _USUAL, *names)
    from ..models._card import read_card
    from ..models._pretrained import member_of
    from ..models._weights import read, unwrap

    card = read_card(member_of(model or "resnet50", weights) or weights)
    state = unwrap(read(card.found.path))
    name = model or card.model or _recognise(state)
    sizes = _check_sizes(name, state, card)
    network = create_model(name, weights=state, **sizes._asdict(), **card.options)
    names = _find_labels(labels, card, sizes.num_classes)
    source = str(card.found.member or weights)
    if card.transform is None:
        return Predictor(network, name, source, ImageTransform(), _USUAL, *names)
    return Predictor(network, name, source, card.transform, card.transform_from, *names)


_USUAL = "ImageNet's usual crop"


def _recognise(state: dict[str, torch.Tensor]) -> str:
    from ..models._fitting import recognise_model

    with log().status("Looking for the model that these weights are for"):
        try:
            return recognise_model(state)
        except ValueError as error:
            raise ValueError(f"{error}; name it with --model") from None


def _check_sizes(name: str, state: dict[str, torch.Tensor], card: Card) -> Any:
    from ..models._fitting import fitting_models, sizes_of

    sizes = sizes_of(name, state, **card.options)
    if sizes is None:
        fitting = ", ".join(fitting_models(state)) or "no model of `vertebra list`"
        raise ValueError(f"{card.found.path} does not fit {name}; it fits {fitting}")
    if sizes.num_classes == 0:
        raise ValueError(
            f"{card.found.path} has no classifier, so there is nothing to predict with"
        )
    if sizes.in_chans != 3:
        raise ValueError(
            f"{card.found.path} is for images of {sizes.in_chans} channels; photographs have 3"
        )
    return sizes


def _find_labels(
    file: Path | None, card: Card | None, classes: int
) -> tuple[tuple[str, ...] | None, str]:
    """Return the names of the classes, and who says so."""
    from ._labels import IMAGENET_CLASSES, imagenet_labels, read_labels

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


# ---------------------------------------------------------------------------------- the images


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


def _seen_in(predictor: Predictor, images: Sequence[Path], top: int) -> Iterator[Seen]:
    """Yield what is seen in each image, which the network is given in batches."""
    with Progress(console=log(), transient=True, disable=len(images) <= _BATCH) as progress:
        task = progress.add_task("", total=len(images))
        for start in range(0, len(images), _BATCH):
            paths = images[start : start + _BATCH]
            yield from _seen_at_once(predictor, paths, top)
            progress.advance(task, len(paths))


def _seen_at_once(predictor: Predictor, paths: Sequence[Path], top: int) -> Iterator[Seen]:
    import torch

    from ._images import open_image

    with refusing():
        photos = [open_image(path) for path in paths]
    x = torch.stack([predictor.transform(photo) for photo in photos])
    with torch.no_grad():
        logits = predictor.network.eval()(x.to(predictor.place, predictor.dtype.of_torch()))
    probabilities = logits.float().softmax(1).cpu()
    for path, photo, p, is_finite in zip(
        paths, photos, probabilities, logits.isfinite().all(1).tolist(), strict=True
    ):
        if not is_finite:
            raise typer.BadParameter(
                f"{path}: the network's answer in {predictor.dtype.value} is not finite; "
                "try --dtype fp32"
            )
        best = p.topk(min(top, len(p)))
        guesses = [
            Guess(i, predictor.labels[i] if predictor.labels else None, value)
            for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        yield Seen(path, photo.width, photo.height, guesses)


# ---------------------------------------------------------------------------------- the output


def _warn_of_random_weights(name: str) -> None:
    from ..models._pretrained import weights_of

    fetch = "--weights DEFAULT fetches torchvision's, " if weights_of(name) else ""
    log().print(
        f"[yellow]{name} has random weights here, and its answers mean nothing:[/] "
        f"{fetch}--weights FILE reads yours.",
        soft_wrap=True,
    )


def _show_header(predictor: Predictor) -> None:
    parameters = sum(p.numel() for p in predictor.network.parameters())
    rows = {
        "model": f"[bold]{predictor.name}[/], {parameters / 1e6:.1f} M parameters, "
        f"{predictor.dtype.value} on {predictor.place}",
        "weights": escape(predictor.weights) if predictor.weights else "[yellow]random[/]",
        "images": f"{_describe(predictor.transform)} [dim]({escape(predictor.transform_from)})[/]",
        "labels": escape(predictor.labels_from) or "none: --labels FILE names the classes",
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, "dim"), value)
    console(100).print(grid)


def _describe(transform: ImageTransform) -> str:
    resized = f"short side to {transform.resize_size}"
    if not transform.keep_ratio:
        resized = f"both sides to {transform.resize_size}"
    mean, std = (" ".join(f"{v:.3g}" for v in values) for values in (transform.mean, transform.std))
    size = transform.crop_size
    return f"{resized} ({transform.interpolation}), centre {size} x {size}, mean {mean}, std {std}"


def _show(seen: Seen) -> None:
    out = console(100)
    out.print()
    out.print(
        f"[bold]{escape(str(seen.path))}[/]  [dim]{seen.width} x {seen.height}[/]", soft_wrap=True
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right")
    grid.add_column(width=_BAR)
    for guess in seen.top:
        bar = Bar(1.0, 0.0, guess.probability, width=_BAR, color="green")
        number = Text(f"class {guess.index}", "dim")
        words = [number] if guess.label is None else [Text(guess.label), number]
        grid.add_row(f"{guess.probability:7.2%}", bar, *words)
    out.print(grid)


def _report(predictor: Predictor, found: Sequence[Seen]) -> dict[str, Any]:
    """Return all of it as plain data."""
    return {
        "model": predictor.name,
        "weights": predictor.weights,
        "device": str(predictor.place),
        "dtype": predictor.dtype.value,
        "transform": {**asdict(predictor.transform), "from": predictor.transform_from},
        "labels": predictor.labels_from or None,
        "images": [
            {
                "path": str(seen.path),
                "width": seen.width,
                "height": seen.height,
                "top": [guess._asdict() for guess in seen.top],
            }
            for seen in found
        ],
    }
