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

from ._cli import predict
from ._cli._app import Commands

app = typer.Typer(cls=Commands, add_completion=False)
bench = typer.Typer(help="Check every answer, then measure: eager, torch.compile, timm, vertebra.")
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:  # pyright: ignore[reportUnusedFunction]
    """Vision backbones in PyTorch, made fast by Triton kernels."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(predict.predict)


@bench.callback(invoke_without_command=True)
def main_job(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="A name that torchvision or timm has too.")
    ] = "resnet50",
    batch: Annotated[int | None, typer.Option(help="Images per call [256; CPU: 4].")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels per side [224].")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 [bf16; CPU: fp32].")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu [cuda if there is one].")] = None,
    rounds: Annotated[int | None, typer.Option(help="Samples per provider [20; CPU: 10].")] = None,
    providers: Annotated[str | None, typer.Option(help="Comma-separated; default: all.")] = None,
    quick: Annotated[bool, typer.Option(help="Three rounds, nothing compiled.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON and chart.")] = Path("bench/out"),
) -> None:
    """Build a model here, load a peer's weights, check the answers, compare the speed."""
    if context.invoked_subcommand is not None:
        return
    from .bench import main_job as job

    try:
        settings = job.Settings.choose(
            model,
            batch=batch,
            image_size=image_size,
            dtype=dtype,
            device=device,
            rounds=rounds,
            providers=None if providers is None else providers.split(","),
            quick=quick,
        )
        report = job.run(settings, out, Console(width=None if sys.stdout.isatty() else 100))
    except (ValueError, KeyError) as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(int(report.failed))


@bench.command()
def traffic() -> None:
    """Print the bytes every op moves, beside what eager PyTorch has to move; needs no GPU."""
    from .bench.traffic import show

    show(Console(width=None if sys.stdout.isatty() else 120))


@bench.command()
def overhead(
    rounds: Annotated[int, typer.Option(help="Samples per op, mode and provider.")] = 200,
    json: Annotated[Path | None, typer.Option(help="Also write what was measured there.")] = None,
) -> None:
    """Time what a call of each op costs the host, with a GPU or without."""
    from .bench import overhead

    console = Console(width=None if sys.stdout.isatty() else 100)
    try:
        report = overhead.measure(rounds, say=Console(stderr=True).print)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    overhead.show(report, console)
    if json is not None:
        report.save(json)


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
