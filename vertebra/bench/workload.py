"""A model on a batch, inference or training: providers to compare, and the oracle to judge them.

Models of several libraries give one network's weights several names. Answers have ours.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..interop import accelerate, fuse
from ..models import create_model
from ..models._layouts import LAYOUTS
from ..models._network import Network
from . import peers, photos
from .clock import Step, cache_copies
from .oracle import Answers, Oracle
from .runner import Provider, Unavailable
from .settings import Settings

Mode = Literal["forward", "training", "sgd"]
"""Inference; forward and backward in training mode; the same and an optimizer step."""

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "freezing"]


class Variant(NamedTuple):
    """Whose model, in which memory format, compiled how.

    `source` is a library of `peers.LIBRARIES`, "reference" for that of the reference model, or
    ours: "vertebra", or "accelerated", the reference model on our ops. `fused` is by `fuse`.
    """

    source: str
    channels_last: bool = True
    compile: CompileMode | None = None
    fused: bool = False

    @property
    def is_peer(self) -> bool:
        """Whether it is not ours."""
        return self.source not in ("vertebra", "accelerated") and not self.fused

    @property
    def infers_only(self) -> bool:
        """Whether its weights are constants, which nothing can train."""
        return self.fused or self.compile == "freezing"

    def suits(self, settings: Settings, mode: Mode) -> bool:
        """Return whether it is measured unless somebody says otherwise."""
        on_gpu_only = self.compile in ("reduce-overhead", "max-autotune")
        return (
            ("nhwc" if self.channels_last else "nchw") in settings.layouts
            and (settings.compiled or self.compile is None)
            and not (on_gpu_only and not settings.on_gpu)
            and not (self.compile == "freezing" and settings.on_gpu)
            and not (self.infers_only and mode != "forward")
        )


VARIANTS: dict[str, Variant] = {
    "eager-nchw": Variant("reference", channels_last=False),
    "eager-nhwc": Variant("reference"),
    **{library: Variant(library) for library in peers.LIBRARIES},
    "compile": Variant("reference", compile="default"),
    "reduce-overhead": Variant("reference", compile="reduce-overhead"),
    "max-autotune": Variant("reference", compile="max-autotune"),
    "freezing": Variant("reference", compile="freezing"),
    "accelerated": Variant("accelerated"),
    "fused": Variant("reference", fused=True),
    "vertebra-nchw": Variant("vertebra", channels_last=False),
    "vertebra-nhwc": Variant("vertebra"),
    "vertebra-fused": Variant("vertebra", fused=True),
    "vertebra-compile": Variant("vertebra", compile="default"),
    "vertebra-reduce-overhead": Variant("vertebra", compile="reduce-overhead"),
}

_SEEN = 8  # images that the random weights are fitted to: one has nothing that tells it apart
_LOSS_SCALE = 4096.0  # exact, so only fp16 sees it: there gradients would vanish without


class Cost(NamedTuple):
    """What a network is and does: parameters; per image, operations and outputs of its products."""

    parameters: int
    flops: int
    activations: int


@dataclass(frozen=True)
class Workload:
    """One model with its weights, and the images it is to work on.

    The batch holds every image of `images` equally often, in random order (`index`). So the truth,
    batch statistics and mean gradients included, is that of `images` alone, which a CPU can compute
    in fp64, and the answer is checked at the very size that is timed.
    """

    name: str
    library: str
    reference: nn.Module
    ours: Network
    images: Tensor
    index: Tensor
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def create(
        cls,
        name: str,
        batch: int,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> Workload:
        """Build the reference model, randomise it, and load its weights into ours."""
        distinct, index = shuffled(batch, seed)
        images = photos.batch(distinct, size)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            library, reference = peers.reference_model(name)
        peers.randomise(reference, photos.batch(_SEEN, size), seed)
        ours = create_model(name, weights=reference.state_dict())
        return cls(name, library, reference, ours, images, index, device, dtype)

    @property
    def labels(self) -> Tensor:
        """A class for each of `images`."""
        return torch.arange(len(self.images)) * 37 % 1000

    def oracle(self, mode: Mode) -> Oracle:
        """Return the judge: the reference model in fp64 on the CPU, and eager runs of it here.

        The truth is that of images, and in inference of weights, already rounded to the dtype. The
        eager runs are in both memory formats, and with weights moved by one rounding: whatever a
        right answer that rounds differently, or folds, may come to.
        """
        exact = copy.deepcopy(self.reference)
        if mode == "forward":
            exact.to(self.dtype)
        oracle = Oracle(self._exact(exact, mode), self.dtype)
        if moved := moved_by_folding(self.dtype, mode):
            jitter(exact, 0, moved)
            oracle.calibrate(self._exact(exact, mode))
        for seed in range(4):
            model = copy.deepcopy(self.reference)
            if seed >= 2:
                jitter(model, seed)
            layout = Variant("reference", channels_last=seed % 2 == 1)
            run = self._place(model, self.library, layout, mode)
            oracle.calibrate(run(0))
        return oracle

    def _exact(self, model: nn.Module, mode: Mode) -> Answers:
        """Return the answers of a model of the reference's library, in fp64 on the CPU."""
        images = self.images.to(self.dtype).double()
        step = self._step(model.double(), self.library, [images], self.labels, mode, torch.float64)
        found = step(0)
        return {**found, "logits": found["logits"][self.index]}

    def names(self, settings: Settings, mode: Mode) -> list[str]:
        """Return the providers asked for, else those that suit the machine, each model once."""
        if settings.providers:
            return list(settings.providers)
        variants = {name: v for name, v in VARIANTS.items() if v.suits(settings, mode)}
        if "eager-nhwc" in variants:
            variants.pop(self.library, None)
        return list(variants)

    def providers(self, names: Sequence[str], mode: Mode) -> Iterator[Provider]:
        """Yield the variants of those names."""
        for name in names:
            variant = VARIANTS[name]
            yield Provider(name, variant.is_peer, self._maker(variant, mode))

    def build(self, source: str) -> tuple[nn.Module, str]:
        """Build the model of `source`, with the weights; return it and whose names they have."""
        if source == "vertebra":
            return copy.deepcopy(self.ours), "vertebra"
        if source == "accelerated":
            return accelerate(copy.deepcopy(self.reference)), self.library
        if source in ("reference", self.library):
            return copy.deepcopy(self.reference), self.library
        return peers.build(source, self.name, self.ours), source

    def inputs(self, channels_last: bool) -> list[Tensor]:
        """Return the batch, and copies in other memory: together larger than the GPU's cache."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        batch = self.images[self.index].to(self.device, self.dtype).contiguous(memory_format=layout)
        copies = cache_copies(batch.nbytes, self.device)
        return [batch.clone(memory_format=torch.preserve_format) for _ in range(copies)]

    def cost(self, mode: Mode) -> Cost:
        """Count, without memory or arithmetic, what the reference model takes for an image."""
        model = copy.deepcopy(self.reference).to("meta").train(mode != "forward")
        activations = 0

        def count(_: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal activations
            activations += output.numel() // 2

        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        images = torch.empty(2, *self.images.shape[1:], device="meta")  # a norm needs two
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(mode != "forward"):
            y = model(images)
            if mode != "forward":
                y.sum().backward()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return Cost(parameters, counter.get_total_flops() // 2, activations)

    def _maker(self, variant: Variant, mode: Mode) -> Callable[[], Step]:
        def make() -> Step:
            if variant.compile == "max-autotune" and self.device.type != "cuda":
                raise Unavailable("max-autotune is for GPUs")
            if variant.infers_only and mode != "forward":
                raise Unavailable("what is fused or frozen is for inference")
            model, library = self.build(variant.source)
            return self._place(model, library, variant, mode)

        return make

    def _place(self, model: nn.Module, library: str, variant: Variant, mode: Mode) -> Step:
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        placed: Any = model.to(self.device)
        placed = placed.to(memory_format=layout)
        labels = self.labels[self.index].to(self.device)
        inputs = self.inputs(variant.channels_last)
        return self._step(placed, library, inputs, labels, mode, self.dtype, variant)

    def _step(
        self,
        model: nn.Module,
        library: str,
        inputs: list[Tensor],
        labels: Tensor,
        mode: Mode,
        dtype: torch.dtype,
        variant: Variant | None = None,
    ) -> Step:
        model.train(mode != "forward")
        if mode == "forward" or not is_half(dtype):
            model = model.to(dtype)
        if variant is not None and variant.fused:
            model = fuse(model)
        compile = None if variant is None else variant.compile
        run = model if compile is None else compiled(model, compile)
        if library == "transformers":
            run = _Logits(run)
        if mode == "forward":
            return _Inference(run, inputs)
        return _Training(model, run, self.named(model, library), inputs, labels, dtype, mode)

    def named(self, model: nn.Module, library: str) -> list[Named]:
        """Return the parameters under our names, in our shapes."""
        own = dict(self.ours.named_parameters())
        back = {theirs: key for key, theirs in self.keys_in(library).items()}
        named = [(back[theirs], parameter) for theirs, parameter in model.named_parameters()]
        return [Named(f"gradients:{key}", p, own[key].shape) for key, p in named]

    def keys_in(self, library: str) -> dict[str, str]:
        """Return what a library calls what is in our `state_dict`."""
        keys = self.ours.state_dict().keys()
        if library == "vertebra":
            return {key: key for key in keys}
        return LAYOUTS[self.ours.family][library].names(keys)


def shuffled(batch: int, seed: int) -> tuple[int, Tensor]:
    """Return how many images a batch is made of, and which one stands where: each equally often."""
    distinct = next((n for n in range(32, 7, -1) if batch % n == 0), batch)
    generator = torch.Generator().manual_seed(seed)
    return distinct, torch.randperm(batch, generator=generator) % distinct


class Named(NamedTuple):
    """A parameter of any library, with the name of its gradient and the shape that it has here."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size


def is_half(dtype: torch.dtype) -> bool:
    """Return whether training in this type is autocast's."""
    return dtype in (torch.float16, torch.bfloat16)


def compiled(
    model: nn.Module,
    mode: CompileMode = "default",
    dynamic: bool | None = False,
    backend: str = "inductor",
) -> Callable[[Tensor], Any]:
    """Return what `torch.compile` makes of a model; modes are Inductor's."""
    options: dict[str, Any] = {}
    if mode == "freezing":
        options = {"freezing": True}  # or Dynamo takes for it what it has compiled without
    elif mode != "default":
        inductor: Any = importlib.import_module("torch._inductor")
        options = dict(inductor.list_mode_options(mode))
    if mode == "max-autotune":
        # Triton 3.6 miscompiles Inductor's own convolution kernels at 8 warps (pytorch#173068)
        options["max_autotune_conv_backends"] = "ATEN"
    run: Any = torch.compile(model, backend=backend, dynamic=dynamic, options=options or None)
    return _Frozen(run) if mode == "freezing" else run


@dataclass(frozen=True)
class _Frozen:
    """What is compiled with weights for constants.

    Dynamo reads this setting while it traces. As one of the options of `torch.compile`, which are
    for what comes after, it has no effect alone.
    """

    run: Callable[[Tensor], Any]

    def __call__(self, x: Tensor) -> Any:
        inductor: Any = importlib.import_module("torch._inductor.config")
        with inductor.patch(freezing=True):
            return self.run(x)


@dataclass(frozen=True)
class _Logits:
    """A model of transformers called as others are."""

    run: Callable[[Tensor], Any]

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x).logits


@dataclass(frozen=True)
class _Inference:
    run: Callable[[Tensor], Tensor]
    inputs: list[Tensor]

    def __call__(self, i: int) -> Answers:
        torch.compiler.cudagraph_mark_step_begin()  # max-autotune: the last answer is done with
        with torch.no_grad():
            return {"logits": self.run(self.inputs[i % len(self.inputs)])}


@dataclass
class _Training:
    """Forward and backward; half precision is autocast's, with fp32 weights."""

    model: nn.Module
    run: Callable[[Tensor], Tensor]
    named: list[Named]
    inputs: list[Tensor]
    labels: Tensor
    dtype: torch.dtype
    mode: Mode
    optimizer: torch.optim.Optimizer | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.mode == "sgd":
            # a learning rate of 0 does all the work of a step, and leaves the weights to be checked
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)

    @property
    def given(self) -> list[Tensor]:
        """What is there before the forward pass."""
        return [*self.model.parameters(), *self.model.buffers(), *self.inputs]

    def forward(self, i: int) -> Tensor:
        """Return the logits, with their graph."""
        torch.compiler.cudagraph_mark_step_begin()  # max-autotune: the last answer is done with
        x = self.inputs[i % len(self.inputs)]
        half = self.dtype if is_half(self.dtype) else None
        with torch.autocast(x.device.type, half, enabled=half is not None):
            return self.run(x)

    def __call__(self, i: int) -> Answers:
        self.model.zero_grad(set_to_none=True)
        logits = self.forward(i)
        at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.to(at_least_fp32), self.labels)
        (loss * _LOSS_SCALE).backward()
        if self.optimizer is not None:
            self.optimizer.step()
        answers = {"logits": logits.detach()}
        for name, parameter, shape in self.named:
            if parameter.grad is not None:
                answers[name] = parameter.grad.reshape(shape)
        return answers


def moved_by_folding(dtype: torch.dtype, mode: Mode) -> float:
    """Return how much weights may be moved by, relative to them, where norms are folded in.

    Who folds a norm into a weight rounds that once more, which in half precision may count for more
    than all of eager's roundings: those are of pixels, and the pool takes their mean.
    """
    return torch.finfo(dtype).eps / 2 if mode == "forward" and is_half(dtype) else 0.0


@torch.no_grad()
def jitter(model: nn.Module, seed: int, most: float | None = None) -> None:
    """Move every weight by at most so much, relative to it, or else by a rounding of its type."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.rand(parameter.shape, generator=generator)
        limit = torch.finfo(parameter.dtype).eps if most is None else most
        parameter *= 1 + limit * (2 * noise - 1)
