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
from ..nn import BlurPool2d, EcaModule, GlobalResponseNorm, SqueezeExcite

BLOCKS = (BasicBlock, Bottleneck, ResBottleneckBlock, PreActBlock, ConvNeXtBlock)
_LAYERS = (nn.Conv2d, nn.Conv1d, nn.Linear)
_GATES = (SqueezeExcite, EcaModule)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.ZeroPad2d, BlurPool2d)
_MMA_K = 16  # narrower groups leave lanes of a tensor core's instruction empty


@dataclass(frozen=True)
class Conv:
    """A convolution or linear layer on a map of one image; sizes count elements.

    Attributes:
        name: of the module.
        x_shape: of the input, channels first.
        y_shape: of the output.
        kernel: height and width of the window.
        groups: of channels.
        pooled_from: the elements of the map that a pool right before it reads, which a kernel
            around the convolution then reads itself; 0 for no pool.
    """

    name: str
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    kernel: tuple[int, ...] = (1, 1)
    groups: int = 1
    pooled_from: int = 0

    @property
    def x(self) -> int:
        """Elements of the map that it is computed from."""
        return self.pooled_from or prod(self.x_shape)

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
        """Elements of that map that are used: a strided 1x1 passes over most pixels."""
        if self.pooled_from:
            return self.pooled_from
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
        gate: the layers of a squeeze and excitation.
        gate_after: the index of the convolution that it follows.
        pool: the elements that a stem's pool reads and writes.
        grn: whether there is a global response norm in a ConvNeXt block's MLP.
    """

    name: str
    kind: str = "plain"
    convs: list[Conv] = field(default_factory=list[Conv])
    shortcut: Conv | None = None
    adds: bool = False
    gate: list[Conv] = field(default_factory=list[Conv])
    gate_after: int | None = None
    pool: tuple[int, int] | None = None
    grn: bool = False

    @property
    def all_convs(self) -> list[Conv]:
        """All convolutions of the part, those of the gate included."""
        return self.convs + self.gate + ([self.shortcut] if self.shortcut else [])

    @property
    def x(self) -> int:
        """Elements that enter."""
        return self.convs[0].x if self.convs else 0

    @property
    def y(self) -> int:
        """Elements that leave."""
        return self.convs[-1].y if self.convs else 0

    @property
    def gated(self) -> Conv | None:
        """The convolution whose output the squeeze and excitation scales."""
        return None if self.gate_after is None else self.convs[self.gate_after]


@dataclass(frozen=True)
class Anatomy:
    """A network's parts for one image of `image_size`, in order: the stem first, the head last."""

    name: str
    family: str
    image_size: int
    parts: list[Part]
    params: int
    macs: int

    @cached_property
    def owners(self) -> dict[str, str]:
        """The part of each module, by name, whose layers all belong to one."""
        parts: dict[str, set[str]] = {}
        for part in self.parts:
            for conv in part.all_convs:
                words = conv.name.split(".")
                for i in range(len(words)):
                    parts.setdefault(".".join(words[: i + 1]), set()).add(part.name)
        return {module: next(iter(of)) for module, of in parts.items() if len(of) == 1}


def on_meta(model: nn.Module | str) -> Any:
    """Return the model, by name or by itself, without any numbers."""
    if isinstance(model, str):
        with torch.device("meta"):
            return create_model(model)
    there: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    there |= {id(b): b.detach().to("meta") for b in model.buffers()}
    return copy.deepcopy(model, there)


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
    if knife.parts[-1].kind != "head":  # it has no classifier, and pools
        knife.parts.append(Part("head", "head"))
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
        self._pooled: dict[int, tuple[Tensor, int]] = {}
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
        if isinstance(module, _POOLS):
            self._pool(part, args[0], y)
        elif isinstance(module, _LAYERS):
            self._layer(part, module, _conv(name, module, args[0], y, self._before_pool(args[0])))
        elif isinstance(module, _GATES):
            part.gate_after = len(part.convs) - 1
        elif isinstance(module, GlobalResponseNorm):
            part.grn = True

    def _layer(self, part: Part, module: nn.Module, conv: Conv) -> None:
        block = self._blocks.get(part.name)
        if _is_within(conv.name, self._gates):
            part.gate.append(conv)
        elif block is not None and module in _shortcut_of(block):
            part.shortcut = conv
        else:
            part.convs.append(conv)

    def _pool(self, part: Part, x: Tensor, y: Tensor) -> None:
        if part.name == "stem":
            before = part.pool[0] if part.pool else x.numel()
            part.pool = before, y.numel()
        else:
            self._pooled[id(y)] = y, self._before_pool(x) or x.numel()

    def _before_pool(self, x: Tensor) -> int:
        _, elements = self._pooled.get(id(x), (x, 0))
        return elements

    def _part(self, name: str, module: nn.Module) -> Part | None:
        """Return the part that a module belongs to, which may begin with it."""
        block = next((b for b in self._blocks if _is_within(name, [b])), None)
        if block is not None:
            return self._named(block, *_kind(self._blocks[block]))
        found = next((d for d in self._downsamples if _is_within(name, [d])), None)
        if found is not None:
            return self._named(found, "plain", False)
        if not isinstance(module, (*_LAYERS, *_POOLS)):
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


def _conv(name: str, module: Any, x: Tensor, y: Tensor, pooled_from: int) -> Conv:
    if isinstance(module, nn.Linear):
        _, *size, channels = x.shape
        H, W = size or (1, 1)
        return Conv(name, (channels, H, W), (module.out_features, H, W))
    kernel, shapes = module.kernel_size, (tuple(x.shape[1:]), tuple(y.shape[1:]))
    return Conv(name, *shapes, kernel, module.groups, pooled_from)
