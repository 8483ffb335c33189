"""`vertebra bench`: the commands, each a few lines around what a module here does.

Heavy modules are imported by the command that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

bench = typer.Typer(help="Check every answer, then measure: eager, torch.compile, timm, vertebra.")


def console(width: int = 140) -> Console:
    """Return where results go: as wide as the terminal, or `width` columns of a file."""
    return Console(width=None if sys.stdout.isatty() else width)


def log() -> Console:
    """Return where progress goes, which is not part of the results."""
    return Console(stderr=True)


@bench.callback(invoke_without_command=True)
def main_job(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="A name that torchvision or timm has too.")
    ] = "resnet50",
    batch: Annotated[int | None, typer.Option(help="Images per call (256; CPU: 4).")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels per side (224).")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 (bf16; CPU: fp32).")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu (cuda if there is one).")] = None,
    rounds: Annotated[int | None, typer.Option(help="Samples per provider (20; CPU: 10).")] = None,
    providers: Annotated[str | None, typer.Option(help="Comma-separated; default: all.")] = None,
    quick: Annotated[bool, typer.Option(help="Three rounds, nothing compiled.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON and chart.")] = Path("bench/out"),
) -> None:
    """Build a model here, load a peer's weights, check the answers, compare the speed."""
    if context.invoked_subcommand is not None:
        return
    from . import main_job as job

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
        report = job.run(settings, out, console(100))
    except (ValueError, KeyError) as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(int(report.failed))


@bench.command()
def ceilings(
    device: Annotated[str | None, typer.Option(help="cuda or cpu (cuda if there is one).")] = None,
) -> None:
    """Measure what this machine does at best: a copy, matrix products, multiply-adds."""
    import torch

    from .ceilings import measure
    from .report import show_ceilings

    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    show_ceilings(measure(chosen, say=log().print), console())


@bench.command()
def traffic() -> None:
    """Print the bytes every op moves, beside what eager PyTorch has to move; needs no GPU."""
    from .traffic import show

    show(console(120))


@bench.command()
def overhead(
    rounds: Annotated[int, typer.Option(help="Samples per op, mode and provider.")] = 200,
    json: Annotated[Path | None, typer.Option(help="Also write what was measured there.")] = None,
) -> None:
    """Time what a call of each op costs the host, with a GPU or without."""
    from . import overhead

    try:
        report = overhead.measure(rounds, say=log().print)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    overhead.show(report, console(100))
    if json is not None:
        report.save(json)
