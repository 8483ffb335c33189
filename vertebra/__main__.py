"""The command line: `vertebra` or `python -m vertebra`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ImportError as error:
    raise SystemExit(f"{error}; the command line needs: pip install 'vertebra[bench]'") from None

from .bench.cli import bench

app = typer.Typer(no_args_is_help=True, add_completion=False, help="CNN backbones, made fast.")
app.add_typer(bench, name="bench")


@app.callback()
def _root() -> None:  # pyright: ignore[reportUnusedFunction]
    """CNN backbones in PyTorch, made fast by Triton kernels."""


@app.command()
def parity(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of model names.")] = "*",
    peers: Annotated[str, typer.Option(help="Comma-separated.")] = "torchvision,timm,transformers",
    sizes: Annotated[str, typer.Option(help="Pixels per side, comma-separated.")] = "224,97",
    json: Annotated[Path | None, typer.Option(help="Also write what was found there.")] = None,
) -> None:
    """Compare models with their peers: parameters, keys, outputs, gradients. All take long."""
    from .bench.parity import BUILDERS, run

    of = peers.split(",")
    if unknown := [peer for peer in of if peer not in BUILDERS]:
        raise typer.BadParameter(f"peers are {', '.join(BUILDERS)}; got {', '.join(unknown)}")
    pixels = [int(size) for size in sizes.split(",")]
    console = Console(width=None if sys.stdout.isatty() else 120)
    raise typer.Exit(int(not run(pattern, of, pixels, console, json)))


@app.command()
def drop_in(
    versions: Annotated[
        Path, typer.Option(help="What vertebra.interop.readings found, as JSON.")
    ] = Path("docs/drop-in.json"),
    page: Annotated[Path | None, typer.Option(help="Put the table into this page.")] = None,
) -> None:
    """Show every class that `accelerate` knows: the ops it runs, the versions it was read in."""
    from .bench.drop_in import show

    try:
        show(Console(width=None if sys.stdout.isatty() else 140), versions, page)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


@app.command("list")
def list_models(pattern: Annotated[str, typer.Argument(help="Shell pattern.")] = "*") -> None:
    """List the models by name."""
    from . import list_models

    for name in list_models(pattern):
        typer.echo(name)


@app.command()
def env() -> None:
    """Show what a bug report needs: versions and device."""
    import torch

    from .bench.environment import describe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in describe(device).items():
        typer.echo(f"{name:16}{value}")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
