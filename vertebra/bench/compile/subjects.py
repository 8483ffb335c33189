"""What is compared: a network, and blocks of it on the maps that reach them there.

The answer to a batch is that of a few distinct images, each as often as the others (`Workload`):
the truth in fp64 is theirs. Of a backward pass, dy is random, of that many samples too.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...models import create_model
from ...testing.parity import build_on_meta
from .. import photos
from ..ceilings import DTYPES
from ..clock import cache_copies
from ..oracle import Answers, Oracle
from ..workload import Workload, compiled, jitter, moved_by_folding, shuffled
from .plan import Direction, Plan, Variant, Visit
from .step import Batch, Gradient, Inference, Training, place

_SCALE = 16.0  # of dy: in fp16, gradients of a mean over many images would vanish


@dataclass(frozen=True)
class Subject:
    """A network, or one of its blocks, of whoever has it.

    Attributes:
        work: the network, by every provider, with the same weights.
        plan: how it is measured.
        path: of the block in our network; "" for all of it.
    """

    work: Workload
    plan: Plan
    path: str = ""
    _oracles: dict[tuple[Visit, Direction], Oracle] = field(
        default_factory=dict[tuple[Visit, Direction], Oracle]
    )

    @property
    def name(self) -> str:
        """The network's name, and the block's."""
        return " ".join(filter(None, (self.work.name, self.path)))

    def build(self, variant: Variant) -> tuple[nn.Module, list[Gradient]]:
        """Build it with the weights, on the CPU; return it and what its gradients are called."""
        network, library = self.work.build(variant.source)
        module = network.get_submodule(self._path_in(library))
        named = {n.parameter: Gradient(n.name, n.shape) for n in self.work.named(network, library)}
        return module, [named[parameter] for parameter in module.parameters()]

    def step(
        self,
        variant: Variant,
        direction: Direction,
        *,
        run: dict[str, Any] | None = None,
        visit: Visit | None = None,
    ) -> Inference:
        """Return the calls of a provider, compiled by `workload.compiled(**run)` if that is given.

        Args:
            variant: of whom.
            direction: forward, or both.
            run: how it is compiled.
            visit: the shape; the plan's by default.
        """
        module, gradients = self.build(variant)
        batch = self.batch(visit or self.plan.base)
        device, dtype = torch.device(self.plan.device), DTYPES[self.plan.dtype]
        copies = cache_copies(batch.x.numel() * dtype.itemsize, device)
        placed = place(module, device, dtype, self.plan.channels_last, direction == "training")
        batches = [batch.to(device, dtype, self.plan.channels_last) for _ in range(copies)]
        called = placed if run is None else compiled(placed, **run)
        return self._bind(placed, called, batches, direction, gradients)

    def _bind(
        self,
        module: nn.Module,
        run: Any,
        batches: Sequence[Batch],
        direction: Direction,
        gradients: Sequence[Gradient],
    ) -> Inference:
        if direction == "forward":
            return Inference(module, run, batches)
        return Training(module, run, batches, gradients, bool(self.path))

    def batch(self, visit: Visit) -> Batch:
        """Return the batch of a shape, in fp32 on the CPU."""
        distinct, index = self._distinct(visit)
        return Batch(distinct.x[index], distinct.dy[index])

    def oracle(self, visit: Visit, direction: Direction) -> Oracle:
        """Return the judge of answers to a shape: the reference in fp64, and eager runs of it.

        The eager runs are in both memory formats, and with weights moved by one rounding.
        """
        if (visit, direction) not in self._oracles:
            self._oracles[visit, direction] = self._make_oracle(visit, direction)
        return self._oracles[visit, direction]

    def _make_oracle(self, visit: Visit, direction: Direction) -> Oracle:
        dtype, device = DTYPES[self.plan.dtype], torch.device(self.plan.device)
        oracle = Oracle(self._truth(visit, direction), dtype)
        if moved := moved_by_folding(dtype, direction):
            oracle.calibrate(self._truth(visit, direction, moved))
        batch, peer = self.batch(visit), Variant("reference", False)
        for seed in range(4):
            module, gradients = self.build(peer)
            if seed >= 2:
                jitter(module, seed)
            channels_last = seed % 2 == 1
            placed = place(module, device, dtype, channels_last, direction == "training")
            batches = [batch.to(device, dtype, channels_last)]
            oracle.calibrate(self._bind(placed, placed, batches, direction, gradients)(0))
        return oracle

    def _truth(self, visit: Visit, direction: Direction, moved: float = 0.0) -> Answers:
        """Return the answers in fp64, to inputs, and in inference by weights, that are rounded.

        By weights moved by so much, if `moved` is given.
        """
        dtype = DTYPES[self.plan.dtype]
        distinct, index = self._distinct(visit)
        often = len(index) / len(distinct.x)
        module, gradients = self.build(Variant("reference", False))
        if direction == "forward":
            module = module.to(dtype)
        x, dy = distinct.x.to(dtype).double(), distinct.dy.to(dtype).double()
        exact = module.double().train(direction == "training")
        if moved:
            jitter(exact, 0, moved)
        step = self._bind(exact, exact, [Batch(x, dy * often)], direction, gradients)
        truth = step(0)
        truth["y"] = truth["y"][index]
        if "dx" in truth:
            truth["dx"] = truth["dx"][index] / often
        return truth

    def _distinct(self, visit: Visit) -> tuple[Batch, Tensor]:
        """Return the distinct images of a batch with their dy, and which one stands where."""
        distinct, index = shuffled(visit.batch, self.plan.seed)
        x = photos.batch(distinct, visit.size)
        reference = self.work.reference.eval()
        with torch.no_grad(), _Capture(reference, self._path_in(self.work.library)) as seen:
            reference(x)
        generator = torch.Generator().manual_seed(self.plan.seed)
        dy = torch.randn(seen.y.shape, generator=generator) * (_SCALE / visit.batch)
        return Batch(seen.x, dy), index

    def _path_in(self, library: str) -> str:
        """Return where the block is in a library's network."""
        if not self.path:
            return ""
        prefix = self.path + "."
        keys = {k: v for k, v in self.work.keys_in(library).items() if k.startswith(prefix)}
        ends = {v.removesuffix(k.removeprefix(prefix)) for k, v in keys.items()}
        if len(ends) == 1:  # the same names within
            return ends.pop().removesuffix(".")
        return os.path.commonpath([v.replace(".", "/") for v in keys.values()]).replace("/", ".")


class _Capture:
    """Keeps what goes into a module of a network and what comes out."""

    x: Tensor
    y: Tensor

    def __init__(self, network: nn.Module, path: str) -> None:
        self._handle = network.get_submodule(path).register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.x, self.y = inputs[0].detach(), output.detach()

    def __enter__(self) -> _Capture:
        return self

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()


@lru_cache(maxsize=1)
def subject(name: str, path: str, plan: Plan) -> Subject:
    """Return a network, or its block at `path`, which the aspects share."""
    return Subject(_workload(name, plan), plan, path)


@lru_cache(maxsize=1)
def _workload(name: str, plan: Plan) -> Workload:
    return Workload.create(
        name, *plan.base, torch.device(plan.device), DTYPES[plan.dtype], plan.seed
    )


def blocks(name: str, plan: Plan) -> list[str]:
    """Return the blocks of a network that are compared, as names of its modules.

    The last one of every stage, which repeats, and the entry of the second stage where that is of
    another kind. A quick plan has the last block of the first stage, which has the largest maps.
    """
    network: Any = build_on_meta(create_model, name)
    names = {module: name for name, module in network.named_modules()}
    found: list[str] = []
    for i, stage in enumerate(network.list_stages()):
        inside = list(getattr(stage, "blocks", stage).children())
        if i == 1 and _kind(inside[0]) != _kind(inside[-1]):
            found.append(names[inside[0]])
        found.append(names[inside[-1]])
    return found[:1] if plan.quick else found


def _kind(block: nn.Module) -> set[str]:
    return {name for name, _ in block.named_parameters()}
