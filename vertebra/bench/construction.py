"""Schedules that nobody has to have written yet, constructed from a network's anatomy.

* `conv`: one kernel per convolution, what is elementwise in its prologue and epilogue. In training
  batch statistics come out of the epilogue, the consumer's prologue normalises, and the two
  gradients of a convolution are two kernels.
* `shared`: the same, where the two gradients share one read of what they both need (training).
* `block`: the input of a block is read once, its output written once. In training the backward pass
  computes what is inside again; with statistics of the batch, which need the whole map before the
  first pixel can be normalised, that is a bound and not a plan. ConvNeXt's blocks are two kernels,
  the depthwise convolution and the MLP, and write the MLP's hidden map where that is faster; with a
  global response norm, which needs the whole hidden map, three that write it.

A gradient costs the operations of the forward pass. Weights are read once per kernel and batch, and
their gradients written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from .anatomy import Anatomy, Conv, Part
from .schedules import Rates, Schedule

__all__ = ["construct"]


def construct(
    anatomy: Anatomy,
    way: Literal["conv", "shared", "block"],
    *,
    training: bool,
    batch: int,
    itemsize: int,
    rates: Rates,
) -> Schedule:
    """Return a schedule; `rates` decide what it keeps."""
    if way == "shared" and not training:
        raise ValueError("inference has no gradients to share reads: use conv")
    schedule = Schedule(way, training, batch, itemsize)
    write = _ConvNeXt if anatomy.family == "convnext" else _Normed
    write(anatomy, schedule, rates).run()
    return schedule


class _Writer:
    """Writes the kernels of one schedule."""

    def __init__(self, anatomy: Anatomy, schedule: Schedule, rates: Rates) -> None:
        self.s, self.rates = schedule, rates
        self.stem, *self.blocks, self.head = anatomy.parts
        self.last = [self.stem, *self.blocks][-1]

    def run(self) -> None:
        """Write all kernels."""
        raise NotImplementedError

    def gradients(
        self,
        part: Part,
        conv: Conv,
        both: int,
        write: int,
        *,
        dx: int = 0,
        dweight: int = 0,
        shares: bool = False,
    ) -> None:
        """Write the backward pass of a convolution.

        Args:
            part: that it belongs to.
            conv: the convolution.
            both: elements that both gradients read.
            write: elements of dx.
            dx: elements that only dx reads.
            dweight: likewise.
            shares: one kernel, whatever the schedule's way.
        """
        if shares or self.s.way == "shared":
            read = both + dx + dweight
            self.s.add(part.name, f"{conv.name} backward", read, write, [conv], times=2, weights=2)
        else:
            self.s.add(part.name, f"{conv.name} dx", both + dx, write, [conv])
            self.s.add(part.name, f"{conv.name} dweight", both + dweight, 0, [conv])


class _Normed(_Writer):
    """Networks of convolutions with batch norms: ResNet and RegNet.

    In training only the outputs of convolutions, and of blocks, are kept. A block's last norm, its
    add and its activation run in the prologue of the next block's first kernel, which writes the
    sum as well.
    """

    def run(self) -> None:
        if self.s.way == "block":
            self._whole()
        elif self.s.training:
            self._train()
        else:
            self._infer()

    def _whole(self) -> None:
        s, stem = self.s, self.stem
        first, y = stem.convs[0], stem.pool[1] if stem.pool else stem.y
        s.add(stem.name, "stem", first.read, y, stem.convs)
        for b in self.blocks:
            s.add(b.name, "block", b.x, b.y, b.all_convs)
        if not s.training:
            self._classify(self.last.y, self.head.y)
            return
        self._classify(self.last.y, self.last.y)
        for b in reversed(self.blocks):
            s.save(b.x)
            s.add(b.name, "block backward", b.x + b.y, b.x, b.all_convs, times=3, weights=2)
        s.add(stem.name, "stem backward", first.read + y, 0, stem.convs, times=2, weights=2)

    def _infer(self) -> None:
        s, stem = self.s, self.stem
        for c in stem.convs:
            s.add(stem.name, c.name, c.read, c.y, [c])
        if stem.pool:
            s.add(stem.name, "pool", *stem.pool)
        for b in self.blocks:
            if b.shortcut:
                s.add(b.name, b.shortcut.name, b.shortcut.read, b.shortcut.y, [b.shortcut])
            *_, last = b.convs
            residual = b.y if b.adds else 0
            for c, before in zip(b.convs, [None, *b.convs], strict=False):
                gate = b.gate if before and before is b.gated else []  # in the prologue
                adds = residual if c is last and c is not b.gated else 0
                s.add(b.name, c.name, c.read + adds, c.y, [c, *gate])
            if b.gated is last:  # nothing comes after it whose prologue could apply the gate
                s.add(b.name, "gate", b.y + residual, b.y, b.gate)
        self._classify(self.last.y, self.head.y)

    def _classify(self, read: int, write: int) -> None:
        """Write the head, both passes of it: the pool reads the last map."""
        times = 3 if self.s.training else 1
        self.s.add("head", "head", read, write, self.head.convs, times=times, weights=times)

    def _train(self) -> None:
        s, stem = self.s, self.stem
        for c in stem.convs:
            s.add(stem.name, c.name, c.read, c.y, [c])
            s.save(c.y)
        if stem.pool:
            s.add(stem.name, "norm + pool", *stem.pool)
            s.save(stem.pool[1])
        for previous, b in self._joined():
            self._forward(b, previous)
        terms = 2 if self.last.adds else 1  # of the last sum, which nobody has to write
        self._classify(terms * self.last.y, 0)
        s.add(self.last.name, "join backward", terms * self.last.y, self.last.y)
        for previous, b in reversed([*self._joined()]):
            self._backward(b, previous)
        self._stem_backward()

    def _joined(self) -> Iterator[tuple[Part | None, Part]]:
        """Yield every block with the one before it."""
        yield from zip([None, *self.blocks], self.blocks, strict=False)

    def _forward(self, b: Part, previous: Part | None) -> None:
        s, first = self.s, b.convs[0]
        if previous and previous.adds:  # it ends in this prologue, which writes the sum
            s.add(b.name, first.name, 2 * first.x, first.x + first.y, [first])
            s.save(first.x)
        else:
            s.add(b.name, first.name, first.x, first.y, [first])
        s.save(first.y)
        if b.shortcut:
            s.add(b.name, b.shortcut.name, b.shortcut.read, b.shortcut.y, [b.shortcut])
            s.save(b.shortcut.y)
        for c in b.convs:
            if c is not first:
                s.add(b.name, c.name, c.read, c.y, [c])
                s.save(c.y)
            if c is b.gated:  # what it pools is normalised: statistics have to be there
                s.add(b.name, "gate: pool", c.y, 0, b.gate)

    def _backward(self, b: Part, previous: Part | None) -> None:
        first, *others = b.convs
        for before, c in reversed([*pairwise(b.convs)]):
            if c is others[-1] is b.gated:
                self._gate_backward(b, c.y)
            # the epilogue reads the input once more, for the mask and for the sums of its norm
            self.gradients(b, c, 2 * c.y + c.x, c.x)
            if before is b.gated:
                self._gate_backward(b, before.y)
        residual = b.x if b.adds else 0
        if b.shortcut:
            c = b.shortcut
            self.gradients(b, c, 2 * c.y, c.read, dweight=c.read)
            residual = c.read
        if previous and previous.adds:  # outputs of its convolutions, for the sums of their norms
            residual += b.x * (2 if previous.shortcut else 1)
        self.gradients(b, first, 2 * first.y + first.x, first.x, dx=residual)

    def _gate_backward(self, b: Part, elements: int) -> None:
        self.s.add(b.name, "gate: reduce", 2 * elements, 0, b.gate, times=2, weights=2)

    def _stem_backward(self) -> None:
        s, stem = self.s, self.stem
        if stem.pool:
            wide, narrow = stem.pool
            s.add(stem.name, "pool backward", narrow + wide, wide)
        first, *others = stem.convs
        for c in reversed(others):
            self.gradients(stem, c, 2 * c.y + c.x, c.x)
        s.add(stem.name, f"{first.name} dweight", 2 * first.y + first.read, 0, [first])


class _ConvNeXt(_Writer):
    """Networks of depthwise convolutions, layer norms and MLPs."""

    def run(self) -> None:
        for part in (self.stem, *self.blocks):
            if part.kind == "convnext":
                self._block(part)
            else:
                self._plain(part)
        times = 3 if self.s.training else 1
        y = 0 if self.s.training else self.head.y
        self.s.add("head", "head", self.last.y, y, self.head.convs, times=times, weights=times)
        if self.s.training:
            self.s.add("head", "head backward", 0, self.last.y)

    def _plain(self, part: Part) -> None:
        """Write the stem, or what downsamples: the norm beside it is in a prologue or epilogue."""
        s = self.s
        for c in part.convs:
            s.add(part.name, c.name, c.read, c.y, [c])
            if not s.training:
                continue
            if c is self.stem.convs[0]:
                s.save(c.y)
                s.add(part.name, f"{c.name} dweight", c.read + 2 * c.y, 0, [c])
            else:
                s.save(c.x)
                self.gradients(part, c, c.y + c.x, c.x, shares=s.way == "block")

    def _block(self, part: Part) -> None:
        s = self.s
        depthwise, fc1, fc2 = part.convs
        x, hidden = part.x, fc1.y
        s.add(part.name, depthwise.name, x, x, [depthwise])
        if s.way == "block" and not part.grn:
            self._mlp(part, depthwise, fc1, fc2)
            return
        s.add(part.name, fc1.name, x, hidden, [fc1])
        s.add(part.name, fc2.name, hidden + x, x, [fc2])
        if not s.training:
            return
        s.save(2 * x + hidden)
        shares = s.way == "block"
        self.gradients(part, fc2, x + hidden, hidden, shares=shares)
        # the backward pass of a global response norm waits for sums, and reads the hidden map anew
        again = hidden if part.grn else 0
        self.gradients(part, fc1, hidden + again, x, dweight=x, shares=shares)
        self.gradients(part, depthwise, 2 * x, x, dx=x, dweight=x, shares=shares)

    def _mlp(self, part: Part, depthwise: Conv, fc1: Conv, fc2: Conv) -> None:
        s, x, hidden = self.s, part.x, fc1.y
        if not s.training:
            s.add(part.name, "mlp", 2 * x, x, [fc1, fc2])
            return
        keeps = self._keeps(fc1, x, hidden)
        kept = hidden if keeps else 0
        s.add(part.name, "mlp", 2 * x, x + kept, [fc1, fc2])
        # two gradients each, and the hidden map once more where it was not kept
        again = [] if keeps else [fc1]
        s.add(
            part.name, "mlp backward", 2 * x + kept, x, [fc1, fc2], times=2, weights=2, again=again
        )
        s.add(part.name, f"{depthwise.name} backward", 3 * x, x, [depthwise], times=2, weights=2)
        s.save(2 * x + kept)

    def _keeps(self, fc1: Conv, x: int, hidden: int) -> bool:
        """Return whether writing the hidden map and reading it takes less than computing it."""
        flops = fc1.tensor_flops

        def seconds(elements: int, operations: float) -> float:
            return max(
                self.s.itemsize * elements / self.rates.bytes, operations / self.rates.tensor
            )

        kept = seconds(3 * x + hidden, 2 * flops) + seconds(3 * x + hidden, 4 * flops)
        again = seconds(3 * x, 2 * flops) + seconds(3 * x, 5 * flops)
        return kept < again
