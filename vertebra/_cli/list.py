"""`vertebra list`: the models there are."""

from __future__ import annotations

from typing import Annotated

import typer


def list_models(pattern: Annotated[str, typer.Argument(help="Shell pattern.")] = "*") -> None:
    """List the models by name."""
    from .. import list_models

    for name in list_models(pattern):
        typer.echo(name)
