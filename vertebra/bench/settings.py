"""What to measure, and how: the options that the commands share, and what suits a machine."""

from __future__ import annotations

import math
import re
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
        for what, value, least in (
            ("batch", min(self.batches, default=1), 1),
            ("rounds", self.rounds, 1),
            ("image_size", self.image_size, 32),
            ("minutes", self.minutes, 0),
        ):
            if not value >= least:  # NaN is not, either
                raise ValueError(f"{what} must be at least {least}; got {value}")
        if not self.first_answer_s > 0:
            raise ValueError(f"patience must be more than 0 seconds; got {self.first_answer_s}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be cpu, cuda or cuda:1; got {self.device!r}")
        if self.on_gpu:
            self._check_gpu()

    def _check_gpu(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError(
                "device is cuda, but torch finds no GPU here; leave it out (`vertebra env` says "
                "what there is)"
            )
        number, there = int(self.device.partition(":")[2] or 0), torch.cuda.device_count()
        if number >= there:
            raise ValueError(f"device is {self.device}, but the last GPU here is cuda:{there - 1}")

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
