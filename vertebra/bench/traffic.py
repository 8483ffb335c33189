"""The table of traffic: bytes that every op moves, beside what eager PyTorch has to move.

In fp32, where eager PyTorch needs no casts: in half precision it moves more than the table says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ..testing.cases import Case, cases
from ..testing.traffic import declared_and_launched, eager
from .report import plain_table


class Maps(NamedTuple):
    """Maps of the size of x that are read and written."""

    forward: float
    backward: float


class Line(NamedTuple):
    """One way to call an op: what its launches touch, and what eager PyTorch has to move."""

    op: str
    options: str
    ours: Maps
    eager: Maps


def lines() -> Iterator[Line]:
    """Yield a line for every set of options that the bench cases call an op on maps with.

    Options with a value, as a number of hidden channels, make no difference. The memory format does
    where eager copies a map into another one: the line then names it.
    """
    found: dict[tuple[str, str], dict[str, Case]] = {}
    for case in cases("bench"):
        x = case.inputs("meta")["x"]
        if x is None or x.dim() != 4:
            continue
        switches = [option for option in case.options if "=" not in option]
        options = " ".join((*switches, *(() if case.act == "none" else (case.act,))))
        found.setdefault((case.op, options), {}).setdefault(case.layout, case)
    for (op, options), layouts in found.items():
        counted = {layout: _count(case) for layout, case in layouts.items()}
        if len(set(counted.values())) == 1:
            yield Line(op, options, *next(iter(counted.values())))
        else:
            for layout, maps in counted.items():
                yield Line(op, f"{options} {layout}".strip(), *maps)


def _count(case: Case) -> tuple[Maps, Maps]:
    case = replace(case, dtype=torch.float32)
    x = case.inputs("meta")["x"]
    assert x is not None
    _, launched = declared_and_launched(case)
    ours, theirs = ([moved / x.nbytes for moved in way] for way in (launched, eager(case)))
    return Maps(*ours), Maps(*theirs)


def show(console: Console) -> None:
    """Print the table, in maps of x."""
    table: Table = plain_table("Maps read and written in fp32, of the size of x", "op")
    table.add_column("options")
    for way in ("forward", "backward"):
        for heading in (way, "eager", "ratio"):
            table.add_column(heading, justify="right", no_wrap=True)
    for op, options, ours, theirs in lines():
        cells = [op, options]
        for mine, other in zip(ours, theirs, strict=True):
            ratio = f"{other / mine:.2f}x" if mine else ""  # without a backward pass
            cells += [f"{mine:.4g}", f"{other:.4g}", ratio]
        table.add_row(*cells)
    console.print(table)
