"""Other versions of the libraries, and the table of what is recognised."""

import importlib
from pathlib import Path
from zipfile import ZipFile

import pytest

from vertebra.interop import _swap, readings

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]


def packed(library: str, folder: Path, **edits: tuple[str, str]) -> readings.Wheel:
    """Return the installed library as a wheel, some files of it with one text for another."""
    package = Path(importlib.import_module(library).__file__ or "").parent
    edited = {f"{library}/{name.replace('__', '/')}.py": edit for name, edit in edits.items()}
    path = folder / f"{library}.whl"
    with ZipFile(path, "w") as wheel:
        for file in package.rglob("*.py"):
            name = str(file.relative_to(package.parent))
            text = file.read_text()
            if name in edited:
                before, after = edited[name]
                assert before in text
                text = text.replace(before, after)
            wheel.writestr(name, text)
    return readings.Wheel(path)


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_a_wheel_reads_as_what_is_imported(library: str, tmp_path: Path, request) -> None:
    request.getfixturevalue(library)
    found = readings.read(packed(library, tmp_path), library)
    assert found.keys() == _swap.recipes(library).keys()
    assert set(found.values()) == {readings.KNOWN}


def test_what_differs_is_found(timm, tmp_path: Path) -> None:
    edits = {
        "models__convnext": ("x = self.conv_dw(x)", "x = self.conv_dw(x).contiguous()"),
        "layers__grn": ("class GlobalResponseNorm", "class ResponseNorm"),
    }
    found = readings.read(packed("timm", tmp_path, **edits), "timm")
    wrong = {path: what for path, what in found.items() if what != readings.KNOWN}
    assert wrong.keys() == {
        "timm.models.convnext.ConvNeXtBlock",
        "timm.layers.grn.GlobalResponseNorm",
    }
    assert wrong["timm.layers.grn.GlobalResponseNorm"] == readings.ABSENT
    assert wrong["timm.models.convnext.ConvNeXtBlock"].startswith("forward ")


def test_what_a_function_says_is_not_what_it_does() -> None:
    one = """
        @decorated
        def forward(self, x: "Tensor") -> "Tensor":
            '''Doc.'''
            return self.act(  # a comment
                x, 1.0)
    """
    other = "def forward(self, x):\n    return self.act(x, 1.0)\n"
    assert readings.reading_of(one) == readings.reading_of(other)
    assert readings.reading_of(one) != readings.reading_of(other.replace("1.0", "1"))
    assert readings.reading_of(one) != readings.reading_of(other.replace("x", "input"))
