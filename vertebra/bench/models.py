"""Whole models, inference and training: eager PyTorch, torch.compile, the peers, and ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import torch

from ..models import list_models
from . import cpu
from .anatomy import dissect
from .ceilings import DTYPES, Ceilings
from .clock import Clock
from .construction import construct
from .results import Comparison
from .roofline import rates_of
from .runner import measure, warm_up_compiler
from .session import Session, Task
from .settings import Settings
from .workload import VARIANTS, Cost, Mode, Workload

# a ResNet, a ResNeXt, a RegNet with squeeze and excitation, ConvNeXts; on a CPU, small ones
ON_GPU = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "regnety_040",
    "convnext_tiny",
    "convnext_base",
)
ON_CPU = ("resnet18", "regnet_y_400mf", "convnext_tiny")
TINY = ("resnet18", "regnety_002", "convnext_atto")

TITLES: dict[Mode, str] = {
    "forward": "inference",
    "training": "training, forward + backward",
    "sgd": "training, forward + backward + SGD step",
}


def default_models(settings: Settings) -> tuple[str, ...]:
    """Return models of all three families that a machine can do in reasonable time."""
    return TINY if settings.tiny else ON_GPU if settings.on_gpu else ON_CPU


def tasks(names: Sequence[str], settings: Settings, mode: Mode) -> list[Task]:
    """Return what there is to measure, a comparison for every model and batch.

    Raises:
        ValueError: there is no such model.
    """
    providers = settings.providers or [n for n, v in VARIANTS.items() if v.suits(settings, mode)]
    steps = len(providers) + settings.rounds + 2
    return [
        Task(
            (_title(name, batch, settings, mode),),
            partial(compare, name, batch, settings, mode),
            steps,
        )
        for name in chosen(names, settings)
        for batch in settings.batches
    ]


def chosen(names: Sequence[str], settings: Settings) -> list[str]:
    """Return those of `names`, or of the default models, that the settings match.

    Raises:
        ValueError: there is no such model.
    """
    check(names)
    return [name for name in names or default_models(settings) if settings.match in name]


def check(names: Sequence[str]) -> None:
    """Raise ValueError where one of them is no model of ours."""
    known = list_models()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else "`vertebra list` has them all"
            raise ValueError(f"no model is called {name!r}; {hint}")


def _title(name: str, batch: int, settings: Settings, mode: Mode) -> str:
    size = settings.image_size
    return f"{name} {TITLES[mode]}, {batch} x {size} x {size}, {settings.dtype}"


def compare(name: str, batch: int, settings: Settings, mode: Mode, session: Session) -> None:
    """Check and time all providers of one model in one mode."""
    device = torch.device(settings.device)
    torch.backends.cudnn.benchmark = True  # eager PyTorch at its best
    session.tick("weights and photographs")
    work = workload(name, batch, settings)
    providers = work.names(settings, mode)
    if any(VARIANTS[provider].compile for provider in providers):
        warm_up_compiler(device)
    torch.compiler.reset()  # what another model has made dynamic, or has used up
    if device.type == "cpu":
        cpu.settle()
    cost = work.cost(mode)
    comparison = Comparison(
        _title(name, batch, settings, mode),
        [],
        {"images": batch, "flops": float(batch * cost.flops)},
        _facts(work, batch, cost, settings, mode),
    )
    if session.report.ceilings is not None:
        with suppress(ValueError):  # a network that nobody has taken apart
            comparison.facts["floor_ms"] = _floor_ms(
                name, batch, settings, mode, session.report.ceilings
            )
    session.begin(comparison)
    session.tick("the truth, in fp64 on the CPU")
    measure(
        comparison,
        list(work.providers(providers, mode)),
        work.oracle(mode),
        Clock(device),
        settings.rounds,
        limits=session.limits(settings.first_answer_s),
        tick=session.tick,
    )


def _floor_ms(name: str, batch: int, settings: Settings, mode: Mode, ceilings: Ceilings) -> float:
    """Return the least time with one kernel per convolution, and everything else part of those."""
    dtype = DTYPES[settings.dtype]
    rates = rates_of(ceilings, dtype)
    schedule = construct(
        dissect(name, settings.image_size),
        "conv",
        training=mode != "forward",
        batch=batch,
        itemsize=dtype.itemsize,
        rates=rates,
    )
    return 1e3 * schedule.floor(rates)


@lru_cache(maxsize=1)
def workload(name: str, batch: int, settings: Settings) -> Workload:
    """Return the model and its images, which the modes share."""
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    return Workload.create(name, batch, settings.image_size, device, dtype, settings.seed)


def _facts(
    work: Workload, batch: int, cost: Cost, settings: Settings, mode: Mode
) -> dict[str, Any]:
    return {
        "model": work.name,
        "mode": mode,
        "batch": batch,
        "image_size": settings.image_size,
        "dtype": settings.dtype,
        "device": settings.device,
        "threads": torch.get_num_threads(),
        "reference": work.library,
        "parameters": cost.parameters,
        "gmacs": cost.flops / 2e9,
        "mega_activations": cost.activations / 1e6,
    }
