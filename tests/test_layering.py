"""Who may import whom, held by walking every file's syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vertebra

ROOT = Path(vertebra.__file__).parent
PEERS = {"torchvision", "timm", "transformers"}
# what contracts and launchers have in common, and needs no triton
SHARED = {"_signature", "_watch"}
DERIVES = {"interop/transformers.py"}  # from a peer's classes: imported only by who asks for it
FILES = sorted(ROOT.rglob("*.py"))

# package -> packages of ours it may import
MAY = {
    "kernels": {"kernels"},
    "nn": {"nn", "kernels"},
    "models": {"models", "nn"},
    "interop": {"interop", "models", "nn", "kernels"},
    "testing": {"testing", "kernels"},
    "bench": {"bench", "testing", "models", "nn", "kernels", "interop", "_explain"},
    "_cli": {"_cli", "bench", "testing", "models", "nn", "kernels", "interop", "_explain"},
    "_explain": {"_explain", "interop", "kernels"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield every imported module's absolute name, and whether a function imports it."""
    package = ["vertebra", *path.relative_to(ROOT).parent.parts]
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [stem] + [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) in inside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    where = parts[0].removesuffix(".py")
    in_triton = "_triton" in parts
    for name, is_lazy in imports(path):
        top = name.split(".")[0]
        if top == "triton":
            assert in_triton, f"{path} imports triton"
        if top in PEERS:
            assert where in ("interop", "bench"), f"{path} imports {top}"
            derives = path.relative_to(ROOT).as_posix() in DERIVES
            assert is_lazy or derives, f"{path} imports {top} before it is asked for"
        if not name.startswith("vertebra."):
            continue
        target = name.split(".")[1]
        if where in MAY and (ROOT / target).is_dir():
            assert target in MAY[where], f"{path} imports {name}"
        if "_triton" in name.split(".") and not in_triton:
            assert is_lazy or where == "testing", f"{path} imports {name} outside a function"
        if in_triton and target == "kernels":
            is_shared = name.split(".")[2] in SHARED
            assert is_shared or "_triton" in name.split("."), f"{path} imports the contract {name}"


def test_an_op_does_not_import_another_ops_kernels() -> None:
    folder = ROOT / "kernels" / "_triton"
    stems = {p.stem for p in folder.glob("[a-z]*.py")}
    for path in folder.glob("[a-z]*.py"):
        imported = {name.rpartition(".")[2] for name, _ in imports(path)}
        assert not imported & (stems - {path.stem}), path


def test_every_op_is_a_contract_and_its_kernels() -> None:
    contracts = {p.stem for p in (ROOT / "kernels").glob("[a-z]*.py")}
    kernels = {p.stem for p in (ROOT / "kernels" / "_triton").glob("[a-z]*.py")}
    assert contracts == kernels
