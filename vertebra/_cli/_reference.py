"""What the documentation shows of the command line, taken from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from io import StringIO
from typing import Any

from rich.console import Console

from ..bench.pages import site
from ..bench.pages.markdown import code, folded, paragraphs, table
from ..bench.pages.sources import Sources


def parts(program: Any) -> Mapping[str, site.Part]:
    """Return every part that pages have; `program` is the command that has all others."""
    return {**site.PARTS, "commands": partial(_commands, program), "list": _list}


def _commands(program: Any, _: Sources) -> str:
    """Return arguments and options of every command, each in a table that opens."""
    return paragraphs(
        *(
            folded(
                f"<code>{name}</code>: {_sentence(command)}",
                table(("", "what it says"), _lines(command), left=2),
            )
            for name, command in _leaves("vertebra", program)
            if list(_lines(command))
        )
    )


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield what can be run, by all its words."""
    if command.params and name != "vertebra":
        yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from _leaves(f"{name} {word}", inner)


def _sentence(command: Any) -> str:
    paragraph = (command.help or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).removesuffix(".")


def _lines(command: Any) -> Iterator[tuple[str, str]]:
    for param in command.params:
        if "--help" in param.opts:
            continue
        is_option = param.param_type_name == "option"
        words = [*param.opts, *param.secondary_opts] if is_option else [param.metavar or "NAME"]
        said = " ".join((param.help or "").split())
        if is_option and param.default not in (None, "", False, True):
            said += f" Default: {code(getattr(param.default, 'value', param.default))}."
        yield " ".join(map(code, words)), said


def _list(_: Sources) -> str:
    """Return what `vertebra list "convnext*" --weights` prints."""
    from ..models import list_models
    from .list import describe, overview

    out = Console(width=100, file=StringIO())
    out.print(overview([describe(name) for name in list_models("convnext*", pretrained=True)]))
    printed: Any = out.file
    lines = (line.rstrip() for line in printed.getvalue().splitlines())
    return "\n".join(("```text", *lines, "```"))
