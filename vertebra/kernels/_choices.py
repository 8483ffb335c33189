"""Choices by measurement: which candidate runs a call on a device, from tables that tuning makes.

A table is a JSON file per op and device name:

    {"schema": 1, "op": "conv2d_act", "device": "NVIDIA H200", "versions": {"torch": "2.11.0"},
     "choices": {"64x56x56 > 64 3x3 pad 1 bf16": {"256": "triton:tiles:2x8x8x64x64:w4:s4"}}}

`choices` maps a site (all of a call but the batch) to the candidate that was fastest, by batch; a
batch in between takes the nearest, by ratio. Tables that ship lie in `tables/` beside this file,
the user's own, which come first, in `user_folder()`. A file that cannot be used is reported, once,
and ignored; a candidate that is no more is passed over.
"""

from __future__ import annotations

import json
import math
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ._op import current_backend, forget_choices, is_plain
from ._signature import Signatures

SCHEMA = 1

Choices = dict[str, dict[int, str]]
"""The fastest candidate by site and batch."""


def user_folder() -> Path:
    """Return where the user's tables lie: beside PyTorch's caches, which `TORCH_HOME` moves."""
    return Path(torch.hub.get_dir()).parent / "vertebra"


def shipped_folder() -> Path:
    """Return where the tables lie that come with the package."""
    return Path(__file__).with_name("tables")


@cache
def device_name(device: torch.device) -> str:
    """Return the name that tables are filed under."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else device.type


def _cpu_name() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        facts = ""
    found = re.search(r"^model name\s*:\s*(.+)$", facts, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def file_of(folder: Path, op: str, device: str) -> Path:
    """Return the path of a table."""
    return folder / op / f"{re.sub(r'[^A-Za-z0-9.]+', '-', device)}.json"


@cache
def best(op: str, device: str, site: str, batch: int) -> str | None:
    """Return the candidate that was measured to be the fastest, None where nothing was."""
    measured = _tables(op, device).get(site)
    if not measured:
        return None
    return measured[min(measured, key=lambda n: (abs(math.log2(n / batch)), n))]


_remembered: list[Signatures] = []


def remembered(choose: Callable[..., str | None]) -> Callable[..., str | None]:
    """Return `choose`, which finds out once what it says of calls of one signature, aligned alike.

    What it says may also follow from the backend, from whether gradients are computed, and from the
    tables.
    """
    signatures = Signatures()
    _remembered.append(signatures)

    def chosen(*args: Any) -> str | None:
        found = signatures.find(args)
        if found is None:
            if not is_plain(args):
                return choose(*args)
            found = signatures.note(args)
        aligned = tuple(t.data_ptr() % 16 for t in found[2])
        key, plans = (current_backend(), torch.is_grad_enabled(), aligned), found[0].plans
        if key not in plans:
            plans[key] = choose(*args)
        return plans[key]

    return chosen


def forget() -> None:
    """Read tables anew, and choose anew: what whoever has written one calls."""
    for signatures in _remembered:
        signatures.clear()
    forget_choices()
    best.cache_clear()
    _tables.cache_clear()
    replay = sys.modules.get(f"{__package__}._triton._replay")
    if replay is not None:
        replay.forget()


def write(op: str, device: str, choices: Choices, versions: dict[str, str]) -> Path:
    """Add `choices` to the user's table; return its path."""
    path = file_of(user_folder(), op, device)
    merged = dict(_read(path, op))
    for site, measured in choices.items():
        merged[site] = merged.get(site, {}) | measured
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    table = {"schema": SCHEMA, "op": op, "device": device, "versions": versions, "choices": merged}
    partial.write_text(json.dumps(table, indent=1) + "\n")
    partial.replace(path)
    forget()
    return path


@cache
def _tables(op: str, device: str) -> Choices:
    shipped, own = (_read(file_of(f, op, device), op) for f in (shipped_folder(), user_folder()))
    return {site: own.get(site) or shipped[site] for site in {**shipped, **own}}


def _read(path: Path, op: str) -> Choices:
    """Return a table's choices, none where there is no file or it cannot be used."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(path, str(error))
    try:
        return dict(_choices(json.loads(text), op))
    except ValueError as error:
        return _ignored(path, str(error))


def _choices(table: Any, op: str) -> Iterator[tuple[str, dict[int, str]]]:
    """Yield the choices of a parsed table; raise ValueError saying what is wrong with it."""
    if not isinstance(table, dict):
        raise ValueError("it is not a table")
    if table.get("schema") != SCHEMA:
        raise ValueError(f"its schema is {table.get('schema')!r}, not {SCHEMA}")
    if table.get("op") != op or not isinstance(table.get("choices"), dict):
        raise ValueError(f"it has no choices for {op}")
    for site, measured in table["choices"].items():
        if not isinstance(measured, dict) or not all(isinstance(c, str) for c in measured.values()):
            raise ValueError(f"of {site!r} it has no candidates by batch")
        try:
            by_batch = {int(batch): candidate for batch, candidate in measured.items()}
        except ValueError:
            raise ValueError(f"of {site!r} a batch is no number") from None
        if min(by_batch, default=1) < 1:
            raise ValueError(f"of {site!r} a batch is not positive")
        yield site, by_batch


def _ignored(path: Path, why: str) -> Choices:
    warnings.warn(
        f"vertebra ignores the tuning table {path}: {why}. Tune again, or delete it",
        RuntimeWarning,
        stacklevel=2,
    )
    return {}
