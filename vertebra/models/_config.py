"""How a config says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable


def requirement(config: object) -> Callable[[bool, str, str], None]:
    """Return a check: that something holds, of which fields (by name), and what the rule is."""

    def require(holds: bool, names: str, rule: str) -> None:
        if not holds:
            got = ", ".join(f"{name}={getattr(config, name)!r}" for name in names.split())
            raise ValueError(f"{type(config).__name__}: {rule}; got {got}")

    return require
