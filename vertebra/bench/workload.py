"""A model on a batch, inference or training: providers to compare, and the oracle to judge them."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import create_model
from . import peers, photos
from .oracle import Answers, Oracle
from .runner import Provider, Step, Unavailable

Mode = Literal["forward", "training", "sgd"]
"""Inference; forward and backward in training mode; the same and an optimizer step."""


class Variant(NamedTuple):
    """Whose model, in which memory format, compiled how."""

    source: str
    channels_last: bool
    compile: str | None = None


_LOSS_SCALE = 4096.0  # exact, so only fp16 sees it: there gradients would vanish without

VARIANTS = {
    "eager-nchw": Variant("torchvision", False),
    "eager-nhwc": Variant("torchvision", True),
    "timm": Variant("timm", True),
    "vertebra-nchw": Variant("vertebra", False),
    "vertebra-nhwc": Variant("vertebra", True),
    "compile": Variant("torchvision", True, "default"),
    "vertebra-compile": Variant("vertebra", True, "default"),
    "max-autotune": Variant("torchvision", True, "max-autotune"),
}


@dataclass(frozen=True)
class Workload:
    """One model with its weights, and the images it is to work on.

    The batch holds every image of `images` equally often, in random order (`index`). So the truth,
    batch statistics and mean gradients included, is that of `images` alone, which a CPU can compute
    in fp64, and the answer is checked at the very size that is timed.
    """

    name: str
    reference: nn.Module
    weights: Path
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
        folder: Path,
        seed: int = 0,
    ) -> Workload:
        """Build the reference model, randomise it and leave its weights in `folder`."""
        distinct = next((n for n in range(32, 7, -1) if batch % n == 0), batch)
        images = photos.batch(distinct, size)
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(batch, generator=generator) % distinct
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            reference = peers.reference_model(name)
        peers.randomise(reference, images, seed)
        weights = folder / f"{name}.safetensors"
        save_file(reference.state_dict(), weights)
        return cls(name, reference, weights, images, index, device, dtype)

    @property
    def labels(self) -> Tensor:
        """A class for each of `images`."""
        return torch.arange(len(self.images)) * 37 % 1000

    def oracle(self, mode: Mode) -> Oracle:
        """Return the judge: the reference model in fp64 on the CPU, and eager runs of it here.

        The truth is that of images, and in inference of weights, already rounded to the dtype. The
        eager runs are in both memory formats, and with weights moved by one rounding: whatever a
        right answer that rounds differently may come to.
        """
        exact = copy.deepcopy(self.reference)
        if mode == "forward":
            exact.to(self.dtype)
        images = self.images.to(self.dtype).double()
        truth = _step(exact.double(), [images], self.labels, mode, torch.float64)(0)
        oracle = Oracle({**truth, "logits": truth["logits"][self.index]}, self.dtype)
        for seed in range(4):
            model = copy.deepcopy(self.reference)
            if seed >= 2:
                _jitter(model, seed)
            oracle.calibrate(self._place(model, channels_last=seed % 2 == 1, mode=mode)(0))
        return oracle

    def providers(self, names: list[str], mode: Mode) -> Iterator[Provider]:
        """Yield the variants of those names."""
        for name in names:
            variant = VARIANTS[name]
            yield Provider(name, variant.source != "vertebra", self._maker(variant, mode))

    def build(self, source: str) -> nn.Module:
        """Build the model of `source`, with the workload's weights."""
        if source == "vertebra":
            return create_model(self.name, weights=self.weights)
        build = peers.timm_model if source == "timm" else peers.torchvision_model
        return peers.load(build(self.name), self.reference.state_dict())

    def inputs(self, channels_last: bool) -> list[Tensor]:
        """Return the batch, and copies in other memory: together larger than the GPU's cache."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        batch = self.images[self.index].to(self.device, self.dtype).contiguous(memory_format=layout)
        copies = cache_copies(batch.nbytes, self.device)
        return [batch.clone(memory_format=torch.preserve_format) for _ in range(copies)]

    def _maker(self, variant: Variant, mode: Mode) -> Callable[[], Step]:
        def make() -> Step:
            if variant.compile == "max-autotune" and self.device.type != "cuda":
                raise Unavailable("max-autotune is for GPUs")
            model = self.build(variant.source)
            return self._place(model, variant.channels_last, mode, variant.compile)

        return make

    def _place(
        self, model: nn.Module, channels_last: bool, mode: Mode, compile: str | None = None
    ) -> Step:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        placed: Any = model.to(self.device)
        placed = placed.to(memory_format=layout)
        labels = self.labels[self.index].to(self.device)
        return _step(placed, self.inputs(channels_last), labels, mode, self.dtype, compile)


def cache_copies(size: int, device: torch.device) -> int:
    """Return how many inputs of `size` bytes to rotate through, so that none is still in cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 + max(1, min(31, -(-2 * cache // max(size, 1))))


def _step(
    model: nn.Module,
    inputs: list[Tensor],
    labels: Tensor,
    mode: Mode,
    dtype: torch.dtype,
    compile: str | None = None,
) -> Step:
    model.train(mode != "forward")
    if mode == "forward" or not _is_half(dtype):
        model = model.to(dtype)
    run = model if compile is None else _compiled(model, compile)
    if mode == "forward":
        return _Inference(run, inputs)
    # a learning rate of 0 does all the work of a step, and leaves the weights to be checked again
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9) if mode == "sgd" else None
    return _Training(model, run, inputs, labels, dtype, optimizer)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _compiled(model: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    options: dict[str, Any] = {}
    if mode == "max-autotune":
        # Triton 3.6 miscompiles Inductor's own convolution kernels at 8 warps (pytorch#173068)
        inductor: Any = importlib.import_module("torch._inductor")
        options = {**inductor.list_mode_options(mode), "max_autotune_conv_backends": "ATEN"}
    return torch.compile(model, dynamic=False, options=options)


@dataclass(frozen=True)
class _Inference:
    run: Callable[[Tensor], Tensor]
    inputs: list[Tensor]

    def __call__(self, i: int) -> Answers:
        torch.compiler.cudagraph_mark_step_begin()  # max-autotune: the last answer is done with
        with torch.no_grad():
            return {"logits": self.run(self.inputs[i % len(self.inputs)])}


@dataclass(frozen=True)
class _Training:
    """Forward and backward; half precision is autocast's, with fp32 weights."""

    model: nn.Module
    run: Callable[[Tensor], Tensor]
    inputs: list[Tensor]
    labels: Tensor
    dtype: torch.dtype
    optimizer: torch.optim.Optimizer | None

    def forward(self, i: int) -> Tensor:
        """Return the logits, with their graph."""
        x = self.inputs[i % len(self.inputs)]
        half = self.dtype if _is_half(self.dtype) else None
        with torch.autocast(x.device.type, half, enabled=half is not None):
            return self.run(x)

    def __call__(self, i: int) -> Answers:
        torch.compiler.cudagraph_mark_step_begin()  # max-autotune: the last answer is done with
        self.model.zero_grad(set_to_none=True)
        logits = self.forward(i)
        at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.to(at_least_fp32), self.labels)
        (loss * _LOSS_SCALE).backward()
        if self.optimizer is not None:
            self.optimizer.step()
        answers = {"logits": logits.detach()}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                answers[f"gradients:{name}"] = parameter.grad
        return answers


@torch.no_grad()
def _jitter(model: nn.Module, seed: int) -> None:
    """Move every weight by at most one rounding."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.rand(parameter.shape, generator=generator)
        parameter *= 1 + torch.finfo(parameter.dtype).eps * (2 * noise - 1)
