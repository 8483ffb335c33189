"""`vertebra drop-in`: the classes of other libraries that `accelerate` knows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.cli import console, log


def drop_in(
    versions: Annotated[
        Path, typer.Option(help="What vertebra.interop.readings found, as JSON.")
    ] = Path("docs/drop-in.json"),
) -> None:
    """Show every class that `accelerate` knows: the ops it runs, the versions it was read in."""
    from ..bench.drop_in import show

    try:
        with log().status("builds a model of each"):
            show(console(140), versions)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
