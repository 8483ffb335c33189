"""Parity: every model here beside torchvision's, timm's and transformers' of the same name.

A row compares one model with one peer's: the number of parameters; the keys, as exported in the
peer's layout; and, with the peer's random weights loaded here, the logits of both image sizes in
eval mode and the gradients of all parameters in training. All in fp32 and plain PyTorch, where a
network of batch norms has the same bits, and a ConvNeXt the same logits up to rounding. Its
gradients are compared in fp64, where rounding cannot pass for a difference.

A model too large for the memory at hand is compared by parameters and keys alone, and says so.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ..kernels import backend
from ..models import create_model, export_weights, list_models, load_weights
from ..models._layouts import export
from ..testing.parity import build_on_meta, randomize, relative_error
from . import peers
from .report import plain_table, print_table
from .runner import Unavailable

ALLOWED = {"resnet": (0.0, 0.0), "regnet": (0.0, 0.0), "convnext": (5e-6, 1e-11)}
"""By family, of logits and of gradients, the largest difference relative to the magnitude."""


@dataclass
class Row:
    """One model and one peer's."""

    model: str
    peer: str
    family: str
    parameters: int
    peer_parameters: int
    keys_equal: bool
    outputs: dict[int, float]  # by image size
    gradients: float | None
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether anything differs by more than rounding may explain."""
        logits, gradients = ALLOWED[self.family]
        return not (
            self.parameters == self.peer_parameters
            and self.keys_equal
            and all(error <= logits for error in self.outputs.values())
            and (self.gradients is None or self.gradients <= gradients)
        )


def torchvision_model(name: str) -> nn.Module:
    """Build torchvision's model."""
    if name.startswith("regnet"):  # which the meta device is too little for
        return peers.torchvision_model(name)
    return build_on_meta(peers.torchvision_model, name)


def timm_model(name: str) -> nn.Module:
    """Build timm's model."""
    model = build_on_meta(peers.timm_model, name)
    constants = {key for key, _ in model.named_buffers()} - model.state_dict().keys()
    return peers.timm_model(name) if constants else model  # which no weights would restore


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "transformers": peers.transformers_model,
}


def compare(name: str, peer: str, sizes: Sequence[int], memory: int) -> Row:
    """Compare a model with a peer's; raise `Unavailable` where the peer has none."""
    theirs = BUILDERS[peer](name)
    ours: Any = build_on_meta(create_model, name)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    exported = export_weights(ours, peer)
    keys = {key: value.shape for key, value in theirs.state_dict().items()}
    row = Row(
        *(name, peer, ours.family, *counts),
        keys_equal={key: value.shape for key, value in exported.items()} == keys,
        outputs={},
        gradients=None,
    )
    itemsize = 8 if ALLOWED[ours.family][1] else 4
    needed = itemsize * sum(counts) * 2 + 2**31  # weights, gradients, activations
    if needed > memory:
        row.note = f"needs {needed / 2**30:.0f} GiB of memory: parameters and keys only"
        return row
    theirs = randomize(theirs)
    ours = ours.to_empty(device="cpu")
    load_weights(ours, theirs.state_dict())
    for size in sizes:
        x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            row.outputs[size] = relative_error(_logits(ours.eval(), x), _logits(theirs.eval(), x))
    row.gradients = _gradient_error(ours.train(), theirs.train(), sizes[-1], peer)
    return row


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def _gradient_error(ours: Any, theirs: nn.Module, size: int, peer: str) -> float:
    """Return the error of all gradients, by name, after one loss on two images."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    if ALLOWED[ours.family][1]:
        x, ours, theirs = x.double(), ours.double(), theirs.double()
    for model in (ours, theirs):
        torch.manual_seed(0)
        F.cross_entropy(_logits(model, x), torch.tensor([1, 2])).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = export(gradients, ours.family, peer)
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in expected)


def run(
    pattern: str, of: Sequence[str], sizes: Sequence[int], console: Console, out: Path | None
) -> bool:
    """Compare, write what is found as it is found, print it; return whether all is equal.

    After Ctrl-C it prints what there is, and leaves.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
    table = plain_table("plain PyTorch, the same weights: relative differences", "model")
    for heading in ("peer", "parameters", "keys", *(f"logits {size}" for size in sizes)):
        table.add_column(heading, justify="right" if "logits" in heading else "left", no_wrap=True)
    table.add_column("gradients", justify="right", no_wrap=True)
    table.add_column("")
    found: list[Row] = []
    names = [(name, peer) for name in list_models(pattern) for peer in of]
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress, backend("eager"):
            task = progress.add_task("", total=len(names))
            for name, peer in names:
                progress.update(task, description=f"{name}, {peer}")
                with suppress(Unavailable):
                    row = compare(name, peer, sizes, memory)
                    found.append(row)
                    table.add_row(*_cells(row, sizes))
                    if out is not None:
                        out.write_text(json.dumps([asdict(row) for row in found], indent=1))
                gc.collect()
                progress.advance(task)
    finally:
        print_table(console, table, "parameters", "keys")
    wrong = [row for row in found if row.failed]
    console.print(f"{len(found)} comparisons, {len(wrong)} with differences")
    return not wrong


def load(path: Path) -> list[Row]:
    """Read what `run` wrote."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    for row in rows:
        row["outputs"] = {int(size): error for size, error in row["outputs"].items()}
    return [Row(**row) for row in rows]


def _cells(row: Row, sizes: Sequence[int]) -> Iterator[str]:
    yield from (row.model, row.peer)
    same = row.parameters == row.peer_parameters
    yield f"{row.parameters:,}" if same else f"{row.parameters:,}, not {row.peer_parameters:,}"
    yield "equal" if row.keys_equal else "DIFFER"
    for error in (*(row.outputs.get(size) for size in sizes), row.gradients):
        yield "" if error is None else "equal" if error == 0 else f"{error:.1e}"
    yield "DIFFERS" if row.failed else row.note
