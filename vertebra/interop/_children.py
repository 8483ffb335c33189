"""Networks taken apart into their children, as extractors of features do: their stems joined."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..nn import BatchNormAct2d, norm_act
from ..nn._act import fusible_act
from ..nn.norm_act import FrozenBatchNorm2d


def _is_plain_norm(module: nn.Module) -> bool:
    """Return whether a module is a batch norm that ends in no activation."""
    if isinstance(module, nn.BatchNorm2d):
        return not isinstance(module, BatchNormAct2d)
    return type(module).forward is FrozenBatchNorm2d.forward


def in_steps(
    children: Iterable[tuple[str, nn.Module]], wanted: Collection[str]
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield what to run, one after the other, each with the name of the last child that it runs.

    A batch norm, its activation and the pool behind that are one, unless what is between is wanted.
    """
    rest = list(children)
    while rest:
        (name, module), *rest = rest
        run: Any = module
        if _is_plain_norm(module) and name not in wanted and rest and fusible_act(rest[0][1]):
            (name, act), *rest = rest
            pool = None
            if name not in wanted and rest and type(rest[0][1]) is nn.MaxPool2d:
                (name, pool), *rest = rest
            run = partial(norm_act, module, act=act, pool=pool)
        yield name, run
