"""`vertebra env`: what runs here, how fast at best, and what to put into a bug report."""

from __future__ import annotations

import json as json_
import platform
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..bench.cli import console, log
from ..bench.report import plain_table, show_ceilings
from ._app import choose_device

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..bench.ceilings import Ceilings


def env(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default: the GPU if there is one.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Time a copy and matrix products: seconds."),
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report.")] = False,
) -> None:
    """Show versions and devices, what can run here and what not, and the machine's speed."""
    place = choose_device(device)
    with log().status("Looking around") as status:
        report = look_around(place)
        ceilings = _measure(place, status.update, report) if measure else None
    if json:
        typer.echo(json_.dumps(report, indent=1))
    else:
        _show(report, ceilings, console(100))


def _measure(
    device: torch.device, say: Callable[[str], None], report: dict[str, Any]
) -> Ceilings | None:
    """Measure, and put what was found, or why nothing was, into the report."""
    from ..bench import ceilings

    try:
        found = ceilings.measure(device, say=say)
    except (ImportError, RuntimeError) as error:  # no triton, no memory: worth a report too
        report["ceilings"] = f"{type(error).__name__}: {error}"
        return None
    report["ceilings"] = found.to_dict()
    return found


def look_around(device: torch.device) -> dict[str, Any]:
    """Return everything but the speed, as plain data."""
    from ..bench.environment import describe
    from ._paths import refusals, ways

    return {
        "environment": {**describe(device), "system": platform.platform()},
        "gpus": list(_gpus()),
        "ways": [way._asdict() for way in ways(device)],
        "ops": refusals(device),
        "ceilings": None,
    }


def _gpus() -> Iterator[dict[str, Any]]:
    import torch

    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        yield {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory": found.total_memory,
        }


# ----------------------------------------------------------------------------------- the output

_PACKAGES = ("torch", "triton", "torchvision", "timm", "transformers", "numpy")


def _show(report: dict[str, Any], ceilings: Ceilings | None, out: Console) -> None:
    out.print(_versions(report), "", _ways(report["ways"]), *_ops(report["ops"]), sep="\n")
    out.print()
    if ceilings is not None:
        show_ceilings(ceilings, out)
    elif report["ceilings"] is not None:
        out.print(f"[red]The speed cannot be measured:[/] {escape(report['ceilings'])}")


def _versions(report: dict[str, Any]) -> Table:
    found = report["environment"]
    commit = f", commit {found['commit'][:12]}" if found["commit"] else ""
    rows = {
        "vertebra": f"[bold]{found['vertebra']}[/]{commit}",
        "python": f"{found['python']} on {platform.system()}, {platform.machine()}",
        **{name: found[name] or "[dim]not installed[/]" for name in _PACKAGES},
    }
    for i, gpu in enumerate(report["gpus"]):
        rows[f"GPU {i}"] = (
            f"[bold]{gpu['name']}[/], {gpu['memory'] / 2**30:.0f} GiB, "
            f"{gpu['multiprocessors']} multiprocessors, capability {gpu['capability']}"
        )
    if report["gpus"]:
        rows["driver"] = f"{found.get('driver')}, CUDA {found.get('cuda')}"
    else:
        rows["CPU"] = f"[bold]{found['device']}[/], {found['cores']} cores"
    if found["backend"] != "auto":
        rows["backend"] = f"[yellow]{found['backend']}[/], by VERTEBRA_BACKEND"
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(f"[dim]{name}[/]", value)
    return grid


def _ways(ways: list[dict[str, Any]]) -> Table:
    table = plain_table("What runs here", "")
    table.show_header = False
    table.add_column()
    table.add_column(overflow="fold")
    for way in ways:
        why, note = way["why_not"], escape(way["note"])
        said = note if why is None else f"{escape(why)}; [dim]{note}[/]"
        mark = "[green]yes[/]" if why is None else "[red]no[/]"
        table.add_row(mark, way["name"], said)
    return table


def _ops(ops: dict[str, dict[str, str | None]]) -> Iterator[Any]:
    """Yield a table of what each op runs on, and the reasons why not on Triton."""
    table = plain_table("What each op runs on, by dtype", "op")
    reasons: list[str] = []
    for name in next(iter(ops.values())):
        table.add_column(name)
    for op, by_dtype in ops.items():
        cells: list[str] = []
        for reason in by_dtype.values():
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            number = "" if reason is None else f" {reasons.index(reason) + 1}"
            cells.append("[green]Triton[/]" if reason is None else f"PyTorch[dim]{number}[/]")
        table.add_row(op, *cells)
    yield table
    for i, reason in enumerate(reasons, 1):
        yield f"[dim]{i}  not on Triton: {escape(reason)}[/]"
