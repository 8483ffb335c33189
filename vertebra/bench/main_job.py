"""The main job, `make bench`: build a ResNet-50, check its answers, measure it and its peers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from .. import explain
from . import environment, report
from .results import Comparison, Report
from .runner import Clock, measure, settle_threads, warm_up_compiler
from .workload import VARIANTS, Mode, Workload

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_TITLES: dict[Mode, str] = {
    "forward": "inference",
    "training": "training, forward + backward",
    "sgd": "training, forward + backward + SGD step",
}


@dataclass(frozen=True)
class Settings:
    """What to measure; `Settings.choose` fills in what suits the machine."""

    model: str
    batch: int
    image_size: int
    dtype: str
    device: str
    rounds: int
    minutes: float
    providers: list[str] = field(default_factory=lambda: list(VARIANTS))
    seed: int = 0

    @classmethod
    def choose(
        cls,
        model: str = "resnet50",
        *,
        batch: int | None = None,
        image_size: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        rounds: int | None = None,
        providers: list[str] | None = None,
        quick: bool = False,
    ) -> Settings:
        """Return the settings given, and for the others what suits the machine."""
        device = _given(device, "cuda" if torch.cuda.is_available() else "cpu")
        gpu = device.startswith("cuda")
        compiled = () if quick else ("default", "max-autotune") if gpu else ("default",)
        names = [name for name, v in VARIANTS.items() if v.compile in (None, *compiled)]
        chosen = cls(
            model=model,
            batch=_given(batch, 256 if gpu else 4),
            image_size=_given(image_size, 128 if quick and not gpu else 224),
            dtype=_given(dtype, "bf16" if gpu else "fp32"),
            device=device,
            rounds=_given(rounds, 3 if quick else 20 if gpu else 10),
            minutes=15.0 if gpu else 4.0,
            providers=_given(providers, names),
        )
        chosen.check()
        return chosen

    def check(self) -> None:
        """Raise ValueError where there is no such thing to measure."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        unknown = [name for name in self.providers if name not in VARIANTS]
        if unknown:
            raise ValueError(f"providers are {', '.join(VARIANTS)}; got {', '.join(unknown)}")
        if min(self.batch, self.rounds) < 1 or self.image_size < 32:
            raise ValueError("batch and rounds must be at least 1, image_size at least 32")
        if self.device.partition(":")[0] not in ("cuda", "cpu"):
            raise ValueError(f"device must be cuda or cpu; got {self.device!r}")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no GPU here; leave it out")


def _given(value: T | None, otherwise: T) -> T:
    return otherwise if value is None else value


def run(settings: Settings, out: Path, console: Console) -> Report:
    """Measure inference and training; print the tables, leave JSON and a chart in `out`."""
    device = torch.device(settings.device)
    found = Report("main", environment.describe(device), asdict(settings))
    begin = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    shares: dict[Mode, float] = {"forward": 0.4, "training": 1.0}  # of the minutes, by its end
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        steps = 1 + len(shares) * (2 + len(settings.providers) + settings.rounds)
        task = progress.add_task("", total=steps)

        def tick(text: str) -> None:
            progress.update(task, advance=1, description=text)

        tick(f"{settings.model}: weights and photographs")
        workload = create(settings, Path(folder))
        for mode, share in shares.items():
            deadline = begin + 60 * settings.minutes * share
            found.comparisons.append(compare(workload, settings, mode, deadline, tick))
        progress.update(task, completed=steps, description="done")
        found.notes += notes(workload, settings)
    found.save(out / "main.json")
    report.plot(found, out / "main.png")
    report.show(found, console)
    console.print(f"written: {out / 'main.json'}, {out / 'main.png'}", highlight=False)
    return found


def create(settings: Settings, folder: Path) -> Workload:
    """Build the workload that the settings describe, and ready what is not part of any time."""
    device = torch.device(settings.device)
    torch.backends.cudnn.benchmark = True  # eager PyTorch at its best
    if any(VARIANTS[name].compile for name in settings.providers):
        warm_up_compiler(device)
    return Workload.create(
        settings.model,
        settings.batch,
        settings.image_size,
        device,
        DTYPES[settings.dtype],
        folder,
        settings.seed,
    )


def compare(
    workload: Workload,
    settings: Settings,
    mode: Mode,
    deadline: float,
    tick: Callable[[str], None],
) -> Comparison:
    """Check and time all providers of one mode."""
    title = f"{settings.model} {_TITLES[mode]}"
    tick(f"{title}: the truth, in fp64 on the CPU")
    torch.compiler.reset()  # what another model has made dynamic, or has used up
    if workload.device.type == "cpu":
        settle_threads()
    rows = measure(
        list(workload.providers(settings.providers, mode)),
        workload.oracle(mode),
        Clock(workload.device),
        settings.rounds,
        deadline=deadline,
        tick=lambda text: tick(f"{_TITLES[mode]}: {text}"),
    )
    return Comparison(title, rows, {"images": settings.batch}, _facts(settings, mode))


def _facts(settings: Settings, mode: Mode) -> dict[str, Any]:
    facts = asdict(settings) | {"mode": mode}
    names = ("model", "mode", "batch", "image_size", "dtype", "device")
    return {name: facts[name] for name in names} | {"threads": torch.get_num_threads()}


def notes(workload: Workload, settings: Settings) -> list[str]:
    """Return what a reader of the tables must know."""
    x = workload.inputs(channels_last=True)[0]
    model = workload.build("vertebra").to(workload.device, workload.dtype).eval()
    sites = explain(model, x, bandwidth=1e12)
    on_triton = [site for site in sites if site.path == "triton"]
    found = [f"{len(on_triton)} of vertebra's {len(sites)} fused sites ran on Triton."]
    if workload.device.type != "cuda":
        found.insert(
            0,
            f"No GPU: {settings.dtype}, batch {settings.batch}; the Triton kernels are not "
            "exercised here, vertebra is plain PyTorch like its peers.",
        )
    elif len(on_triton) < len(sites):
        found.append("Why not all: " + "; ".join({s.reason for s in sites if s.reason}) + ".")
    found.append(
        "Errors are relative, worst tensor, against the reference model in fp64 on the CPU, with "
        "random weights, since the packages bring no trained ones; the budget is twice eager's own."
    )
    return found
