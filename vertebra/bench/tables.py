"""Results as CSV: of models with the columns of timm's result files, then what those lack."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from .report import rates
from .results import Comparison, Report, Row, quartiles


def write(report: Report, path: Path) -> None:
    """Write a line per provider that was timed; of models the fastest first, as timm does."""
    of = _kernel if report.kind == "kernels" else _model
    lines = [
        of(comparison, row) | _more(comparison, row, report)
        for comparison in report.comparisons
        for row in comparison.timed
    ]
    if not lines:
        return
    if report.kind != "kernels":
        lines.sort(key=lambda line: -line["img/s"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)


def _model(comparison: Comparison, row: Row) -> dict[str, Any]:
    """Return timm's columns, in its units: milliseconds, millions, billions."""
    facts = comparison.facts
    per_second = round(rates(comparison, row)["img/s"], 2)
    parameters = round(facts["parameters"] / 1e6, 2)
    if facts["mode"] == "forward":
        return {
            "model": facts["model"],
            "infer_img_size": facts["image_size"],
            "infer_samples_per_sec": per_second,
            "infer_step_time": round(row.median_ms, 3),
            "infer_batch_size": facts["batch"],
            "param_count": parameters,
            "infer_gmacs": round(facts["gmacs"], 2),
            "infer_macts": round(facts["mega_activations"], 2),
        }
    return {
        "model": facts["model"],
        "train_samples_per_sec": per_second,
        "train_step_time": round(row.median_ms, 3),
        "train_batch_size": facts["batch"],
        "train_img_size": facts["image_size"],
        "param_count": parameters,
    }


def _kernel(comparison: Comparison, row: Row) -> dict[str, Any]:
    names = ("case", "op", "direction", "layout", "options", "numbers", "path")
    return {name: comparison.facts[name] for name in names}


def _more(comparison: Comparison, row: Row, report: Report) -> dict[str, Any]:
    low, middle, high = quartiles(row.samples_ms)
    floor = comparison.floor_ms(report.ceilings)
    speedups = comparison.speedups(row)
    return {
        "provider": row.provider,
        "dtype": comparison.facts["dtype"],
        "device": report.environment["device"],
        "torch": report.environment["torch"],
        "ms": middle,
        "ms_low": low,
        "ms_high": high,
        **rates(comparison, row),
        "of_floor": None if floor is None else floor / middle,
        "x_peer": quartiles(speedups)[1] if speedups else None,
        "first_call_s": row.first_call_s,
        "peak_bytes": row.peak_bytes,
        "saved_bytes": row.saved_bytes,
        "method": row.method,
    }
