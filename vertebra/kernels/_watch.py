"""A dispatch mode that looks on: ops of ours run under it as they do without it."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

from torch.utils._python_dispatch import TorchDispatchMode


class _Watching(threading.local):
    depth: int = 0


watching = _Watching()
"""How many modes of this thread only look on."""

W = TypeVar("W", bound="Watch")


class Watch(TorchDispatchMode):
    """Tells `saw` what PyTorch computes, one call of an op after the other."""

    def __enter__(self: W) -> W:
        watching.depth += 1
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        watching.depth -= 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch would import Dynamo to keep it out, which takes a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.saw(func, args, kwargs, result)
        return result

    def saw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Take notice of a call."""
        raise NotImplementedError
