"""Schedules: the kernels that a network could run as, each with its bytes and operations.

    floor of a kernel = max(bytes / bandwidth, tensor operations / rate, other operations / rate)
    floor of a schedule = the sum over its kernels

No launch gaps, no cache between kernels, no halos, no optimizer. The ways, from what is to be had
by fusing what surrounds one convolution to what no convolution by itself can reach:

* `conv`: one kernel per convolution, what is elementwise in its prologue and epilogue. In training
  batch statistics come out of the epilogue, the consumer's prologue normalises, and the two
  gradients of a convolution are two kernels.
* `shared`: the same, where the two gradients share one read of what they both need (training).
* `block`: the input of a block is read once, its output written once. In training the backward pass
  computes what is inside again; with statistics of the batch, which need the whole map before the
  first pixel can be normalised, that is a bound and not a plan. ConvNeXt's blocks are two kernels,
  the depthwise convolution and the MLP, and write the MLP's hidden map where that is faster.

What eager PyTorch runs, and what our ops make of it, is not constructed but observed: `tracing`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .anatomy import Anatomy, Conv, Part

Way = Literal["eager", "ops", "conv", "shared", "block"]


class Rates(NamedTuple):
    """What a machine does per second: bytes moved, tensor operations, other operations."""

    bytes: float
    tensor: float
    fma: float


class Kernel(NamedTuple):
    """One kernel on a whole batch."""

    part: str
    name: str
    bytes: float
    tensor_flops: float = 0.0
    fma_flops: float = 0.0

    def bounds(self, rates: Rates) -> dict[str, float]:
        """Return the seconds that each resource alone would take."""
        return {
            "memory": self.bytes / rates.bytes,
            "tensor": self.tensor_flops / rates.tensor,
            "fma": self.fma_flops / rates.fma,
        }

    def floor(self, rates: Rates) -> float:
        """Return the least seconds it can take."""
        return max(self.bounds(rates).values())


@dataclass
class Schedule:
    """All kernels of one pass over a batch, and the bytes that are kept for the backward pass."""

    way: Way
    training: bool
    batch: int
    itemsize: int
    kernels: list[Kernel] = field(default_factory=list[Kernel])
    saved_bytes: float = 0.0

    def add(
        self,
        part: str,
        name: str,
        read: float,
        write: float = 0,
        convs: Iterable[Conv] = (),
        *,
        times: int = 1,
        weights: int = 1,
    ) -> None:
        """Add a kernel.

        Args:
            part: that it belongs to.
            name: of the kernel.
            read: elements of maps, of one image.
            write: likewise.
            convs: the convolutions that it computes.
            times: how often: a gradient costs what the forward pass costs.
            weights: how often it reads or writes their weights.
        """
        convs = list(convs)
        moved = self.batch * (read + write) + weights * sum(conv.weight for conv in convs)
        tensor, fma = (
            self.batch * times * sum(flops)
            for flops in ([c.tensor_flops for c in convs], [c.fma_flops for c in convs])
        )
        self.kernels.append(Kernel(part, name, self.itemsize * moved, tensor, fma))

    def save(self, elements: float) -> None:
        """Count what is kept for the backward pass."""
        self.saved_bytes += self.itemsize * self.batch * elements

    @property
    def bytes(self) -> float:
        """Bytes moved."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> float:
        """Operations, on tensor cores and off them."""
        return sum(kernel.tensor_flops + kernel.fma_flops for kernel in self.kernels)

    def floor(self, rates: Rates) -> float:
        """Return the least seconds the batch can take."""
        return sum(kernel.floor(rates) for kernel in self.kernels)


def construct(
    anatomy: Anatomy,
    way: Literal["conv", "shared", "block"],
    *,
    training: bool,
    batch: int,
    itemsize: int,
    rates: Rates,
) -> Schedule:
    """Return a schedule that nobody has to have written yet; `rates` decide what it keeps."""
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
        *self.parts, head = (
            anatomy.parts
            if anatomy.parts[-1].kind == "head"
            else [
                *anatomy.parts,
                Part("head", "head"),
            ]
        )
        self.head = head

    def run(self) -> None:
        """Write all kernels."""
        raise NotImplementedError

    def inner_head(self, read: int) -> None:
        """Write the classifier; its pool reads the last map."""
        convs = self.head.convs
        outputs = sum(conv.y for conv in convs[-1:])
        times = 3 if self.s.training else 1
        self.s.add("head", "head", read, outputs, convs, times=times, weights=times)


class _Normed(_Writer):
    """Networks of convolutions with batch norms: ResNet and RegNet.

    In training only the outputs of convolutions, and of blocks, are kept. A block's last norm, its
    add and its activation run in the prologue of the next block's first kernel, which writes the
    sum as well.
    """

    def run(self) -> None:
        stem, *blocks = self.parts
        last = blocks[-1].y if blocks else stem.y
        way = self.s.way
        if way == "block":
            self._whole(stem, blocks)
            if not self.s.training:
                self.inner_head(last)
            else:
                convs = self.head.convs
                self.s.add("head", "head", last, last, convs, times=3, weights=3)
        elif self.s.training:
            self._train(stem, blocks, last)
        else:
            self._infer(stem, blocks)
            self.inner_head(last)

    def _infer(self, stem: Part, blocks: list[Part]) -> None:
        for conv in stem.convs:
            self.s.add(stem.name, conv.name, conv.read, conv.y, [conv])
        if stem.pool:
            self.s.add(stem.name, "pool", *stem.pool)
        for b in blocks:
            if b.shortcut:
                c = b.shortcut
                self.s.add(b.name, c.name, c.read, c.y, [c])
            gated_last = b.gate_after == len(b.convs) - 1
            for c in b.convs:
                adds = c is b.convs[-1] and b.adds and not gated_last
                self.s.add(b.name, c.name, c.read + (b.y if adds else 0), c.y, [c])
            if gated_last:  # nothing comes after it whose prologue could apply the gate
                self.s.add(b.name, "gate", b.y * (2 if b.adds else 1), b.y)

    def _whole(self, stem: Part, blocks: list[Part]) -> None:
        s = self.s
        out = stem.pool[1] if stem.pool else stem.y
        s.add(stem.name, "stem", stem.convs[0].read, out, stem.convs)
        for b in blocks:
            s.add(b.name, "block", b.x, b.y, b.all_convs)
        if not s.training:
            return
        s.add(
            stem.name, "stem backward", stem.convs[0].read + out, 0, stem.convs, times=2, weights=3
        )
        for b in blocks:
            s.save(b.x)
            s.add(b.name, "block backward", b.x + b.y, b.x, b.all_convs, times=3, weights=3)

    def _train(self, stem: Part, blocks: list[Part], last: int) -> None:
        s = self.s
        for conv in stem.convs:
            s.add(stem.name, conv.name, conv.read, conv.y, [conv])
            s.save(conv.y)
        if stem.pool:
            s.add(stem.name, "norm + pool", *stem.pool)
            s.save(stem.pool[1])
        for previous, b in zip([None, *blocks], blocks, strict=False):
            self._forward(b, joins=previous is not None)
        s.add("head", "head", 2 * last, 0, self.head.convs, times=3, weights=3)
        s.add(blocks[-1].name, "join backward", 2 * last, last)
        for previous, b in reversed([*zip([None, *blocks], blocks, strict=False)]):
            self._backward(b, previous)
        self._stem_backward(stem)

    def _forward(self, b: Part, joins: bool) -> None:
        s, first = self.s, b.convs[0]
        if joins:  # the block before ends in this prologue, which writes the sum
            s.add(b.name, first.name, 2 * first.x, first.x + first.y, [first])
            s.save(first.x)
        else:
            s.add(b.name, first.name, first.x, first.y, [first])
        s.save(first.y)
        if b.shortcut:
            s.add(b.name, b.shortcut.name, b.shortcut.read, b.shortcut.y, [b.shortcut])
            s.save(b.shortcut.y)
        for i, c in enumerate(b.convs):
            if i:
                s.add(b.name, c.name, c.read, c.y, [c])
                s.save(c.y)
            if b.gate_after == i:  # what it pools is normalised: statistics have to be there
                s.add(b.name, "gate: pool", c.y)

    def _backward(self, b: Part, previous: Part | None) -> None:
        s = self.s
        for i in range(len(b.convs) - 1, 0, -1):
            c = b.convs[i]
            if b.gate_after == i == len(b.convs) - 1:
                s.add(b.name, "gate: reduce", 2 * c.y)
            # the epilogue reads the input once more, for the mask and for the sums of its norm
            self._gradients(b, c, 2 * c.y, c.x, c.x)
            if b.gate_after == i - 1:
                s.add(b.name, "gate: reduce", 2 * c.x)
        residual = b.x
        if b.shortcut:
            c = b.shortcut
            self._gradients(b, c, 2 * c.y, c.read, c.read, masks=False)
            residual = c.read
        first = b.convs[0]
        extra = residual
        if previous is not None:  # outputs of its convolutions, for the sums of their norms
            extra += b.x * (2 if previous.shortcut else 1)
        self._gradients(b, first, 2 * first.y, first.x, first.x, shared=extra)

    def _gradients(
        self,
        b: Part,
        c: Conv,
        read: int,
        write: int,
        x: int,
        *,
        shared: int = 0,
        masks: bool = True,
    ) -> None:
        """Write dx and dweight: `read` on the output's side, `x` on the input's, both need."""
        s = self.s
        if s.way == "shared":
            s.add(b.name, f"{c.name} backward", read + x + shared, write, [c], times=2, weights=3)
            return
        s.add(b.name, f"{c.name} dx", read + (x if masks else 0) + shared, write, [c])
        s.add(b.name, f"{c.name} dweight", read + x, 0, [c], weights=2)

    def _stem_backward(self, stem: Part) -> None:
        s = self.s
        if stem.pool:
            wide, narrow = stem.pool
            s.add(stem.name, "pool backward", narrow + wide, wide)
        for c in reversed(stem.convs[1:]):
            self._gradients(stem, c, 2 * c.y, c.x, c.x)
        c = stem.convs[0]
        s.add(stem.name, f"{c.name} dweight", 2 * c.y + c.read, 0, [c], weights=2)


class _ConvNeXt(_Writer):
    """Networks of depthwise convolutions, layer norms and MLPs."""

    def run(self) -> None:
        for i, part in enumerate(self.parts):
            if part.kind == "convnext":
                self._block(part)
            else:
                self._plain(part, reads_image=i == 0)
        last = self.parts[-1].y
        times = 3 if self.s.training else 1
        self.s.add("head", "head", last, 0, self.head.convs, times=times, weights=1)
        if self.s.training:
            self.s.add("head", "head backward", 0, last)

    def _plain(self, part: Part, reads_image: bool) -> None:
        """Write the stem, or what downsamples: the norm beside it is in a prologue or epilogue."""
        s = self.s
        for c in part.convs:
            s.add(part.name, c.name, c.read, c.y, [c])
            if not s.training:
                continue
            if reads_image and c is part.convs[0]:
                s.save(c.y)
                s.add(part.name, f"{c.name} dweight", c.read + 2 * c.y, 0, [c], weights=2)
            else:
                s.save(c.x)
                self._gradients(part, c, c.y, c.x)

    def _gradients(self, part: Part, c: Conv, dy: int, x: int) -> None:
        s = self.s
        if s.way in ("block", "shared"):
            s.add(part.name, f"{c.name} backward", dy + x, x, [c], times=2, weights=3)
            return
        s.add(part.name, f"{c.name} dx", dy + x, x, [c])
        s.add(part.name, f"{c.name} dweight", x + dy, 0, [c], weights=2)

    def _block(self, part: Part) -> None:
        s = self.s
        depthwise, fc1, fc2 = part.convs
        x, hidden = part.x, fc1.y
        # a global response norm needs the norms of the whole hidden map before it can scale
        s.add(part.name, depthwise.name, x, x, [depthwise])
        if s.way == "block":
            self._mlp(part, fc1, fc2, x, hidden)
        else:
            s.add(part.name, fc1.name, x, hidden, [fc1])
            s.add(part.name, fc2.name, hidden + x, x, [fc2])
            if s.training:
                self._train_by_conv(part, depthwise, fc1, fc2)

    def _mlp(self, part: Part, fc1: Conv, fc2: Conv, x: int, hidden: int) -> None:
        s, mlp = self.s, [fc1, fc2]
        if part.grn:  # two kernels with the hidden map between them, whose norms come with it
            s.add(part.name, fc1.name, x, hidden, [fc1])
            s.add(part.name, fc2.name, hidden + x, x, [fc2])
            if s.training:
                self._train_by_conv(part, part.convs[0], fc1, fc2)
            return
        if not s.training:
            s.add(part.name, "mlp", 2 * x, x, mlp)
            return
        keeps = self._keeps(fc1, x, hidden)
        kept = hidden if keeps else 0
        s.add(part.name, "mlp", 2 * x, x + kept, mlp)
        s.add(part.name, "mlp backward", 2 * x + kept, x, mlp, times=2, weights=3)
        if not keeps:  # the hidden map once more
            last = s.kernels.pop()
            again = s.batch * fc1.tensor_flops
            s.kernels.append(last._replace(tensor_flops=last.tensor_flops + again))
        depthwise = part.convs[0]
        s.add(part.name, f"{depthwise.name} backward", 3 * x, x, [depthwise], times=2, weights=3)
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

    def _train_by_conv(self, part: Part, depthwise: Conv, fc1: Conv, fc2: Conv) -> None:
        s, x, hidden = self.s, part.x, fc1.y
        s.save(2 * x + hidden)
        s.add(part.name, f"{fc2.name} dx", x + hidden, hidden, [fc2])
        s.add(part.name, f"{fc2.name} dweight", x + hidden, 0, [fc2], weights=2)
        s.add(part.name, f"{fc1.name} dx", hidden, x, [fc1])
        s.add(part.name, f"{fc1.name} dweight", x + hidden, 0, [fc1], weights=2)
        s.add(part.name, f"{depthwise.name} dx", 3 * x, x, [depthwise])
        s.add(part.name, f"{depthwise.name} dweight", 3 * x, 0, [depthwise])
