"""Networks taken apart into their children, as extractors of features do: their stems joined."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..nn import FusedConv2d, conv_norm_act, norm_act
from ..nn._act import fusible_act
from ..nn.fused import Folded
from ..nn.norm_act import is_bare


def in_steps(
    children: Iterable[tuple[str, nn.Module]], wanted: Collection[str]
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Yield what to run, one after the other, each with the name of the last child that it runs.

    A convolution, its batch norm, the activation and the pool behind that are one, unless what is
    between is wanted.
    """
    rest = list(children)
    while rest:
        (name, module), *rest = rest
        run: Any = module
        norm = partial(norm_act, module)
        is_conv = isinstance(module, FusedConv2d)
        if name not in wanted and rest and is_conv and type(rest[0][1]) is Folded:
            (name, folded), *rest = rest
            run = norm = partial(conv_norm_act, module, folded)
        elif not is_bare(module):
            yield name, run
            continue
        if name not in wanted and rest and fusible_act(rest[0][1]):
            (name, act), *rest = rest
            pool = None
            if name not in wanted and rest and type(rest[0][1]) is nn.MaxPool2d:
                (name, pool), *rest = rest
            run = partial(norm, act=act, pool=pool)
        yield name, run


def collect(
    children: Iterable[tuple[str, nn.Module]], wanted: Mapping[str, str], x: Tensor
) -> OrderedDict[str, Any]:
    """Run the children one after the other; return the outputs of those wanted, renamed."""
    found: OrderedDict[str, Any] = OrderedDict()
    for name, run in in_steps(children, wanted):
        x = run(x)
        if name in wanted:
            found[wanted[name]] = x
    return found
