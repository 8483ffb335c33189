"""`explain`: what each fused site of a model does, why, its cost at best, and what is left out."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from . import interop
from .interop._swap import path_of
from .kernels._op import Call, observe


class Site(NamedTuple):
    """One fused site: where, which op, how it ran and why, its forward traffic and floor."""

    module: str
    op: str
    path: str
    reason: str | None
    bytes: int
    floor_us: float


class Explanation(list[Site]):
    """The sites of one forward pass, in order; prints as a table, with rich as rich's.

    Attributes:
        left: the modules that an op could serve and that ran without one, each with the reason.
    """

    left: list[interop.Site]

    def summary(self) -> list[str]:
        """Return how many sites took which path, the floor of all, and what was left and why."""
        paths = Counter(site.path for site in self)
        others = "".join(f", {n} on {p}" for p, n in paths.items() if p not in ("triton", "eager"))
        total = sum(site.floor_us for site in self)
        on = f"{paths['triton']} of {len(self)} sites on Triton{others}"
        lines = [f"{on}; floor {total:.1f} us in all"]
        reasons: dict[tuple[str, str | None], list[str]] = defaultdict(list)
        for site in self.left:
            reasons[site.cls.rpartition(".")[2], site.reason].append(site.name or "the model")
        for (cls, reason), names in reasons.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left alone: {cls} ({names[0]}{others}): {reason}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "sites": [site._asdict() for site in self],
            "left": [site._asdict() for site in self.left],
        }

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (s.module, s.op, s.path, f"{s.bytes / 1e6:.2f}", f"{s.floor_us:.1f}", s.reason or "")
            for s in self
        ]

    def __str__(self) -> str:
        """Return an aligned table, one line per site, and the summary."""
        rows = [_HEADINGS, *self._rows()]
        widths = [max(len(r[i]) for r in rows) for i in range(len(_HEADINGS))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        return "\n".join(lines + self.summary())

    def __rich__(self) -> Any:
        """Return the same as a table of rich, which is who asks for it."""
        from rich.console import Group
        from rich.table import Table

        table = Table(*_HEADINGS)
        for row in self._rows():
            table.add_row(*row)
        return Group(table, *self.summary())


_HEADINGS = ("module", "op", "path", "MB", "floor us", "reason")

# norms that an op computes, where they stand in a module that knows it
_NORMS = (nn.BatchNorm2d, nn.LayerNorm)


def explain(model: nn.Module, x: Tensor, *, bandwidth: float | None = None) -> Explanation:
    """Run `model(x)` once and report every fused site in it, and what was left alone.

    The floor is the time the site's forward traffic takes at `bandwidth` bytes per second, by
    default that of a large copy measured here and now. Buffers and random state are as before
    afterwards, and the model stays in the mode it is in.

    >>> from vertebra import backend
    >>> from vertebra.nn import BatchNormAct2d
    >>> with backend("eager"):
    ...     print(explain(BatchNormAct2d(4), torch.randn(2, 4, 8, 8), bandwidth=1e9))
    module  op              path   MB    floor us  reason
            batch_norm_act  eager  0.01  6.1       backend is set to eager
    0 of 1 sites on Triton; floor 6.1 us in all
    """
    bandwidth = copy_bandwidth(x.device) if bandwidth is None else bandwidth
    sites = Explanation()
    path: list[str] = []
    alone: dict[str, nn.Module] = {}

    def record(call: Call) -> None:
        moved = call.op.traffic(*call.args).forward
        sites.append(
            Site(
                path[-1] if path else "",
                call.op.name,
                call.path,
                call.reason,
                moved,
                moved / bandwidth * 1e6,
            )
        )

    with _undone(model), _named_calls(model, path, sites, alone), observe(record), torch.no_grad():
        model(x)
    sites.left = [site for site in interop.report(model) if site.reason is not None]
    if interop.is_fused_model(model):
        sites.left += interop.unfused(model)
    known = {site.name for site in sites.left}
    sites.left += [
        interop.Site(name, path_of(type(module)), "no block here fuses it")
        for name, module in alone.items()
        if name not in known
    ]
    return sites


@contextmanager
def _named_calls(
    model: nn.Module, path: list[str], sites: list[Site], alone: dict[str, nn.Module]
) -> Generator[None]:
    """Keep the qualified name of the running module on top of `path`.

    Norms that have run without an op are added to `alone`. By hooks that are no module's own: one
    that has its own is not fused.
    """
    names = {module: name for name, module in model.named_modules()}
    before: list[int] = []  # how many sites there were when each running module was entered

    def enter(module: nn.Module, _: Any) -> None:
        if module in names:
            path.append(names[module])
            before.append(len(sites))

    def leave(module: nn.Module, *_: Any) -> None:
        if module in names:
            name = path.pop()
            if before.pop() == len(sites) and isinstance(module, _NORMS):
                alone[name] = module

    hooks = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _undone(model: nn.Module) -> Generator[None]:
    """Restore buffers and random state, whatever happens."""
    before = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read and written, of a 128 MiB copy (best of five)."""
    source = torch.ones(2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
