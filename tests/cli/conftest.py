"""The commands in this process, on plain PyTorch, and two photographs as files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vertebra.bench import photos

WIDE = {"COLUMNS": "300", "TERMINAL_WIDTH": "300"}


@pytest.fixture(autouse=True)
def _eager(eager_on_one_thread: None) -> None:
    """What is tested here is what is said."""


@pytest.fixture
def invoke() -> Callable[..., Any]:
    """Run a command; return its result."""
    testing = pytest.importorskip("typer.testing")
    from vertebra.__main__ import app

    def invoke(*args: str | Path, **env: str) -> Any:
        return testing.CliRunner().invoke(app, [str(a) for a in args], env={**WIDE, **env})

    return invoke


@pytest.fixture
def run(invoke) -> Callable[..., Any]:
    """Run a command that goes well; return its result."""

    def run(*args: str | Path, **env: str) -> Any:
        result = invoke(*args, **env)
        assert result.exit_code == 0, result.output
        return result

    return run


@pytest.fixture
def read(run) -> Callable[..., Any]:
    """Run a command with `--json`; return what it prints."""

    def read(*args: str | Path) -> Any:
        return json.loads(run(*args, "--json").stdout)

    return read


@pytest.fixture
def refused(invoke) -> Callable[..., str]:
    """Run a command that refuses its arguments; return the one line that it says."""

    def refused(*args: str | Path) -> str:
        result = invoke(*args)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        return line

    return refused


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> list[Path]:
    """Two photographs, of 640 x 427 pixels, without loss."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("photographs")
    paths = [folder / "china.png", folder / "flower.png"]
    for path, photo in zip(paths, photos.load(), strict=True):
        photo.save(path)
    return paths
