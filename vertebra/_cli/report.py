"""`vertebra report`: what README and documentation show of results, written from committed JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.cli import log
from ._app import refusing


def report(
    context: typer.Context,
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing; exit with 1 if something is out of step."),
    ] = False,
    root: Annotated[Path, typer.Option(help="A checkout of the repository.")] = Path(),
) -> None:
    """Write tables and charts of README and docs, from bench/results and the registry."""
    with refusing():
        from ..bench.pages import site
        from ._reference import parts

        every = parts(context.find_root().command)
        if not (root / "mkdocs.yml").exists():
            raise ValueError(f"{root.resolve()} is no checkout of vertebra; --root names one")
        with log().status("counts traffic, and builds what accelerate knows: a minute"):
            stale = list(site.out_of_step(root, parts=every)) if check else []
            written = [] if check else site.write(root, parts=every)
        if not check:
            typer.echo("\n".join(map(str, written)) or "everything is in step")
            return
    for name in stale:
        typer.echo(f"out of step: {name}", err=True)
    if stale:
        typer.echo("`python -m vertebra report` writes them anew", err=True)
        raise typer.Exit(1)
    typer.echo("everything is in step")
