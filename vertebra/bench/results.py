"""What a benchmark found, as plain data: raw samples and their context, to and from JSON."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .ceilings import Ceilings

SCHEMA = 1

Status = Literal["ok", "WRONG", "FAILED", "absent", "memory", "slow", "late"]
"""Why a row has times, or has none.

* WRONG: the answer is off, and nothing was timed.
* FAILED: it raised something.
* absent: not here, or it has no such thing.
* memory: a peer that does not fit the GPU's.
* slow: no first answer within the time a provider is given.
* late: the run had no time left for it; another one may.
"""


@dataclass
class Row:
    """One provider's part in a comparison; a sample is the mean of `calls_per_sample` calls."""

    provider: str
    peer: bool
    status: Status = "ok"
    detail: str = ""
    first_call_s: float | None = None
    errors: dict[str, float] = field(default_factory=dict[str, float])
    allowed: dict[str, float] = field(default_factory=dict[str, float])
    top1: float | None = None
    calls_per_sample: int = 0
    samples_ms: list[float] = field(default_factory=list[float])
    method: str = ""
    """How it was timed, `clock.Method`."""
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else is known of it, by whoever measured it."""

    @property
    def median_ms(self) -> float:
        """The median of its samples, of which it must have some."""
        return statistics.median(self.samples_ms)

    @property
    def failed(self) -> bool:
        """Whether the run as a whole must fail because of this row, which is ours."""
        return self.refused and not self.peer

    @property
    def refused(self) -> bool:
        """Whether it was not timed because of what it did."""
        return self.status in ("WRONG", "FAILED")


@dataclass
class Comparison:
    """Providers of one answer, timed in turn: sample i of every row is from round i."""

    name: str
    rows: list[Row]
    work: dict[str, float] = field(default_factory=dict[str, float])
    """What one call gets done: "images", "flops", "bytes" it has to move."""
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    finished: bool = False
    """Whether it was measured to its end, and not cut off."""

    @property
    def timed(self) -> list[Row]:
        """The rows that have times."""
        return [row for row in self.rows if row.status == "ok" and row.samples_ms]

    @property
    def complete(self) -> bool:
        """Whether the time sufficed for every row and every round."""
        return self.finished and all(row.status != "late" for row in self.rows)

    def speedups(self, row: Row) -> list[float]:
        """Return, round by round, how many times as fast as the round's fastest peer `row` was."""
        peers = [other.samples_ms for other in self.timed if other.peer]
        if not peers:
            return []
        fastest = [min(times) for times in zip(*peers, strict=True)]
        return [best / own for best, own in zip(fastest, row.samples_ms, strict=True)]

    def floor_ms(self, ceilings: Ceilings | None) -> float | None:
        """Return the least time this work can take where nothing is faster than `ceilings`.

        "floor_ms" among the facts, from whoever knows the work better, goes first.
        """
        if "floor_ms" in self.facts or ceilings is None:
            return self.facts.get("floor_ms")
        moved, computed = (self.work.get(name, 0.0) for name in ("bytes", "flops"))
        return ceilings.floor_ms(moved, computed, self.facts["dtype"]) or None

    def best(self, peer: bool) -> Row | None:
        """Return the fastest timed row among the peers, or among ours."""
        rows = [row for row in self.timed if row.peer == peer]
        return min(rows, key=lambda row: row.median_ms, default=None)


@dataclass
class Report:
    """A whole run."""

    kind: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    comparisons: list[Comparison] = field(default_factory=list[Comparison])
    notes: list[str] = field(default_factory=list[str])
    ceilings: Ceilings | None = None
    failures: list[str] = field(default_factory=list[str])
    """Of what could not be measured at all, why."""
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        """Whether any answer of ours was wrong or missing."""
        rows = (row for comparison in self.comparisons for row in comparison.rows)
        return bool(self.failures) or any(row.failed for row in rows)

    def save(self, path: Path) -> None:
        """Write JSON, so that an interruption leaves the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        content = _finite({"schema": SCHEMA, **asdict(self)})
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            if content.pop("schema") != SCHEMA:
                raise KeyError("schema")
            for comparison in content["comparisons"]:
                comparison["rows"] = [Row(**_infinite(row)) for row in comparison["rows"]]
            content["comparisons"] = [Comparison(**c) for c in content["comparisons"]]
            if content.get("ceilings"):
                content["ceilings"] = Ceilings(**content["ceilings"])
            return cls(**content)
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path} must hold what a benchmark found, in schema {SCHEMA}, and holds something "
                "else; name another file, or measure again to replace it"
            ) from None


def plain(content: dict[str, Any]) -> dict[str, Any]:
    """Return `content` as JSON gives it back."""
    return json.loads(json.dumps(_finite(content)))


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for: an infinite error becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _infinite(row: dict[str, Any]) -> dict[str, Any]:
    errors = {name: math.inf if e is None else e for name, e in row["errors"].items()}
    return {**row, "errors": errors}
