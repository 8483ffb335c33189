"""The features of a network: where they leave it, what they look like, which ones are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Indices = int | Sequence[int] | None


def feature(channels: int, reduction: int, module: str) -> dict[str, Any]:
    """Describe one feature map as timm does: channels, stride, name of the module it leaves."""
    return {"num_chs": channels, "reduction": reduction, "module": module}


def take_indices(count: int, indices: Indices) -> list[int]:
    """Return which of `count` features are wanted, in the order the network has them.

    Args:
        count: how many features there are.
        indices: their numbers, negative ones from the end; a single number for that many last ones;
            None for all.

    >>> take_indices(5, (-1, 2)), take_indices(5, 2)
    ([2, 4], [3, 4])
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"the last {indices} features are wanted, and there are {count}")
        return list(range(count - indices, count))
    if not indices or any(not -count <= i < count for i in indices):
        raise ValueError(
            f"out_indices must be numbers from {-count} to {count - 1}; got {tuple(indices)}"
        )
    return sorted({i % count for i in indices})


class FeatureInfo:
    """What a feature extractor returns, under the names of timm's class.

    Attributes:
        info: one dict per feature of the network: "num_chs", "reduction", "module", "index".
        out_indices: which of them are returned, in order.
    """

    def __init__(self, info: Sequence[dict[str, Any]], out_indices: Indices) -> None:
        self.info = [{**entry, "index": i} for i, entry in enumerate(info)]
        self.out_indices = tuple(take_indices(len(info), out_indices))

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """Return a value of each returned feature, of one feature, or of each of several."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(
        self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None
    ) -> Any:
        """Return the dict of each returned feature, of one or of several; all keys or some."""
        if isinstance(idx, int):
            return {key: self.info[idx][key] for key in keys or self.info[idx]}
        places = self.out_indices if idx is None else idx
        return [self.get_dicts(keys, i) for i in places]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return channels."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return strides, relative to the image."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Return the names of the modules that features leave."""
        return self.get("module", idx)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        return self.info[idx]

    def __len__(self) -> int:
        return len(self.info)
