"""What to measure, and how: the options that the commands share, and what suits a machine."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from .ceilings import DTYPES

Layout = Literal["nchw", "nhwc"]
LAYOUTS: tuple[Layout, ...] = ("nchw", "nhwc")

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How to measure; `choose` fills in what suits the machine.

    Attributes:
        device: "cuda", "cuda:1" or "cpu".
        dtype: "fp32", "bf16" or "fp16".
        batches: images per call, one after the other; none for what the cases of an op say.
        image_size: pixels per side, of models.
        rounds: samples per provider.
        providers: names, in the order of the tables; empty for those that suit the machine.
        layouts: memory formats.
        match: only cases and models whose name has this.
        minutes: after which nothing new is begun.
        first_answer_s: seconds a provider has for its first answer, compilation included.
        tiny: sizes that a CPU does in no time, to see that everything works.
        compiled: whether what `torch.compile` makes is among the providers that suit.
        seed: of the random weights.
    """

    device: str
    dtype: str
    batches: tuple[int, ...]
    image_size: int
    rounds: int
    providers: tuple[str, ...] = ()
    layouts: tuple[str, ...] = LAYOUTS
    match: str = ""
    minutes: float = math.inf
    first_answer_s: float = 300.0
    tiny: bool = False
    compiled: bool = True
    seed: int = 0

    @classmethod
    def choose(
        cls,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batches: Sequence[int] = (),
        sweep: str | None = None,
        own_batches: bool = False,
        image_size: int | None = None,
        rounds: int | None = None,
        providers: Sequence[str] = (),
        layouts: Sequence[str] = (),
        match: str = "",
        minutes: float | None = None,
        first_answer_s: float | None = None,
        tiny: bool = False,
        seed: int = 0,
        known: Collection[str] = (),
    ) -> Settings:
        """Return the settings given, and for the others what suits the machine.

        With `sweep` "batch", that is powers up to the one batch given. With `own_batches`, on a GPU
        the cases say what their batch is, unless some are given. `known` are the providers there
        are.

        Raises:
            ValueError: there is no such thing to measure.
        """
        device = given(device, "cuda" if torch.cuda.is_available() else "cpu")
        gpu = device.startswith("cuda")
        if not batches and not (own_batches and gpu and not tiny and sweep is None):
            batches = [256 if gpu and not tiny else 4]
        if sweep is not None:
            if sweep != "batch" or len(batches) != 1:
                raise ValueError(f"sweep must be 'batch', up to one batch; got {sweep!r}")
            batches = _powers(batches[0], 4 if gpu else 2)
        chosen = cls(
            device=device,
            dtype=given(dtype, "bf16" if gpu else "fp32"),
            batches=tuple(batches),
            image_size=given(image_size, 64 if tiny else 224),
            rounds=given(rounds, 2 if tiny else 10 if gpu else 5),
            providers=tuple(providers),
            layouts=tuple(layouts) or LAYOUTS,
            match=match,
            minutes=given(minutes, math.inf),
            first_answer_s=given(first_answer_s, 300.0),
            tiny=tiny,
            compiled=not tiny,
            seed=seed,
        )
        chosen._check(known)
        return chosen

    def _check(self, known: Collection[str]) -> None:
        """Raise ValueError where there is no such thing to measure."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        for what, names, there in (
            ("providers", self.providers, known),
            ("layouts", self.layouts, LAYOUTS),
        ):
            if unknown := [name for name in names if name not in there]:
                raise ValueError(f"{what} are {', '.join(there)}; got {', '.join(unknown)}")
        if min(*self.batches, self.rounds, 1) < 1 or self.image_size < 32:
            raise ValueError("batch and rounds must be at least 1, image_size at least 32")
        if self.device.partition(":")[0] not in ("cuda", "cpu"):
            raise ValueError(f"device must be cuda or cpu; got {self.device!r}")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no GPU here; leave it out")

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU that is measured."""
        return self.device != "cpu"


def given(value: T | None, otherwise: T) -> T:
    """Return `value`, or what stands for None."""
    return otherwise if value is None else value


def _powers(up_to: int, base: int) -> list[int]:
    """Return 1, base, base**2, ... below `up_to`, and `up_to`."""
    return [base**i for i in range(32) if base**i < up_to] + [up_to]
