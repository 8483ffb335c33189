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
    Minutes,
    Patience,
    Resume,
    Tiny,
    console,
    leave,
    numbers,
    usage_error,
)


def tune(
    names: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Of `vertebra list`; other libraries' are alike."),
    ],
    batch: Batch = None,
    dtype: Dtype = None,
    image_size: ImageSize = None,
    device: Device = None,
    filter: Filter = "",
    rounds: Annotated[int, typer.Option(help="Samples per candidate.")] = 10,
    tiny: Tiny = False,
    minutes: Minutes = None,
    patience: Patience = None,
    json: Annotated[Path, typer.Option(help="Where all times are kept as they come.")] = Path(
        "bench/out/tune.json"
    ),
    resume: Resume = False,
) -> None:
    """Measure what may run each convolution of a model after `vertebra.fuse`, and keep the fastest.

    The table is the user's, beside PyTorch's caches (TORCH_HOME moves it), one file per device; it
    grows with every run, and `fuse` heeds it from the next process on. A batch that was not
    measured takes the nearest.
    """
    import torch

    from ..bench import tune
    from ..bench.session import Session
    from ..bench.settings import Settings

    try:
        settings = Settings.choose(
            device=device,
            dtype=dtype,
            batches=numbers(batch),
            image_size=image_size,
            rounds=2 if tiny else rounds,
            match=filter,
            minutes=minutes,
            first_answer_s=patience,
            tiny=tiny,
        )
        found = tune.places(names, settings)
        if not found:
            raise ValueError(f"filter: no convolution is called so; got {filter!r}")
        session = Session.open("tune", settings, json, resume=resume)
    except ValueError as error:
        raise usage_error(error) from None
    report = session.run(tune.tasks(found, settings))
    tune.show(report, console())
    written = [str(json)]
    if not tiny:  # which is a trial
        written.insert(0, str(tune.table_of(torch.device(settings.device))))
    console().print(f"written: {', '.join(written)}", highlight=False)
    leave(report)
