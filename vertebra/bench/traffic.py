"""The table of traffic: bytes that every op moves, beside what eager PyTorch has to move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from ..kernels import Traffic
from ..testing.cases import Case, cases
from ..testing.traffic import declared_and_launched, eager
from .report import plain_table


class Line(NamedTuple):
    """One way to call an op: what its launches touch, what eager moves, and the bytes of x."""

    case: Case
    ours: Traffic
    eager: Traffic
    map_bytes: int


def lines() -> Iterator[Line]:
    """Yield a line for every set of options that the bench cases call an op with.

    Options with a value, as a number of hidden channels, make no difference.
    """
    seen: dict[tuple[str, ...], Case] = {}
    for case in cases("bench"):
        switches = (option for option in case.options if "=" not in option)
        seen.setdefault((case.op, case.act, *switches), case)
    for case in seen.values():
        _, launched = declared_and_launched(case)
        x = case.inputs("meta")["x"]
        assert x is not None
        yield Line(case, launched, eager(case), x.numel() * x.element_size())


def show(console: Console) -> None:
    """Print the table, in maps of x."""
    table: Table = plain_table("Maps read and written, of the size of x", "op")
    table.add_column("options")
    for way in ("forward", "backward"):
        for heading in (way, "eager", "ratio"):
            table.add_column(heading, justify="right", no_wrap=True)
    for case, ours, theirs, one in lines():
        act = () if case.act == "none" else (case.act,)
        cells = [case.op, " ".join((*case.options, *act))]
        for mine, other in zip(ours, theirs, strict=True):
            ratio = f"{other / mine:.2f}x" if mine else ""  # without a backward pass
            cells += [f"{mine / one:.4g}", f"{other / one:.4g}", ratio]
        table.add_row(*cells)
    console.print(table)
