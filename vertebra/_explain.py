"""`explain`: what each fused site of a model does, why, and what it costs at best."""

from __future__ import annotations

import time
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
    """The sites of one forward pass, in order; prints as a table."""

    def __str__(self) -> str:
        """Return an aligned table, one line per site, and a summary."""
        rows = [("module", "op", "path", "MB", "floor us", "reason")]
        rows += [
            (s.module, s.op, s.path, f"{s.bytes / 1e6:.2f}", f"{s.floor_us:.1f}", s.reason or "")
            for s in self
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(6)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        on_triton = sum(s.path == "triton" for s in self)
        total = sum(s.floor_us for s in self)
        lines.append(f"{on_triton} of {len(self)} sites on Triton; floor {total:.1f} us in all")
        return "\n".join(lines)


def explain(model: nn.Module, x: Tensor, *, bandwidth: float | None = None) -> Explanation:
    """Run `model(x)` once and report every fused site in it.

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

    with _undone(model), _named_calls(model, path), observe(record), torch.no_grad():
        model(x)
    return sites


@contextmanager
def _named_calls(model: nn.Module, path: list[str]) -> Generator[None]:
    """Keep the qualified name of the running module on top of `path`.

    By hooks that are no module's own: one that has its own is not fused.
    """
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        if module in names:
            path.append(names[module])

    def leave(module: nn.Module, *_: Any) -> None:
        if module in names:
            path.pop()

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
