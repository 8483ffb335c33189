"""The main job, `make bench`: build a ResNet-50, check its answers, measure it and its peers."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import explain
from . import models, report
from .ceilings import DTYPES
from .results import Report
from .session import Session
from .settings import Settings
from .workload import VARIANTS, Mode

MODES: dict[Mode, float] = {"forward": 0.4, "training": 1.0}  # share of the minutes, by its end


def choose(*, quick: bool = False, **options: Any) -> Settings:
    """Return the settings given, `Settings.choose`'s, and for the others what suits the machine."""
    settings = Settings.choose(known=VARIANTS, **options)
    gpu = settings.on_gpu
    changes: dict[str, Any] = {"minutes": 15.0 if gpu else 4.0, "compiled": not quick}
    if options.get("rounds") is None:
        changes["rounds"] = 3 if quick else 20 if gpu else 10
    if options.get("image_size") is None and quick and not gpu:
        changes["image_size"] = 128
    return replace(settings, **changes)


def run(model: str, settings: Settings, path: Path, console: Console) -> Report:
    """Measure inference and training; keep all in `path`, print the tables."""
    begin = time.monotonic()
    session = Session.open("main", settings, path)
    for mode, share in MODES.items():
        session.deadline = begin + 60 * settings.minutes * share
        if not session.report.interrupted:
            session.run(models.tasks([model], settings, mode))
    found = session.report
    if not found.interrupted:
        found.notes += notes(model, settings)
        session.save()
    report.show(found, console)
    return found


def notes(model: str, settings: Settings) -> list[str]:
    """Return what a reader of the tables must know."""
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    (batch,) = settings.batches
    workload = models.workload(model, batch, settings)
    ours, _ = workload.build("vertebra")
    x = workload.inputs(channels_last=True)[0]
    sites = explain(ours.to(device, dtype).eval(), x, bandwidth=1e12)
    on_triton = [site for site in sites if site.path == "triton"]
    found = [f"{len(on_triton)} of vertebra's {len(sites)} fused sites ran on Triton."]
    if device.type != "cuda":
        found.insert(
            0,
            f"No GPU: {settings.dtype}, batch {batch}; the Triton kernels are not exercised here, "
            "vertebra is plain PyTorch like its peers.",
        )
    elif len(on_triton) < len(sites):
        found.append("Why not all: " + "; ".join({s.reason for s in sites if s.reason}) + ".")
    found.append(
        "Errors are relative, worst tensor, against the reference model in fp64 on the CPU, with "
        "random weights, since the packages bring no trained ones; the budget is twice eager's own."
    )
    return found
