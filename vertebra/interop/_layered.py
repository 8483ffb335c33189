"""Blocks of layers in a row, as RegNets have them in every library, and ResNets in transformers."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..nn import Unit, conv_norm_act, excited
from ..nn._act import has_hooks
from ..nn.back_to_back import BackToBack, End, InParts, end_of
from ..nn.fused_blocks import FusedBlocks
from ..nn.norm_act import pooled


class Layered(InParts):
    """`act(drop(layers(x)) + shortcut(x))`, the last layer's convolution running what follows it.

    The layers are 1x1, 3x3, perhaps an excitation, and 1x1, or two 3x3. Each is a module with a
    `unit()`, the excitation one with an `excitation()`. A recipe says what they are.
    """

    def layers(self) -> list[nn.Module]:
        """Return the layers in order; none if somebody watches all of them."""
        raise NotImplementedError

    def last_unit(self) -> Unit | None:
        """Return what the block ends in, None if somebody watches what is between it and the add.

        That is the convolution and norm of the last layer, and the block's activation and drop.
        """
        raise NotImplementedError

    def run_apart(self, x: Tensor) -> Tensor:
        """Run the block where `last_unit` is None: as its library does."""
        own: Any = self
        return own._own.forward(self, x)

    def narrow_end(self) -> End | None:
        layers = self.layers()
        unit = unit_of(layers[0]) if len(layers) == 3 else None
        return None if unit is None else end_of(*unit)

    def widen_end(self) -> End | None:
        unit = self.last_unit()
        return None if unit is None or len(self.layers()) != 3 else end_of(*unit)

    def work_end(self) -> End | None:
        layers = self.layers()
        unit = unit_of(layers[1]) if len(layers) == 3 else None
        return None if unit is None else end_of(*unit, side=3)

    def narrow(self, x: Tensor) -> Tensor:
        return self.layers()[0](x)

    def work(self, y: Tensor) -> Tensor:
        return self.layers()[1](y)

    def widen(self, y: Tensor, shortcut: Tensor | None, pool: nn.Module | None = None) -> Tensor:
        return _ended(cast("Unit", self.last_unit()), y, shortcut, pool)

    def forward(self, x: Tensor, pool: nn.Module | None = None) -> Tensor:
        end = self.last_unit()
        if end is None:
            return pooled(self.run_apart(x), pool)
        first, *others, last = self.layers()
        y, shortcut = first(x), self.shortcut_of(x)
        if len(others) == 2:
            conv3x3, se = others
            ended = excited(conv3x3, se, last, y, shortcut, end.act, end.drop, pool)
            if ended is not None:
                return ended
        for layer in others:
            y = layer(y)
        return _ended(end, y, shortcut, pool)


def _ended(end: Unit, y: Tensor, shortcut: Tensor | None, pool: nn.Module | None) -> Tensor:
    conv, norm, act, drop = end
    return conv_norm_act(conv, norm, y, act, shortcut, pool, drop)


def unit_of(layer: Any) -> Unit | None:
    """Return what `layer` is made of, None if that is not known or somebody watches it."""
    return None if has_hooks(layer) or not hasattr(layer, "unit") else layer.unit()


def in_row(sequence: nn.Module) -> list[nn.Module]:
    """Return what a sequence runs one after the other; nothing if somebody watches it."""
    runs = (nn.Sequential.forward, FusedBlocks.forward, BackToBack.forward)
    in_row = type(sequence).forward in runs and not has_hooks(sequence)
    return [*cast("nn.Sequential", sequence)] if in_row else []
