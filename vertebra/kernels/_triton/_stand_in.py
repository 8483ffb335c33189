"""A driver for a GPU that is not there: Triton's JIT is real, up to the launch, which does nothing.

Kernels are bound, specialised, compiled for the target and looked up as on a GPU, from tensors that
are anywhere. For processes of their own: Triton has one driver.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from triton.runtime.driver import driver

from ._aot import TARGETS

Enter = Callable[..., None]


def _do_nothing(*_: Any) -> None:
    pass


def stand_in(target: str, launcher: Callable[[Any, Any], Enter] = lambda *_: _do_nothing) -> None:
    """Make `target` the GPU that Triton finds.

    Args:
        target: one of `_aot.TARGETS`.
        launcher: returns, for a binary's source and metadata, what is called to launch it.
    """
    gpu, shared, _ = TARGETS[target]
    functions = itertools.count(1)
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": shared},
        # module, function, registers, spills, the most threads of a program
        load_binary=lambda *_: (object(), next(functions), 0, 0, 1024),
    )
    driver.set_active(
        SimpleNamespace(  # pyright: ignore[reportArgumentType]
            get_current_target=lambda: gpu,
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            launcher_cls=launcher,
            utils=utils,
        )
    )
