"""What is compared: the options of `vertebra bench compile`, and what suits a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from ..settings import Settings, given
from ..workload import CompileMode

Direction = Literal["forward", "training"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "training")
TITLES: dict[Direction, str] = {"forward": "inference", "training": "forward + backward"}

Aspect = Literal["graphs", "starts", "steady", "shapes"]
ASPECTS: tuple[Aspect, ...] = ("graphs", "starts", "steady", "shapes")

Policy = Literal["static", "automatic", "dynamic", "marked"]
POLICIES: dict[Policy, bool | None] = {
    "static": False,
    "automatic": None,
    "dynamic": True,
    "marked": None,
}
"""What `torch.compile` is told of shapes, as `dynamic=`: every one by itself; whatever has changed
once is dynamic; all are dynamic; and `mark_dynamic` on batch, height and width of the input."""

_FOR_GPUS: tuple[CompileMode, ...] = ("reduce-overhead", "max-autotune")


class Variant(NamedTuple):
    """Whose module, and whether it is compiled."""

    source: Literal["reference", "vertebra", "accelerated"]
    compiled: bool

    @property
    def is_peer(self) -> bool:
        """Whether it is not ours."""
        return self.source == "reference"


PROVIDERS: dict[str, Variant] = {
    "eager": Variant("reference", False),
    "compile": Variant("reference", True),
    "vertebra": Variant("vertebra", False),
    "vertebra-compile": Variant("vertebra", True),
    "accelerated": Variant("accelerated", False),
    "accelerated-compile": Variant("accelerated", True),
}
EAGER_TWIN = {name: name.removesuffix("-compile") for name, v in PROVIDERS.items() if v.compiled}
EAGER_TWIN["compile"] = "eager"


class Visit(NamedTuple):
    """A shape that comes by: images per call, pixels per side."""

    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.size}²"


@dataclass(frozen=True)
class Plan(Settings):
    """What to compare, and how.

    Attributes:
        quick: less of everything.
        directions: inference, and forward and backward.
        modes: of Inductor, each a comparison of its own.
        aspects: the questions asked.
        policies: of shapes.
        blocks: whether blocks of the networks are compared too.
        starts: fresh processes per provider.
        backend: of torch.compile; any but Inductor is for tests.
    """

    quick: bool = False
    directions: tuple[Direction, ...] = DIRECTIONS
    modes: tuple[CompileMode, ...] = ("default",)
    aspects: tuple[Aspect, ...] = ASPECTS
    policies: tuple[Policy, ...] = tuple(POLICIES)
    blocks: bool = True
    starts: int = 3
    backend: str = "inductor"

    @classmethod
    def of(
        cls,
        *,
        quick: bool = False,
        directions: Sequence[str] = (),
        modes: Sequence[str] = (),
        aspects: Sequence[str] = (),
        blocks: bool = True,
        starts: int | None = None,
        backend: str = "inductor",
        **options: Any,
    ) -> Plan:
        """Return the plan for the options given, and for the others what suits the machine.

        Args:
            quick: inference, one start, the shapes as torch.compile has them by default and fewer
                of them, and a block of each network; one network, unless some are named.
            directions: some of `DIRECTIONS`.
            modes: some of Inductor's.
            aspects: some of `ASPECTS`.
            blocks: whether there are any.
            starts: fresh processes per provider.
            backend: of torch.compile.
            options: those of `Settings.choose`.

        Raises:
            ValueError: there is no such thing to measure.
        """
        options["layouts"] = options.get("layouts") or ["nhwc"]
        quick = quick or bool(options.get("tiny"))
        if quick and options.get("image_size") is None:
            options["image_size"] = 64
        chosen = cls.choose(known=PROVIDERS, **options)
        assert isinstance(chosen, Plan)
        every = ["default", *(_FOR_GPUS if chosen.on_gpu else ["freezing"])]
        plan = replace(
            chosen,
            quick=quick,
            directions=tuple(directions) or (DIRECTIONS[:1] if quick else DIRECTIONS),  # pyright: ignore[reportArgumentType]
            modes=tuple(modes) or tuple(every[:1] if quick else every),  # pyright: ignore[reportArgumentType]
            aspects=tuple(aspects) or ASPECTS,
            policies=("automatic",) if quick else tuple(POLICIES),
            blocks=blocks,
            starts=given(starts, 1 if quick else 3),
            rounds=given(options.get("rounds"), 5),
            backend=backend,
        )
        plan._check_more(every)
        return plan

    def _check_more(self, modes: Sequence[str]) -> None:
        for what, values, there in (
            ("directions", self.directions, DIRECTIONS),
            ("aspects", self.aspects, ASPECTS),
            ("modes here", self.modes, modes),
        ):
            if unknown := [value for value in values if value not in there]:
                raise ValueError(f"{what} are {', '.join(there)}; got {', '.join(unknown)}")
        if len(self.batches) != 1 or len(self.layouts) != 1:
            raise ValueError(
                "compile takes one batch, from which the shapes follow, and one layout; "
                f"got {self.batches} and {self.layouts}"
            )
        if self.rounds < 3:
            raise ValueError(f"rounds must be at least 3, or there is no spread; got {self.rounds}")
        if self.starts < 1:
            raise ValueError(f"starts must be at least 1; got {self.starts}")

    @property
    def base(self) -> Visit:
        """The shape that is compared most closely."""
        return Visit(self.batches[0], self.image_size)

    @property
    def channels_last(self) -> bool:
        """Whether modules and inputs are in that format."""
        return self.layouts == ("nhwc",)

    @property
    def chosen(self) -> dict[str, Variant]:
        """The providers that take part."""
        return {n: v for n, v in PROVIDERS.items() if not self.providers or n in self.providers}

    def visits(self, direction: Direction) -> list[Visit]:
        """Return the shapes that come by, one after the other, the first one again at the end.

        A last batch that is not full, another batch, a single image (which a norm cannot train on),
        and larger images.
        """
        batch, size = self.base
        batches, sizes = [batch - 1], [size + 32]
        if not self.quick:
            batches += [batch // 2, *([1] if direction == "forward" else [])]
            sizes += [size + 64]
        least = 2 if direction == "training" else 1
        seen = [self.base, *(Visit(n, size) for n in batches if n >= least)]
        seen += [Visit(batch, pixels) for pixels in sizes]
        return [*dict.fromkeys(seen), self.base]
