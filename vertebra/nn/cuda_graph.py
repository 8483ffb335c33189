"""A model's work on a GPU, captured once per kind of input and replayed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..kernels import current_backend
from ..kernels._op import is_plain

_WARM_UP = 3  # runs before a capture: they compile, choose and allocate what a capture cannot


class _Captured(NamedTuple):
    """A graph, and the tensors that it reads and writes each time."""

    replay: Callable[[], None]
    x: Tensor
    y: Any


class CudaGraphs(nn.Module):
    """`model(x)`, replayed from CUDA graphs: what the host does per kernel is done once.

    Captures one graph for each shape, dtype, layout and device of `x` it meets, and keeps those
    used last. An input is copied to the graph's own and outputs are copied from it, so that both
    may be kept. With gradients to compute, under transforms and modes that look at operations, and
    for calls with other arguments, `model` just runs.

    Graphs hold addresses: weights may be changed in place, and graphs are dropped when weights are
    moved, converted or replaced through this module, and when the mode changes. Calls must come one
    at a time, and from one stream: two that overlap would share a graph's tensors. The model's own
    control flow and hooks ran when the graph was captured, under the settings of then; other
    threads may use the GPU meanwhile.

    Each graph has the memory of a call for itself. What a dropped one had is PyTorch's to use again
    for the next graph, and `torch.cuda.empty_cache()` gives it back.

    Args:
        model: whose tensors are on one GPU, and whose outputs are tensors in containers that
            `torch.utils._pytree` knows: an instance of another class raises TypeError.
        max_graphs: how many are kept.
    """

    def __init__(self, model: nn.Module, max_graphs: int = 8) -> None:
        super().__init__()
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, got {max_graphs}")
        self.model = model
        self.max_graphs = max_graphs
        self._graphs: OrderedDict[Any, _Captured] = OrderedDict()
        self.training = model.training  # and parts of the model may differ

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self._can_replay(x):
            return self.model(x, *args, **kwargs)
        key = (x.shape, x.stride(), x.dtype, x.device, current_backend(), _autocast_dtype())
        captured = self._graphs.pop(key, None)
        if captured is None:
            if len(self._graphs) >= self.max_graphs:
                self._graphs.popitem(last=False)
            captured = self._capture(x)
        self._graphs[key] = captured  # the last used are at the end
        captured.x.copy_(x)
        captured.replay()
        return tree_map_only(Tensor, Tensor.clone, captured.y)

    def forget(self) -> None:
        """Drop all graphs."""
        self._graphs.clear()

    def _can_replay(self, x: Any) -> bool:
        return (
            isinstance(x, Tensor)
            and x.is_cuda
            and is_plain((x,))
            and not torch.cuda.is_current_stream_capturing()
            and not (torch.is_grad_enabled() and self._wants_grad(x))
        )

    def _wants_grad(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self.model.parameters())

    def _capture(self, x: Tensor) -> _Captured:
        # a tensor that inference mode makes could not be written to outside of it
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad(), _no_cache():
            own = torch.empty_like(x).copy_(x)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self.model(own)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # on this stream: PyTorch's own is of the GPU that the process has first captured on.
            # Other threads may allocate, as one that pins memory for a data loader does
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                y = self.model(own)
        _check_output(y)
        return _Captured(graph.replay, own, y)

    def train(self, mode: bool = True) -> Any:
        """Set the mode, and drop the graphs, which are of the one before."""
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights, and drop the graphs, which may read others."""
        self.forget()
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # graphs are of this process and these weights
        return {**self.__dict__, "_graphs": OrderedDict()}


@contextmanager
def _no_cache() -> Generator[None]:
    """Have autocast convert weights anew each time: what it keeps is gone when its block ends."""
    outer = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(outer)


def _check_output(y: Any) -> None:
    """Raise TypeError where tensors may be in y that are not found, to be copied."""
    for leaf in tree_leaves(y):
        if not isinstance(leaf, Tensor | bool | int | float | complex | str | None):
            raise TypeError(
                f"CudaGraphs cannot copy a {type(leaf).__qualname__}, which the model returns: "
                "return tensors in tuples, lists, dicts, or a class that is registered with "
                "torch.utils._pytree"
            )


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
