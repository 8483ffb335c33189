"""What all commands have in common: help, and one line for what is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

COMMANDS = (
    "env",
    "list",
    "predict",
    "parity",
    "drop-in",
    "bench",
    "bench traffic",
    "bench overhead",
    "bench ceilings",
)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_reads_well(command: str, run) -> None:
    text = run(*command.split(), "--help").stdout
    assert "Usage" in text
    for line in text.splitlines():
        assert "[]" not in line
        assert not line.rstrip().endswith(" .")  # what is left of a markup that was meant as text


def test_alone_it_helps(run) -> None:
    assert run().stdout == run("--help").stdout
    for command in COMMANDS:
        assert command.split()[0] in run().stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["predikt"], "vertebra: No such command 'predikt'"),
        (["list", "--foo"], "vertebra list: No such option: --foo"),
        (["list", "--family", "vit"], "vertebra list: Invalid value for '--family': .*'convnext'"),
        (["predict"], "vertebra predict: Missing argument 'IMAGE'"),
        (["bench", "--dtype", "x"], "vertebra bench: dtype must be one of fp32"),
        (["parity", "--sizes", "small"], "vertebra parity: sizes are numbers of pixels"),
        (["parity", "--peers", "keras"], "vertebra parity: peers are torchvision"),
        (["drop-in", "--versions", "nowhere.json"], "vertebra drop-in: .*nowhere.json"),
    ],
)
def test_wrong_arguments_are_one_line(args: list[str], said: str, refused) -> None:
    assert re.match(said, refused(*args).replace("root", "vertebra", 1))


def test_ctrl_c_is_no_error(monkeypatch, capsys) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    from vertebra.__main__ import app

    monkeypatch.setattr("vertebra._cli.list.console", interrupt)
    with pytest.raises(SystemExit) as exit:
        app(["list"])
    assert exit.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_a_defect_of_ours_shows_where_it_is(monkeypatch) -> None:
    def break_(*_: object) -> None:
        raise RuntimeError("ours")

    from vertebra.__main__ import app

    monkeypatch.setattr("vertebra._cli.list.console", break_)
    with pytest.raises(RuntimeError, match="ours"):
        app(["list"])


def test_help_imports_nothing_that_takes_long() -> None:
    code = """
import sys
from pathlib import Path
import vertebra.__main__
heavy = "torchvision timm transformers triton matplotlib sklearn PIL safetensors torch._inductor"
print([name for name in heavy.split() if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_cannot_be_written_is_said_before_anything_is_done(refused, tmp_path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "out.json"
    for command in ("bench kernels --tiny", "bench models --tiny", "bench compile --tiny"):
        assert "cannot be written" in refused(*command.split(), "--json", path)
        assert "cannot be written" in refused(*command.split(), "--csv", path)
    for command in ("bench models --floor", "bench overhead", "parity resnet18"):
        assert "cannot be written" in refused(*command.split(), "--json", path)
    assert "cannot be written" in refused(
        "bench", "--model", "resnet18", "--out", tmp_path / "file"
    )


@pytest.mark.parametrize("command", ["bench kernels", "bench models", "bench compile"])
def test_what_resume_cannot_go_on_from_is_one_line(command: str, refused, tmp_path) -> None:
    path = tmp_path / "notes.json"
    path.write_text("[]")
    said = refused(*command.split(), "--tiny", "--json", path, "--resume")
    assert "must hold what a benchmark found" in said
    assert path.read_text() == "[]"


def test_the_page_has_every_command_and_option() -> None:
    from typer.main import get_command

    from vertebra.__main__ import app
    from vertebra._cli._reference import parts
    from vertebra.bench.pages.sources import Sources

    text = parts(get_command(app))["commands"](Sources(Path()))
    for name in (*COMMANDS, "tune", "report", "bench kernels", "bench models", "bench train"):
        assert (f"<code>vertebra {name}</code>" in text) == (name != "bench traffic")
    for option in ("--resume", "--floor", "--no-blocks", "--weights", "`MODEL`", "`IMAGE`"):
        assert option in text
