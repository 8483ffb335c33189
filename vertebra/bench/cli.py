"""`vertebra bench`: the commands, each a few lines around what a module here does.

Heavy modules are imported by the command that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

if TYPE_CHECKING:
    from .results import Report
    from .session import Task
    from .settings import Settings

bench = typer.Typer(help="Check every answer, then measure: eager, torch.compile, timm, vertebra.")

INTERRUPTED = 130
"""The exit code after Ctrl-C, as a shell has it."""

# options that several commands have
Device = Annotated[str | None, typer.Option(help="cuda or cpu (cuda if there is one).")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 (bf16; on a CPU fp32).")]
Batch = Annotated[str | None, typer.Option(help="Images per call, or several: 1,8,64.")]
Layout = Annotated[str | None, typer.Option(help="nchw, nhwc or both (both).")]
Rounds = Annotated[int | None, typer.Option(help="Samples per provider (10; on a CPU 5).")]
Providers = Annotated[
    str | None, typer.Option(help="Comma-separated; a wrong one lists them (what suits here).")
]
Filter = Annotated[str, typer.Option(help="Only what has this in its name.")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels per side (224).")]
Seed = Annotated[int, typer.Option(help="Of the random weights.")]
Sweep = Annotated[
    str | None, typer.Option(help="'batch': 1, 2, 4 (on a GPU 4, 16) ... up to --batch.")
]
Tiny = Annotated[bool, typer.Option("--tiny", help="Small sizes: does everything work?")]
Minutes = Annotated[float | None, typer.Option(help="Begin nothing after so long (no limit).")]
Patience = Annotated[
    float | None, typer.Option(help="Seconds for a first answer, compilation included (300).")
]
Json = Annotated[
    Path | None, typer.Option(help="Where results are kept as they come (bench/out/COMMAND.json).")
]
Csv = Annotated[Path | None, typer.Option(help="Also write a table, for models in timm's columns.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw a chart: .png, .svg, .pdf.")]
Floor = Annotated[
    bool,
    typer.Option(
        "--floor", help="The least that each part can take, and how, in place of comparing."
    ),
]
_FLOOR = "With --floor"
Machine = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_FLOOR,
        help="Whose rates: h200, which also means --dtype bf16 --batch 256 (measured here).",
    ),
]
Bandwidth = Annotated[
    float | None, typer.Option(rich_help_panel=_FLOOR, help="GB/s, read and written.")
]
TensorRate = Annotated[
    float | None, typer.Option(rich_help_panel=_FLOOR, help="TFLOP/s of matrix products.")
]
FmaRate = Annotated[
    float | None, typer.Option(rich_help_panel=_FLOOR, help="TFLOP/s of other arithmetic.")
]
Kernels = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_FLOOR, help="Also list the kernels of parts with this in their name."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the file of --json.")]


def console(width: int = 140) -> Console:
    """Return where results go: as wide as the terminal, or `width` columns of a file."""
    return Console(width=None if sys.stdout.isatty() else width)


def log() -> Console:
    """Return where progress goes, which is not part of the results."""
    return Console(stderr=True)


def usage_error(error: Exception) -> typer.BadParameter:
    """Return what makes one clear line of an error in what was asked for."""
    return typer.BadParameter(str(error.args[0] if isinstance(error, KeyError) else error))


def _split(value: str | None) -> list[str]:
    return [part.strip() for part in value.split(",")] if value else []


def numbers(value: str | None) -> list[int]:
    """Return the batches that an option names."""
    try:
        return [int(part) for part in _split(value)]
    except ValueError:
        raise ValueError(f"batch must be a number, or several: 1,8,64; got {value!r}") from None


@bench.callback(invoke_without_command=True)
def main_job(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="A name that torchvision or timm has too.")
    ] = "resnet50",
    batch: Annotated[int | None, typer.Option(help="Images per call (256; on a CPU 4).")] = None,
    image_size: ImageSize = None,
    dtype: Dtype = None,
    device: Device = None,
    rounds: Annotated[
        int | None, typer.Option(help="Samples per provider (20; on a CPU 10).")
    ] = None,
    providers: Providers = None,
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Three rounds, nothing compiled.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON and chart.")] = Path("bench/out"),
) -> None:
    """Check one model here against its peers, then time inference and training.

    Without a command: build a model here, load a peer's weights, check the answers, compare.
    """
    if context.invoked_subcommand is not None:
        return
    from . import charts
    from . import main_job as job

    try:
        settings = job.choose(
            batches=[] if batch is None else [batch],
            image_size=image_size,
            dtype=dtype,
            device=device,
            rounds=rounds,
            providers=_split(providers),
            seed=seed,
            quick=quick,
        )
        report = job.run(model, settings, out / "main.json", console(120))
    except (ValueError, KeyError) as error:
        raise usage_error(error) from None
    write(report, out / "main.json", {out / "main.png": charts.models})
    leave(report)


@bench.command()
def kernels(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="OP", help="A wrong one lists them (all).")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch: Batch = None,
    layout: Layout = None,
    providers: Providers = None,
    filter: Filter = "",
    rounds: Rounds = None,
    sweep: Sweep = None,
    tiny: Tiny = False,
    minutes: Minutes = None,
    patience: Patience = None,
    json: Json = None,
    csv: Csv = None,
    plot: Plot = None,
    resume: Resume = False,
) -> None:
    """Time the ops on maps of real models, forward and backward, beside eager and torch.compile.

    On a CPU, one map of each op and layout, unless --filter asks for others.
    """
    from .kernels import PROVIDERS, tasks

    _measure("kernels", context.params, PROVIDERS, tasks)


_AT_FLOORS = ("machine", "bandwidth", "tensor_rate", "fma_rate", "kernels")
_ELSEWHERE = ("layout", "providers", "patience", "csv", "resume")


def _models(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Of `vertebra list` (some of each family)."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch: Batch = None,
    image_size: ImageSize = None,
    seed: Seed = 0,
    layout: Layout = None,
    providers: Providers = None,
    filter: Filter = "",
    rounds: Rounds = None,
    sweep: Sweep = None,
    tiny: Tiny = False,
    minutes: Minutes = None,
    patience: Patience = None,
    json: Json = None,
    csv: Csv = None,
    plot: Plot = None,
    resume: Resume = False,
    floor: Floor = False,
    machine: Machine = None,
    bandwidth: Bandwidth = None,
    tensor_rate: TensorRate = None,
    fma_rate: FmaRate = None,
    kernels: Kernels = None,
) -> None:
    from .models import tasks
    from .workload import VARIANTS

    kind = str(context.info_name)
    for name in _ELSEWHERE if floor else _AT_FLOORS:
        if context.params[name]:
            rule = "does not go with --floor" if floor else "needs --floor"
            raise typer.BadParameter(f"--{name.replace('_', '-')} {rule}")
    if floor:
        return _floors(kind, context.params)
    mode = "forward" if kind == "models" else "sgd"
    _measure(kind, context.params, VARIANTS, partial(tasks, mode=mode))


bench.command(
    "models", help="Time inference of whole models beside torchvision's, timm's, transformers'."
)(_models)
bench.command(
    "train", help="Time training steps, forward, backward and SGD, and weigh what they save."
)(_models)


def _settings(kind: str, options: dict[str, Any], known: Collection[str]) -> Settings:
    from .settings import Settings

    return Settings.choose(
        device=options["device"],
        dtype=options["dtype"],
        batches=numbers(options["batch"]),
        sweep=options["sweep"],
        own_batches=kind == "kernels",
        image_size=options.get("image_size"),
        seed=options.get("seed", 0),
        rounds=options["rounds"],
        providers=_split(options["providers"]),
        layouts=_split(options["layout"]),
        match=options["filter"],
        minutes=options["minutes"],
        first_answer_s=options["patience"],
        tiny=options["tiny"],
        known=known,
    )


def _measure(
    kind: str,
    options: dict[str, Any],
    known: Collection[str],
    tasks: Callable[[Sequence[str], Settings], list[Task]],
) -> None:
    """Run what the options of a command ask for, show it and write it, and leave."""
    from . import charts, outputs, report, tables
    from .session import Session

    try:
        settings = _settings(kind, options, known)
        todo = tasks(options["names"] or [], settings)
        if not todo:
            raise ValueError(f"filter: nothing is called so; got {settings.match!r}")
        path = options["json"] or Path(f"bench/out/{kind}.json")
        outputs.check(options["csv"])
        outputs.check_chart(options["plot"])
        session = Session.open(kind, settings, path, resume=options["resume"])
    except ValueError as error:
        raise usage_error(error) from None
    found = session.run(todo)
    show = report.show_kernels if kind == "kernels" else report.show
    show(found, console())
    chart = charts.kernels if kind == "kernels" else charts.models
    write(found, path, {options["csv"]: tables.write, options["plot"]: chart})
    leave(found)


def _floors(kind: str, options: dict[str, Any]) -> None:
    """Show rooflines, with the rates of this machine or of another."""
    from . import floors, outputs
    from .models import chosen

    def given(name: str, unit: float) -> float | None:
        return None if options[name] is None else options[name] * unit

    rates = {
        "bytes": given("bandwidth", 1e9),
        "tensor": given("tensor_rate", 1e12),
        "fma": given("fma_rate", 1e12),
    }
    if options["machine"] is not None:
        options = {
            **options,
            "dtype": options["dtype"] or "bf16",
            "batch": options["batch"] or (None if options["tiny"] else "256"),
        }
    try:
        settings = _settings(kind, options, ())
        outputs.check(options["json"])
        outputs.check_chart(options["plot"])
        finished = floors.run(
            chosen(options["names"] or [], settings),
            settings,
            training=kind == "train",
            machine=options["machine"],
            rates=rates,
            console=console(150),
            say=log().print,
            kernels_of=options["kernels"],
            plots=options["plot"],
            data=options["json"],
        )
    except ValueError as error:
        raise usage_error(error) from None
    raise typer.Exit(0 if finished else INTERRUPTED)


@bench.command("compile")
def compiling(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Of `vertebra list` (some of each family)."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch: Annotated[
        str | None, typer.Option(help="Images per call; others follow from it (256; CPU: 4).")
    ] = None,
    image_size: ImageSize = None,
    layout: Annotated[str | None, typer.Option(help="nchw or nhwc (nhwc).")] = None,
    providers: Providers = None,
    filter: Filter = "",
    rounds: Rounds = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything, small.")] = False,
    direction: Annotated[str | None, typer.Option(help="forward,training (both).")] = None,
    mode: Annotated[str | None, typer.Option(help="Inductor's, comma-separated (all).")] = None,
    aspect: Annotated[
        str | None, typer.Option(help="graphs,starts,steady,shapes (all of them).")
    ] = None,
    blocks: Annotated[bool, typer.Option(help="Blocks of the models too.")] = True,
    starts: Annotated[
        int | None, typer.Option(help="Fresh processes per provider (3; quick: 1).")
    ] = None,
    backend: Annotated[str, typer.Option(help="Of torch.compile.")] = "inductor",
    tiny: Tiny = False,
    minutes: Minutes = None,
    patience: Annotated[
        float | None, typer.Option(help="Seconds for a process, from start to end (300).")
    ] = None,
    json: Json = None,
    csv: Csv = None,
    plot: Plot = None,
    resume: Resume = False,
) -> None:
    """Compare with torch.compile: graphs, cold starts, speed, memory, changing shapes.

    The peer's model, ours, and the peer's on our ops, each eager and compiled.
    """
    from . import outputs
    from .compile import charts, tables
    from .compile.plan import Plan
    from .compile.tasks import notes, tasks
    from .session import Session

    try:
        plan = Plan.of(
            quick=quick,
            directions=_split(direction),
            modes=_split(mode),
            aspects=_split(aspect),
            blocks=blocks,
            starts=starts,
            backend=backend,
            device=device,
            dtype=dtype,
            batches=numbers(batch),
            image_size=image_size,
            rounds=rounds,
            providers=_split(providers),
            layouts=_split(layout),
            match=filter,
            minutes=minutes,
            first_answer_s=patience,
            tiny=tiny,
        )
        todo = tasks(names or [], plan)
        path = json or Path("bench/out/compile.json")
        outputs.check(csv)
        outputs.check_chart(plot)
        session = Session.open("compile", plan, path, resume=resume)
    except ValueError as error:
        raise usage_error(error) from None
    found = session.run(todo)
    found.notes = list(notes(found))
    session.save()
    tables.show(found, console(160))
    write(found, path, {csv: tables.write, plot: charts.draw})
    leave(found)


def write(
    report: Report, path: Path, more: Mapping[Path | None, Callable[[Report, Path], None]]
) -> None:
    """Write what else was asked for beside the JSON in `path`, and say where all of it is."""
    from . import outputs

    written = [path]
    for target, how in more.items():
        if why_not := outputs.write(report, target, how):
            log().print(why_not, markup=False, highlight=False)
        elif target is not None:
            written.append(target)
    say_written(written)


def say_written(paths: Iterable[Path]) -> None:
    """Say which files there are now, in one line that can be copied."""
    text = f"written: {', '.join(map(str, paths))}"
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def leave(report: Report) -> NoReturn:
    """Exit with 0, with 1 where an answer was wrong or missing, with 130 after Ctrl-C."""
    raise typer.Exit(INTERRUPTED if report.interrupted else int(report.failed))


@bench.command()
def ceilings(device: Device = None) -> None:
    """Measure what this machine does at best: a copy, matrix products, multiply-adds."""
    import torch

    from .ceilings import measure
    from .report import show_ceilings
    from .settings import Settings

    try:
        settings = Settings.choose(device=device)
    except ValueError as error:
        raise usage_error(error) from None
    show_ceilings(measure(torch.device(settings.device), say=log().print), console())


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
    from . import outputs, overhead

    try:
        outputs.check(json)
        report = overhead.measure(rounds, say=log().print)
    except ValueError as error:
        raise usage_error(error) from None
    overhead.show(report, console(100))
    if json is not None:
        report.save(json)
        say_written([json])
    leave(report)
