"""What the heads of transformers return: the same fields, read by attribute, key or position."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class ModelOutput(Mapping[str, Any]):
    """A dataclass that is also a mapping, and a tuple to `[]`; both leave out fields of None."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values of the fields that are not None."""
        return tuple(self.values())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if all(key != name for name in self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            if getattr(self, field.name) is not None:
                yield field.name

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(eq=False)
class PooledOutput(ModelOutput):
    """Fields of transformers' `BaseModelOutputWithPoolingAndNoAttention`.

    Attributes:
        last_hidden_state: the last feature map.
        pooler_output: what the head makes of it before it classifies.
        hidden_states: what leaves the stem and each stage.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class ClassifierOutput(ModelOutput):
    """Fields of transformers' `ImageClassifierOutputWithNoAttention`.

    Attributes:
        loss: of the logits, where labels were given.
        logits: (N, num_classes).
        hidden_states: what leaves the stem and each stage.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class BackboneOutput(ModelOutput):
    """Fields of transformers' `BackboneOutput`.

    Attributes:
        feature_maps: those of `out_features`, in the network's order.
        hidden_states: what leaves the stem and each stage.
        attentions: always None.
    """

    feature_maps: tuple[Tensor, ...]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


for _output in (PooledOutput, ClassifierOutput, BackboneOutput):  # torch.export takes them apart
    torch.export.register_dataclass(
        _output, serialized_type_name=f"vertebra.models.{_output.__name__}"
    )
