"""`vertebra tune`: which kernel runs each convolution of a fused model, by measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench.cli import (
    Batch,
    Device,
    Dtype,
    Filter,
    ImageSize,
    Json,
    Minutes,
    Patience,
    Resume,
    Rounds,
    Tiny,
    console,
    leave,
    numbers,
    say_written,
    usage_error,
)


def tune(
    names: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Of `vertebra list`; other libraries' run the same."),
    ],
    batch: Batch = None,
    dtype: Dtype = None,
    image_size: ImageSize = None,
    device: Device = None,
    filter: Filter = "",
    rounds: Rounds = None,
    tiny: Tiny = False,
    minutes: Minutes = None,
    patience: Patience = None,
    json: Json = None,
    resume: Resume = False,
) -> None:
    """Measure what may run each convolution of a model after `vertebra.fuse`, and keep the fastest.

    The table lies beside PyTorch's caches (TORCH_HOME moves it), one file per device.

    It grows with every run; `fuse` heeds it from the next process on.

    A batch that was not measured takes the nearest.
    """
    import torch

    from ..bench import outputs, tune
    from ..bench.session import Session
    from ..bench.settings import Settings

    try:
        settings = Settings.choose(
            device=device,
            dtype=dtype,
            batches=numbers(batch),
            image_size=image_size,
            rounds=rounds,
            match=filter,
            minutes=minutes,
            first_answer_s=patience,
            tiny=tiny,
        )
        found = tune.places(names, settings)
        if not found:
            raise ValueError(f"filter: no convolution is called so; got {filter!r}")
        path, table = json or Path("bench/out/tune.json"), None
        if not tiny:  # which is a trial
            table = tune.table_of(torch.device(settings.device))
            outputs.check(table)
        session = Session.open("tune", settings, path, resume=resume)
    except ValueError as error:
        raise usage_error(error) from None
    report = session.run(tune.tasks(found, settings))
    tune.show(report, console())
    say_written([path] if table is None or not table.exists() else [table, path])
    leave(report)
