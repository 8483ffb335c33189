"""`vertebra list`: the models there are, how large they are, and whose weights they take."""

from __future__ import annotations

import json as json_
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ..bench.cli import console

if TYPE_CHECKING:
    from rich.table import Table


class Family(str, Enum):
    """The families of networks."""

    RESNET = "resnet"
    REGNET = "regnet"
    CONVNEXT = "convnext"


class Order(str, Enum):
    """What a list is sorted by."""

    NAME = "name"
    PARAMS = "params"
    MACS = "macs"


class Model(NamedTuple):
    """What the list says of a model.

    Attributes:
        macs: multiply-adds of one image.
        image_size: pixels of its side.
        weights: the published sets, by name.
        also_in: the libraries that have the same network.
    """

    name: str
    family: str | None
    parameters: int
    macs: int
    image_size: int
    weights: tuple[str, ...]
    also_in: tuple[str, ...]


def list_models(
    pattern: Annotated[
        str, typer.Argument(metavar="PATTERN", help="Of the names, as in a shell: 'resnet*d'.")
    ] = "*",
    family: Annotated[Family | None, typer.Option(help="Only resnet, regnet or convnext.")] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Only models with weights to download by name.")
    ] = False,
    sort: Annotated[
        Order, typer.Option(help="By name, params or macs, the largest last.")
    ] = Order.NAME,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models: a table in a terminal, a name a line in a pipe.

    The names are what `vertebra.create_model` and `vertebra predict --model` take.
    """
    from ..bench.report import print_table
    from ..models import list_models
    from ..models._registry import family_of

    names = [
        name
        for name in list_models(pattern, pretrained=weights)
        if family is None or family_of(name) == family.value
    ]
    if not names:
        raise typer.BadParameter(_nothing(pattern))
    out = console(120)
    if not json and not out.is_terminal and sort is Order.NAME:
        typer.echo("\n".join(names))
        return
    models = [describe(name) for name in names]
    if sort is not Order.NAME:
        models.sort(key=lambda m: m.parameters if sort is Order.PARAMS else m.macs)
    if json:
        typer.echo(json_.dumps([model._asdict() for model in models], indent=1))
    elif out.is_terminal:
        print_table(out, overview(models), "family", "weights", "pixels")
    else:
        typer.echo("\n".join(model.name for model in models))


def _nothing(pattern: str) -> str:
    if any(character in pattern for character in "*?["):
        return f"no model's name is like {pattern!r}, or the options leave none of those that are"
    return f"no model is called {pattern!r}; for all with that in their name: '*{pattern}*'"


def describe(name: str) -> Model:
    """Return what there is to say of a model."""
    from ..bench.sizes import size_of
    from ..models._pretrained import weights_of
    from ..models._registry import family_of
    from ._libraries import libraries_with

    published = weights_of(name)
    return Model(
        name,
        family_of(name),
        *size_of(name),
        weights=tuple(member.name for member in published) if published else (),
        also_in=libraries_with(name),
    )


# -------------------------------------------------------------------------------- the output


def overview(models: Sequence[Model]) -> Table:
    """Return a table of models."""
    from ..bench.report import plain_table

    table = plain_table(f"{len(models)} models", "name")
    table.add_column("family")
    for heading in ("M params", "GMACs", "pixels"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("weights")
    table.add_column("also in")
    for model in models:
        table.add_row(
            f"[bold]{model.name}[/]",
            f"[dim]{model.family}[/]",
            f"{model.parameters / 1e6:,.1f}",
            f"{model.macs / 1e9:,.2f}",
            str(model.image_size),
            ", ".join(_short(model.weights)),
            ", ".join(model.also_in),
        )
    return table


def _short(weights: Sequence[str]) -> Iterator[str]:
    """Yield the names of weights without what most have in common."""
    for name in weights:
        yield name.removeprefix("IMAGENET1K_")
