"""What the commands share: errors of one line, a choice of device and type."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from ..bench.cli import usage_error

if TYPE_CHECKING:
    import torch


class Commands(TyperGroup):
    """Commands that say in one line what is wrong with their arguments, and exit with 2."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command and exit."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except typer.Abort:
            sys.exit(130)
        except Exception as error:  # typer exports no class that all of its errors are of
            message = getattr(error, "format_message", None)
            if message is None:
                raise
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "vertebra"
            text = " ".join(message().removeprefix("Invalid value: ").split())
            text = text.replace("Value error, ", "")
            sys.stderr.write(f"{command}: {text}\n")
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def refusing() -> Generator[None]:
    """Make what the library says of wrong arguments an error of the command line."""
    try:
        yield
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise usage_error(error) from None


class Dtype(str, Enum):
    """A type of numbers, by the name it has on the command line."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    def of_torch(self) -> torch.dtype:
        """Return what torch calls it."""
        import torch

        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return names[self.value]


def choose_device(name: str | None) -> torch.device:
    """Return the device of that name; the GPU, if there is one, where none is named."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"device must be like cpu, cuda or cuda:1; got {name!r}") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(
            f"device {name!r} cannot be used here: {reason} (`vertebra env` says what can)"
        ) from None
    return device
