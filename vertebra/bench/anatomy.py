"""A network's anatomy: its convolutions with their maps, and how blocks, stem and head hold them.

Found by running the model on the meta device, where nothing is computed and nothing allocated:
shapes are those that really occur, at any image size, for any options.
"""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import create_model
from ..models._network import Network
from ..models.convnext import ConvNeXtBlock, ConvNeXtStage
from ..models.regnet import PreActBlock, ResBottleneckBlock
from ..models.resnet import BasicBlock, Bottleneck
from ..nn import EcaModule, GlobalResponseNorm, SqueezeExcite

BLOCKS = (BasicBlock, Bottleneck, ResBottleneckBlock, PreActBlock, ConvNeXtBlock)
_GATES = (SqueezeExcite, EcaModule)
_MMA_K = 16  # narrower groups leave lanes of a tensor core's instruction empty


@dataclass(frozen=True)
class Conv:
    """A convolution or linear layer on a map of one image; sizes count elements."""

    name: str
    x_shape: tuple[int, int, int]
    y_shape: tuple[int, int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def x(self) -> int:
        """Elements of the input."""
        return prod(self.x_shape)

    @property
    def y(self) -> int:
        """Elements of the output."""
        return prod(self.y_shape)

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.y_shape[0] * prod(self.kernel) * (self.x_shape[0] // self.groups)

    @property
    def read(self) -> int:
        """Elements of the input that are used: a strided 1x1 passes over most pixels."""
        channels, *size = self.x_shape
        used = [
            min(n, out * k) for n, out, k in zip(size, self.y_shape[1:], self.kernel, strict=True)
        ]
        return channels * prod(used)

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.weight * prod(self.y_shape[1:])

    @property
    def depthwise(self) -> bool:
        """Whether every channel is by itself, which no tensor core helps with."""
        return self.groups > 1 and self.groups == self.x_shape[0]

    @property
    def tensor_flops(self) -> float:
        """Operations of tensor cores, those on the empty lanes of a narrow group included."""
        if self.depthwise:
            return 0.0
        width = self.x_shape[0] / self.groups
        return 2.0 * self.macs * (max(1.0, _MMA_K / width) if self.groups > 1 else 1.0)

    @property
    def fma_flops(self) -> float:
        """Operations outside of tensor cores."""
        return 2.0 * self.macs if self.depthwise else 0.0


@dataclass
class Part:
    """What lies between two maps that have to be: the stem, a block, what downsamples, the head.

    Attributes:
        name: a module's, or "stem", "neck" and "head".
        kind: "plain", "residual", "convnext", or "head".
        convs: of the main path, in order.
        shortcut: the projection, if there is one.
        adds: whether something is added.
        gate_after: the index of the convolution that a squeeze and excitation follows.
        pool: the shapes of the input and output of a stem's pool.
        grn: whether there is a global response norm in a ConvNeXt block's MLP.
    """

    name: str
    kind: str = "plain"
    convs: list[Conv] = field(default_factory=list[Conv])
    shortcut: Conv | None = None
    adds: bool = False
    gate_after: int | None = None
    pool: tuple[int, int] | None = None
    grn: bool = False

    @property
    def all_convs(self) -> list[Conv]:
        """All convolutions of the part."""
        return self.convs + ([self.shortcut] if self.shortcut else [])

    @property
    def x(self) -> int:
        """Elements that enter."""
        return self.convs[0].x

    @property
    def y(self) -> int:
        """Elements that leave."""
        return self.convs[-1].y


@dataclass(frozen=True)
class Anatomy:
    """A network's parts, in order, for one image of `image_size`."""

    name: str
    family: str
    image_size: int
    parts: list[Part]
    params: int
    macs: int

    @cached_property
    def by_module(self) -> dict[str, str]:
        """The part that each convolution, by the name of its module, belongs to."""
        return {conv.name: part.name for part in self.parts for conv in part.all_convs}


def on_meta(model: nn.Module | str) -> Any:
    """Return the model, by name or by itself, without any numbers."""
    if isinstance(model, str):
        with torch.device("meta"):
            return create_model(model)
    return copy.deepcopy(model).to("meta")


def macs(model: nn.Module | str, image_size: int = 224) -> int:
    """Return the multiply-adds of one image, those of squeeze and excitation and head included."""
    network = on_meta(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(_image(network, image_size))
    return counter.get_total_flops() // 2


def dissect(model: nn.Module | str, image_size: int = 224) -> Anatomy:
    """Return the anatomy of a ResNet, RegNet or ConvNeXt of this library.

    Raises:
        ValueError: it is none of these.
    """
    network = on_meta(model).eval()
    if not isinstance(network, Network):
        raise ValueError(
            f"the anatomy is that of a vertebra model; got {type(network).__name__}: "
            "build its twin with vertebra.create_model"
        )
    knife = _Knife(network)
    with torch.no_grad(), knife.hooked(), FlopCounterMode(display=False) as counter:
        network(_image(network, image_size))
    name = model if isinstance(model, str) else type(model).__name__
    params = sum(p.numel() for p in network.parameters())
    work = counter.get_total_flops() // 2
    return Anatomy(name, network.family, image_size, knife.parts, params, work)


def _image(network: Any, size: int) -> Tensor:
    return torch.empty(1, network.in_chans, size, size, device="meta")


class _Knife:
    """Cuts a network into parts while it runs."""

    def __init__(self, network: Network) -> None:
        self._names = {module: name for name, module in network.named_modules()}
        self._blocks = {name: m for m, name in self._names.items() if isinstance(m, BLOCKS)}
        self._downsamples = {
            self._names[stage.downsample]
            for stage in network.modules()
            if isinstance(stage, ConvNeXtStage) and isinstance(stage.downsample, nn.Sequential)
        }
        self._gates = [name for m, name in self._names.items() if isinstance(m, _GATES)]
        self.parts: list[Part] = []

    @contextmanager
    def hooked(self) -> Generator[None]:
        """Watch every module."""
        hooks = [m.register_forward_hook(self._see) for m in self._names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        name = self._names[module]
        part = self._part(name, module)
        if part is None:
            return
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not _is_within(name, self._gates):
            conv = _conv(name, module, args[0], y)
            block = self._blocks.get(part.name)
            if block is not None and module in _shortcut_of(block):
                part.shortcut = conv
            else:
                part.convs.append(conv)
        elif name in self._gates:
            part.gate_after = len(part.convs) - 1
        elif isinstance(module, nn.MaxPool2d):
            part.pool = prod(args[0].shape[1:]), prod(y.shape[1:])
        elif isinstance(module, GlobalResponseNorm):
            part.grn = True

    def _part(self, name: str, module: nn.Module) -> Part | None:
        """Return the part that a module belongs to, which may begin with it."""
        block = next((b for b in self._blocks if _is_within(name, [b])), None)
        if block is not None:
            return self._named(block, *_kind(self._blocks[block]))
        found = next((d for d in self._downsamples if _is_within(name, [d])), None)
        if found is not None:
            return self._named(found, "plain", False)
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.MaxPool2d)):
            return None
        if isinstance(module, nn.Linear):
            return self._named("head", "head", False)
        return self._named("neck" if len(self.parts) > 1 else "stem", "plain", False)

    def _named(self, name: str, kind: str, adds: bool) -> Part:
        for part in self.parts:
            if part.name == name:
                return part
        self.parts.append(Part(name, kind, adds=adds))
        return self.parts[-1]


def _is_within(name: str, of: list[str]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in of)


def _kind(block: Any) -> tuple[str, bool]:
    if isinstance(block, ConvNeXtBlock):
        return "convnext", True
    if isinstance(block, ResBottleneckBlock):
        return "residual", block.adds
    return "residual", not isinstance(block, PreActBlock) or block.adds


def _shortcut_of(block: Any) -> set[nn.Module]:
    shortcut = getattr(block, "downsample", None) or getattr(block, "proj", None)
    return set(shortcut.modules()) if shortcut is not None else set()


def _conv(name: str, module: Any, x: Tensor, y: Tensor) -> Conv:
    if isinstance(module, nn.Linear):
        _, *size, channels = x.shape
        H, W = size or (1, 1)
        return Conv(name, (channels, H, W), (module.out_features, H, W))
    shape: Any = tuple(x.shape[1:])
    out: Any = tuple(y.shape[1:])
    return Conv(name, shape, out, module.kernel_size, module.stride, module.groups)
