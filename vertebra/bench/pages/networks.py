"""The networks, from the registry: variants, published weights, and how they agree with peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ...models import _convnext_config, _regnet_config, _resnet_config, list_models
from ...models._pretrained import ENUMS
from ...models._registry import family_of
from ..parity import ALLOWED, Row
from ..sizes import size_of
from .markdown import bullets, code, paragraphs, table
from .sources import Sources

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "resnet": _resnet_config.CONFIGS,
    "regnet": _regnet_config.CONFIGS,
    "convnext": _convnext_config.CONFIGS,
}


def variants(sources: Sources, family: str) -> str:
    """Return the named networks of a family and what distinguishes each from the default."""
    compared: dict[str, list[str]] = {}
    for row in sources.parity:
        compared.setdefault(row.model, []).append(row.peer)
    lines: list[list[str]] = []
    for name in _members(family):
        size = size_of(name)
        lines.append(
            [
                code(name),
                ", ".join(map(code, _differences(CONFIGS[family][name]))),
                ", ".join(compared.get(name, ["none"])),
                f"{size.parameters / 1e6:,.2f}",
                f"{size.macs / 1e9:,.2f}",
            ]
        )
    headings = ["name", "config, where it is not the default", "compared with"]
    return table([*headings, "M parameters", "GMACs"], lines, left=3)


def _members(family: str) -> list[str]:
    """Return a family's names, smaller networks first among those that begin alike."""
    names = [name for name in list_models() if family_of(name) == family]
    return sorted(names, key=lambda name: (len(_kind(name)), _kind(name), size_of(name).macs, name))


def _kind(name: str) -> str:
    """Return what comes before a name's first digit, or its size in words."""
    for i, character in enumerate(name):
        if character.isdigit() and not name.startswith("convnext"):
            return name[:i]
    return name.partition("_")[0]


def _differences(config: Any) -> Iterator[str]:
    default = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(default, field.name):
            yield f"{field.name}={_value(value)}"


def _value(value: Any) -> str:
    return getattr(value, "__name__", "").lstrip("_") or repr(value)


def weights(_: Sources, family: str) -> str:
    """Return the published weights that `create_model` knows by name."""
    lines = [
        [
            code(f"{enum.__name__}.{member.name}"),
            code(member.value.model),
            "default" if member is enum["DEFAULT"] else "",
            f"{member.value.acc1:.2f}",
            f"{member.value.acc5:.2f}",
            f"{member.value.resize_size}, {member.value.crop_size}",
        ]
        for enum in ENUMS.values()
        for member in enum
        if family_of(member.value.model) == family
    ]
    headings = ["weights", "network", "", "top-1", "top-5", "resize, crop"]
    return table(headings, lines, left=3)


def parity(sources: Sources) -> str:
    """Return how the networks agree with those of other libraries, a line per family and peer."""
    if not sources.parity:
        return "No comparison has been committed yet."
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sources.parity:
        groups.setdefault((row.family, row.peer), []).append(row)
    headings = ["family", "library", "networks", "parameters", "keys", "logits", "gradients"]
    lines = [[*key, *_agreement(rows)] for key, rows in groups.items()]
    failed = [f"{row.model}, {row.peer}: differs" for row in sources.parity if row.failed]
    large = [row for row in sources.parity if row.note]
    names = ", ".join(dict.fromkeys(code(row.model) for row in large))
    sentences = [
        f"{len(sources.parity)} comparisons, {len(failed)} with differences.",
        *failed,
        *(
            [f"Compared by parameters and keys alone, for want of memory: {names}."]
            if large
            else ()
        ),
        *(
            f"Allowed of a {family}: {_error(logits)} in logits, {_error(gradients)} in gradients."
            for family, (logits, gradients) in ALLOWED.items()
        ),
    ]
    return paragraphs(table(headings, lines, left=2), bullets(sentences))


def _agreement(rows: list[Row]) -> Iterator[str]:
    """Yield cells: how many networks, and of them the worst that was found."""
    yield str(len(rows))
    yield _all(sum(row.parameters == row.peer_parameters for row in rows), len(rows))
    yield _all(sum(row.keys_equal for row in rows), len(rows))
    yield _error(max((e for row in rows for e in row.outputs.values()), default=None))
    yield _error(max((r.gradients for r in rows if r.gradients is not None), default=None))


def _all(equal: int, of: int) -> str:
    return "equal" if equal == of else f"{of - equal} DIFFER"


def _error(error: float | None) -> str:
    return "" if error is None else "equal" if error == 0 else f"{error:.1e}"
