"""`vertebra parity`: models beside those of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.cli import console
from ._app import refusing


def parity(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="Of model names.")] = "*",
    peers: Annotated[str, typer.Option(help="Comma-separated.")] = "torchvision,timm,transformers",
    sizes: Annotated[str, typer.Option(help="Pixels per side, comma-separated.")] = "224,97",
    json: Annotated[Path | None, typer.Option(help="Also write what was found there.")] = None,
) -> None:
    """Compare models with their peers: parameters, keys, outputs, gradients. All take long."""
    from ..bench import outputs
    from ..bench.parity import BUILDERS, run
    from ..models import list_models

    of = peers.split(",")
    if unknown := [peer for peer in of if peer not in BUILDERS]:
        raise typer.BadParameter(f"peers are {', '.join(BUILDERS)}; got {', '.join(unknown)}")
    try:
        pixels = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"sizes are numbers of pixels, like 224,97; got {sizes!r}"
        ) from None
    if min(pixels) < 32:
        raise typer.BadParameter(f"sizes must be at least 32; got {sizes!r}")
    with refusing():
        outputs.check(json)
        if not list_models(pattern):
            raise ValueError(f"no model's name is like {pattern!r}; `vertebra list` has all")
    raise typer.Exit(int(not run(pattern, of, pixels, console(120), json)))
