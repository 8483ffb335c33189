"""Where results go: what cannot be written is said before anything is measured."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from vertebra.bench import outputs
from vertebra.bench.report import plain_table, print_table
from vertebra.bench.results import Report

REPORT = Report("models", {}, {})


def test_a_folder_is_made(tmp_path) -> None:
    outputs.check(tmp_path / "a" / "b" / "out.json")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "b"]
    outputs.check(None)
    outputs.check_chart(None)


def test_what_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        outputs.check(tmp_path)
    for path in (tmp_path / "file" / "out.json", tmp_path / "file" / "deeper" / "out.json"):
        with pytest.raises(ValueError, match="cannot be written"):
            outputs.check(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_what_must_not_be_written(tmp_path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        outputs.check(tmp_path / "out.json")


@pytest.mark.parametrize("name", ["chart", "chart.txt", "png"])
def test_charts_are_of_known_kinds(name: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"plot must end in .png, .svg, .pdf; got"):
        outputs.check_chart(tmp_path / name)
    outputs.check_chart(tmp_path / "chart.PNG")


def test_why_something_is_not_written(tmp_path) -> None:
    path = tmp_path / "chart.png"

    def nothing(report: Report, path: Path) -> None:
        pass

    def without_matplotlib(report: Report, path: Path) -> None:
        raise ImportError("No module named 'matplotlib'")

    def chart(report: Report, path: Path) -> None:
        path.write_text(path.read_text() + "." if path.exists() else "")

    assert outputs.write(REPORT, None, chart) is None
    assert outputs.write(REPORT, path, nothing) == f"{path} is not written: nothing was timed"
    assert "pip install 'vertebra[bench]'" in (
        outputs.write(REPORT, path, without_matplotlib) or ""
    )
    assert not path.exists()
    assert outputs.write(REPORT, path, chart) is None
    assert outputs.write(REPORT, path, nothing) is not None  # what is there is of another run


def test_columns_that_do_not_fit_are_left_out_and_named(capsys) -> None:
    for width, shown in ((60, ["a", "b b", "c"]), (25, ["a", "c"]), (16, ["a"])):
        table = plain_table("", "case")
        for heading in ("a", "b b", "c"):
            table.add_column(heading, no_wrap=True)
        table.add_row("4x8x7x7", "1.25", "1000.5", "7.5 MB")
        print_table(Console(width=width), table, "b b", "c")
        out = capsys.readouterr().out
        assert "…" not in out
        assert "1.25" in out
        assert ("1000.5" in out) == ("b b" in shown)
        assert ("7.5 MB" in out) == ("c" in shown)
        words = " ".join(out.split())
        assert ("a wider terminal also shows b b" in words) == ("b b" not in shown)
