"""What README and documentation show works: code runs, commands parse, files and targets exist."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import vertebra
from vertebra.bench.gpu import STAGES

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

PACKAGES = ("nn", "models", "interop", "kernels")

# How many blocks of a page are not run. Each says why in a comment above it: <!-- not run: why -->
NOT_RUN: dict[str, int] = {}

_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_SPAN = re.compile(r"`((?:python|vertebra|make|torchrun) [^`]+)`")
_LINK = re.compile(r"(?:\]\(|src=\"|srcset=\")([^)\"\s#]+)")


class Block(NamedTuple):
    line: int
    language: str
    code: str
    reason: str | None


def blocks(text: str) -> Iterator[Block]:
    for found in _FENCE.finditer(text):
        line = text[: found.start("code")].count("\n") + 1
        yield Block(line, found["language"], found["code"], found["reason"])


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# python


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text()) if block.language in ("python", "py")]


WITH_CODE = [page for page in PAGES if python_blocks(page)]


@pytest.mark.parity
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    eager_on_one_thread: None,
    torchvision: Any,
    timm: Any,
    transformers: Any,
) -> None:
    """The blocks of a page one after the other, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(page):
        if block.reason is None:
            code = "\n" * (block.line - 1) + block.code  # a traceback then names the page's line
            exec(compile(code, str(page), "exec"), namespace)


def test_what_is_not_run_says_why() -> None:
    reasons = {name(page): [b.reason for b in python_blocks(page) if b.reason] for page in PAGES}
    assert {page: len(found) for page, found in reasons.items() if found} == NOT_RUN


def test_no_fence_is_overlooked() -> None:
    for page in PAGES:
        text = page.read_text()
        assert 2 * len(list(blocks(text))) == len(re.findall(r"^ *```", text, re.MULTILINE)), page


# commands


class Command(NamedTuple):
    page: Path
    text: str
    whole: bool  # and not the mention of one, which may leave its arguments out


def commands() -> Iterator[Command]:
    for page in PAGES:
        text = page.read_text()
        for block in blocks(text):
            if block.language in ("", "sh", "bash", "console"):
                for line in block.code.replace("\\\n", " ").splitlines():
                    yield Command(page, line, whole=True)
        outside = _FENCE.sub("", text)
        for found in _SPAN.finditer(outside):
            yield Command(page, found[1].replace("\n", " "), whole=False)
        for line in re.findall(r"^    (?:\w+=\S+ )*((?:python|vertebra|make) .*)$", outside, re.M):
            yield Command(page, line, whole=True)


def arguments(command: Command) -> list[str]:
    """Return the words of a command, without variables set before it and comments behind it."""
    try:
        words = shlex.split(command.text, comments=True)
    except ValueError:  # not a command: an apostrophe in a drawing
        return []
    while words and re.match(r"\$$|\w+=", words[0]):
        words.pop(0)
    if words and words[0].startswith(".venv/bin/"):
        words[0] = words[0].removeprefix(".venv/bin/")
    return words


COMMANDS = sorted({c for c in commands() if arguments(c)}, key=lambda c: (name(c.page), c.text))


def of(*programs: str) -> Any:
    found = [c for c in COMMANDS if arguments(c)[0] in programs]
    ids = [f"{name(c.page)}-{c.text}" for c in found]
    return pytest.mark.parametrize("command", found, ids=ids)


@of("make")
def test_make_has_the_targets(command: Command) -> None:
    rules = re.findall(r"^([a-z][a-z% -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()} - {"gpu-%"}
    targets |= {f"gpu-{stage}" for stage in STAGES}
    asked = {word for word in arguments(command)[1:] if "=" not in word}
    assert asked <= targets


@of("python", "python3", "torchrun", "vertebra")
def test_commands_have_the_options(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = arguments(command)
    if program == "torchrun":
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    if program == "vertebra" or words[:2] == ["-m", "vertebra"]:
        monkeypatch.chdir(tmp_path)
        for photo in (word for word in words if word.endswith(".jpg")):
            Path(photo).touch()
        parse(words if program == "vertebra" else words[2:], command.whole)
        return
    path = source_of(words)
    assert path is not None, f"{command.text}: there is no such module or file"
    text = path.read_text()
    for option in (word for word in words[1:] if word.startswith("--")):
        flag = option.partition("=")[0]
        field = flag.removeprefix("--").replace("-", "_")  # of a dataclass that options come from
        assert f'"{flag}"' in text or f"    {field}: " in text, f"{path} has no {flag}"


def source_of(words: list[str]) -> Path | None:
    """Return the file that `python WORDS` runs."""
    if words[0] != "-m":
        path = ROOT / words[0]
        return path if path.is_file() else None
    spec = importlib.util.find_spec(words[1])
    return Path(spec.origin) if spec and spec.origin else None


def parse(words: list[str], whole: bool) -> None:
    """Raise what the command line would say of `words`, without doing what they say."""
    typer_main = pytest.importorskip("typer.main")
    from vertebra.__main__ import app

    command = typer_main.get_command(app)
    context = command.make_context("vertebra", list(words))
    while hasattr(command, "resolve_command"):
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not rest:
            return
        found, command, rest = command.resolve_command(context, rest)
        try:
            context = command.make_context(found, rest, parent=context)
        except Exception as error:
            if whole or type(error).__name__ != "MissingParameter":
                raise
            return


# names


def test_tests_that_are_named_exist() -> None:
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    functions = {name for text in sources.values() for name in re.findall(r"def (test_\w+)", text)}
    for page in PAGES:
        for path in re.findall(r"`(tests/[\w/.]+\.py)`", page.read_text()):
            assert ROOT / path in sources, f"{page}: {path}"
        for function in re.findall(r"`(test_\w+)`", page.read_text()):
            assert function in functions, f"{page}: {function}"


@pytest.mark.parametrize("package", ["vertebra", *(f"vertebra.{name}" for name in PACKAGES)])
def test_the_reference_has_every_public_name(package: str) -> None:
    """But the functions that build a network, of which the lists of networks have the names."""
    module = importlib.import_module(package)
    found = [re.findall(r"^::: vertebra[\w.]*\.(\w+)$", p.read_text(), re.M) for p in PAGES]
    shown = {name for names in found for name in names}
    public = {name for name in module.__all__ if inspect.isroutine(getattr(module, name))}
    public |= {name for name in module.__all__ if inspect.isclass(getattr(module, name))}
    assert public - set(vertebra.list_models()) <= shown


# links


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if not re.match(r"[a-z]+:", link):
            assert (page.parent / link).exists(), link
