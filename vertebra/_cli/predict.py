"""`vertebra predict`: what a network sees in photographs."""

from __future__ import annotations

import json as json_
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.bar import Bar
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ..bench.cli import console, log
from ._app import Dtype, choose_device, refusing

if TYPE_CHECKING:
    from ..models import ImageTransform
    from ._predictor import Predictor, Seen

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
            help="The names of the classes: one a line, or JSON; default: those that the weights "
            "come with, else torchvision's for 1000 classes.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of the crop; default: as the weights say.")
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels of the short side before; default: in proportion."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Of weights and images: fp32, bf16, fp16.")
    ] = Dtype.FP32,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in photographs: the likeliest classes, with their probabilities.

    Images are prepared by what comes with the weights, else by ImageNet's usual crop.
    """
    place = choose_device(device)
    with refusing():
        from ._predictor import prepare

        predictor = prepare(model, weights, labels)
        predictor.resize(size, resize)
    predictor.to(place, dtype.of_torch())
    if predictor.weights is None:
        _warn_of_random_weights(predictor.name)
    if not json:
        _show_header(predictor, dtype)
    found: list[Seen] = []
    for seen in _see_all(predictor, images, top):
        found.append(seen)
        if not json:
            _show(seen)
    if json:
        typer.echo(json_.dumps(_report(predictor, dtype, found), indent=1))


def _see_all(predictor: Predictor, images: Sequence[Path], top: int) -> Iterator[Seen]:
    """Yield what is in each image, which the network is given in batches."""
    with Progress(console=log(), transient=True, disable=len(images) <= _BATCH) as progress:
        task = progress.add_task("", total=len(images))
        for start in range(0, len(images), _BATCH):
            paths = images[start : start + _BATCH]
            with refusing():
                yield from predictor.see(paths, top)
            progress.advance(task, len(paths))


# ---------------------------------------------------------------------------------- the output


def _warn_of_random_weights(name: str) -> None:
    from ..models._pretrained import weights_of

    fetch = "--weights DEFAULT fetches torchvision's, " if weights_of(name) else ""
    log().print(
        f"[yellow]{name} has random weights here, and its answers mean nothing:[/] "
        f"{fetch}--weights FILE reads yours.",
        soft_wrap=True,
    )


def _show_header(predictor: Predictor, dtype: Dtype) -> None:
    parameters = sum(p.numel() for p in predictor.network.parameters())
    rows = {
        "model": f"[bold]{predictor.name}[/], {parameters / 1e6:.1f} M parameters, "
        f"{dtype.value} on {predictor.device}",
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


def _report(predictor: Predictor, dtype: Dtype, found: Sequence[Seen]) -> dict[str, Any]:
    """Return all of it as plain data."""
    return {
        "model": predictor.name,
        "weights": predictor.weights,
        "device": str(predictor.device),
        "dtype": dtype.value,
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
