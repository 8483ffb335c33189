"""What `accelerate` knows: every class with a recipe, the ops its modules run, the versions read.

The ops are seen, not declared: small models and loose modules are accelerated and run in both
modes, and an op counts for the innermost accelerated module that was running. The versions are
those in which `vertebra.interop.readings` found the code that the recipe was written from.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from .._explain import explain
from ..interop import _swap, accelerate
from ..interop.accelerate import LIBRARIES, load
from ..interop.readings import ABSENT, KNOWN
from . import peers

HEADINGS = ("classes", "ops in training", "in evaluation", "versions")

Readings = dict[str, dict[str, dict[str, str]]]  # library, version, class

_CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
_TRANSFORMERS: list[tuple[str, dict[str, Any]]] = [
    ("ResNet", {"layer_type": "basic", **_RESNET}),
    ("ResNet", {"layer_type": "bottleneck", **_RESNET}),
    ("RegNet", {"layer_type": "x", "groups_width": 4, **_RESNET}),
    ("RegNet", {"layer_type": "y", "groups_width": 4, **_RESNET}),
    ("RTDetrResNet", {"layer_type": "basic", **_RESNET}),
    ("RTDetrResNet", {"layer_type": "bottleneck", **_RESNET}),
    ("ConvNext", _CONVNEXT),
    ("ConvNextV2", _CONVNEXT),
    ("DINOv3ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 1]}),
]
_TORCHVISION = ("resnet18", "resnet50", "regnet_y_400mf", "convnext_tiny")
_TIMM = ("resnet18", "resnet50", "seresnet18", "regnety_002", "convnext_atto", "convnextv2_atto")
# loose modules, by how the name of their class ends, and what they are built with
_LOOSE: dict[str, tuple[Any, ...]] = {
    "FrozenBatchNorm2d": (8,),
    "BatchNormAct2d": (8,),
    "FrozenBatchNormAct2d": (8,),
    "LayerNorm2d": (8,),
    "LayerNorm2dFp32": (8,),
    "LayerScale2d": (8,),
    "DropPath": (0.5,),
    "StochasticDepth": (0.5, "row"),
    "Conv2dNormActivation": (8, 8),
}


@dataclass
class Row:
    """Classes of one library that share a recipe."""

    library: str
    classes: list[str] = field(default_factory=lambda: [])
    ops: dict[bool, set[str]] = field(default_factory=lambda: {True: set(), False: set()})


def _models(library: str) -> Iterator[nn.Module]:
    """Yield small models in which classes of a library occur, then such modules by themselves."""
    if library == "torchvision":
        yield from (peers.torchvision_model(name) for name in _TORCHVISION)
        taken_apart: Any = peers.torchvision_module("models._utils").IntermediateLayerGetter
        yield taken_apart(peers.torchvision_model("resnet18"), {"layer4": "out"})
    elif library == "timm":
        yield from (peers.timm_model(name) for name in _TIMM)
        yield peers.timm().create_model("resnet18", features_only=True)
    else:
        transformers = peers.transformers()
        for name, options in _TRANSFORMERS:
            config = getattr(transformers, f"{name}Config")(**options)
            build = getattr(transformers, f"{name}Model", None)
            yield (build or getattr(transformers, f"{name}Backbone"))(config)
    for path in _swap.recipes(library):
        module, _, name = path.rpartition(".")
        for ending, arguments in _LOOSE.items():
            if name == ending or (library == "transformers" and name.endswith(ending)):
                yield getattr(importlib.import_module(module), name)(*arguments)


def table() -> list[Row]:
    """Return what there is, library by library, in the order of the recipes.

    A class without an op of its own is what a block runs in one op with what stands beside it.
    Classes that only `fuse` changes are left out.
    """
    rows: list[Row] = []
    for library in LIBRARIES:
        load(library)
        seen = _seen(library)
        by_recipe: dict[type, Row] = {}
        for path, recipe in _swap.recipes(library).items():
            if recipe.for_fused:
                continue
            row = by_recipe.setdefault(recipe.mixin, Row(library))
            row.classes.append(path.removeprefix(f"{library}."))
            for training in (True, False):
                row.ops[training] |= seen[path, training]
        rows += by_recipe.values()
    return rows


def _seen(library: str) -> defaultdict[tuple[str, bool], set[str]]:
    """Return the ops that modules of each class run, by whether they train."""
    found: defaultdict[tuple[str, bool], set[str]] = defaultdict(set)
    for model in _models(library):
        accelerate(model)
        modules = dict(model.named_modules())
        convolutions = [m for m in modules.values() if isinstance(m, nn.Conv2d)]
        x = torch.randn(2, convolutions[0].in_channels if convolutions else 8, 64, 64)
        for training in (True, False):
            for site in explain(model.train(training), x, bandwidth=1.0):
                module: Any = modules[site.module]
                if isinstance(module, _swap.Swapped):
                    own = module._own  # pyright: ignore[reportPrivateUsage]
                    found[_swap.path_of(own), training].add(site.op)
    return found


def lines(versions: Path) -> list[tuple[str, str, str, str]]:
    """Return the table as text, with the versions that the readings in a file are of."""
    try:
        readings = json.loads(versions.read_text())
    except ValueError:
        readings = None
    if not isinstance(readings, dict) or not set(LIBRARIES) <= set(readings):
        raise ValueError(f"{versions} must hold what `python -m vertebra.interop.readings` writes")
    return [_cells(row, readings) for row in table()]


def _cells(row: Row, versions: Readings) -> tuple[str, str, str, str]:
    """Return a line of the table: classes, ops in training and in evaluation, versions."""
    names = ", ".join(path.rpartition(".")[2] for path in row.classes)
    training, evaluation = (", ".join(sorted(row.ops[mode])) for mode in (True, False))
    return f"{row.library}: {names}", training, evaluation, _versions(row, versions)


def _versions(row: Row, versions: Readings) -> str:
    """Return the oldest and newest version in which all there is of the classes reads as known."""
    known = [
        version
        for version, found in versions[row.library].items()
        if KNOWN in (readings := {found[f"{row.library}.{name}"] for name in row.classes})
        and readings <= {KNOWN, ABSENT}
    ]
    known.sort(key=lambda version: [int(part) for part in version.split(".")])
    return f"{known[0]} to {known[-1]}" if known else ""


def show(console: Console, versions: Path) -> None:
    """Print the table."""
    drawn = Table(*(Column(heading, overflow="fold") for heading in HEADINGS))
    for line in lines(versions):
        drawn.add_row(*line)
    console.print(drawn)
