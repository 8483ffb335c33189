"""A model's work on a GPU, captured once per kind of input and replayed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..kernels import current_backend

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
    may be kept. With gradients to compute, and for calls with other arguments, `model` just runs.

    Graphs hold addresses: weights may be changed in place, and graphs are dropped when weights are
    moved, converted or replaced through this module. Calls must come one at a time, and from one
    stream: two that overlap would share a graph's tensors. The model's own control flow, random
    numbers and hooks ran when the graph was captured.

    Args:
        model: whose tensors are on one GPU.
        max_graphs: how many are kept.
    """

    def __init__(self, model: nn.Module, max_graphs: int = 8) -> None:
        super().__init__()
        if max_graphs < 1:
            raise ValueError(f"max_graphs must be at least 1, got {max_graphs}")
        self.model = model
        self.max_graphs = max_graphs
        self._graphs: OrderedDict[Any, _Captured] = OrderedDict()
        self.train(model.training)

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
            and not torch.compiler.is_compiling()
            and not torch.cuda.is_current_stream_capturing()
            and not (torch.is_grad_enabled() and self._wants_grad(x))
        )

    def _wants_grad(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self.model.parameters())

    def _capture(self, x: Tensor) -> _Captured:
        with torch.cuda.device(x.device), torch.no_grad():
            own = torch.empty_like(x).copy_(x)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self.model(own)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = self.model(own)
        return _Captured(graph.replay, own, y)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights, and drop the graphs, which may read others."""
        self.forget()
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:  # graphs are of this process and these weights
        return {**self.__dict__, "_graphs": OrderedDict()}


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
