"""What the recipes of `accelerate` were written from, looked up in other versions of the libraries.

    python -m vertebra.interop.readings timm==1.0.30 torchvision==0.27.1 [--json FILE]

Wheels are read, and nothing of them is imported: a version need not run here. Of every class that
there is a recipe for it says whether the methods that the recipe replaces read as they did, which
is what decides at run time.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from zipfile import ZipFile

from torch import nn

from . import _swap
from ._swap import reading, reading_of
from .accelerate import LIBRARIES, load

KNOWN, ABSENT = "known", "absent"


class Wheel:
    """The source of one version of a library."""

    def __init__(self, path: Path) -> None:
        self._zip = ZipFile(path)
        self._modules: dict[str, tuple[str, ast.Module]] = {}

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self._zip.namelist())

    def _file(self, module: str) -> str | None:
        stem = module.replace(".", "/")
        return next((f for f in (f"{stem}.py", f"{stem}/__init__.py") if f in self._names), None)

    def _module(self, module: str) -> tuple[str, ast.Module]:
        """Return the text of a module and its syntax; both are empty if there is none."""
        if module not in self._modules:
            file = self._file(module)
            text = self._zip.read(file).decode() if file else ""
            self._modules[module] = text, ast.parse(text)
        return self._modules[module]

    def find(self, path: str) -> tuple[str, ast.ClassDef] | None:
        """Return the module that defines what can be imported as `path`, and the class."""
        module, _, name = path.rpartition(".")
        for node in self._module(module)[1].body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return self.find(f"{self._origin(module, node)}.{alias.name}")
        return None

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        """Return the module that `node`, in `module`, imports from."""
        if not node.level:
            return node.module or ""
        is_package = (self._file(module) or "").endswith("__init__.py")
        parents = module.split(".")
        parents = parents[: len(parents) - node.level + is_package]
        return ".".join([*parents, *([node.module] if node.module else [])])

    def method(self, path: str, name: str) -> str | None:
        """Return the reading of a method of a class, its own or what it inherits."""
        found = self.find(path)
        if found is None:
            return None
        module, cls = found
        text, _ = self._module(module)
        for node in cls.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                source = ast.get_source_segment(text, node) or ""
                return reading_of(" " * node.col_offset + source)
        for base in cls.bases:
            inherited = self._inherited(module, ast.unparse(base), name)
            if inherited is not None:
                return inherited
        return None

    def _inherited(self, module: str, base: str, name: str) -> str | None:
        """Return the reading of a method of a class that `module` derives another one from."""
        if base.startswith(("nn.", "torch.nn.")):
            method = getattr(getattr(nn, base.rpartition(".")[2], None), name, None)
            return None if method is None else reading(method)
        return self.method(f"{module}.{base}", name)


def read(wheel: Wheel, library: str) -> dict[str, str]:
    """Return by class what a version of a library has of what recipes were written from."""
    load(library)
    found: dict[str, str] = {}
    for path, recipe in _swap.recipes(library).items():
        readings = {name: wheel.method(path, name) for name in recipe.methods}
        others = [
            f"{name} {found_reading}"
            for name, found_reading in readings.items()
            if found_reading not in recipe.methods[name]
        ]
        absent = wheel.find(path) is None
        found[path] = ABSENT if absent else ", ".join(others) or KNOWN
    return found


def download(requirement: str, folder: Path) -> Path:
    """Download one wheel, alone, and return where it lies."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "-d", str(folder), requirement], check=True)
    (wheel,) = folder.glob(f"{requirement.partition('==')[0]}-*.whl")
    return wheel


def main(argv: Sequence[str] | None = None) -> None:
    """Look into versions and print what is there."""
    parser = argparse.ArgumentParser(
        "python -m vertebra.interop.readings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("versions", nargs="+", metavar="LIBRARY==VERSION")
    parser.add_argument("--json", type=Path, help="add what was found to this file")
    options = parser.parse_args(argv)
    everything: dict[str, dict[str, dict[str, str]]] = {}
    if options.json and options.json.exists():
        everything = json.loads(options.json.read_text())
    for requirement in options.versions:
        library, _, version = requirement.partition("==")
        if library not in LIBRARIES or not version:
            parser.error(f"{requirement!r} is not LIBRARY==VERSION of {', '.join(LIBRARIES)}")
        with tempfile.TemporaryDirectory() as folder:
            found = read(Wheel(download(requirement, Path(folder))), library)
        everything.setdefault(library, {})[version] = found
        count = sum(value == KNOWN for value in found.values())
        print(f"{requirement}: {count} of {len(found)} classes are known")
        for path, value in found.items():
            if value != KNOWN:
                print(f"    {path}: {value}")
        if options.json:
            options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
