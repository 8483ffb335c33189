"""A run: what it keeps, what it takes up, and what it leaves behind when it is stopped."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from vertebra.bench import report
from vertebra.bench.results import Comparison, Report, Row
from vertebra.bench.session import Session, Task
from vertebra.bench.settings import Settings

SETTINGS = Settings.choose(device="cpu", tiny=True)


def opened(path: Path, resume: bool = False, settings: Settings = SETTINGS) -> Session:
    return Session.open("kernels", settings, path, resume=resume)


def row(provider: str = "eager", status: str = "ok", samples: int = 2) -> Row:
    times = [1.0] * samples if status == "ok" else []
    return Row(provider, True, status, samples_ms=times)  # pyright: ignore[reportArgumentType]


def task(name: str, *rows: Row, then: Callable[[], None] = lambda: None) -> Task:
    def make(session: Session) -> None:
        comparison = session.begin(Comparison(name, []))
        comparison.rows += rows or (row(),)
        then()
        comparison.finished = True

    return Task((name,), make, steps=1)


def names(report: Report) -> list[str]:
    return [comparison.name for comparison in report.comparisons]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_the_ceilings_are_measured_in_the_same_run_and_kept(tmp_path) -> None:
    path = tmp_path / "k.json"
    report = opened(path).run([task("a")])
    assert report.ceilings is not None
    assert Report.load(path).ceilings == report.ceilings
    again = opened(path, resume=True).run([task("b")])
    assert again.ceilings == report.ceilings


def test_what_is_done_is_not_done_again(tmp_path) -> None:
    path = tmp_path / "k.json"
    opened(path).run([task("a")])
    report = opened(path, resume=True).run([task("a", then=interrupt), task("b")])
    assert names(report) == ["a", "b"]
    assert not report.interrupted
    assert names(opened(path).run([task("c")])) == ["c"]  # but where nobody asked for it


def test_a_run_of_another_kind_is_not_taken_up(tmp_path) -> None:
    path = tmp_path / "k.json"
    opened(path).run([task("a")])
    assert names(opened(path, True, replace(SETTINGS, rounds=99)).report) == []
    assert names(opened(path, True, replace(SETTINGS, match="x", minutes=1.0)).report) == ["a"]
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"environment": {**content["environment"], "torch": "1"}}))
    assert names(opened(path, resume=True).report) == []


def test_nor_is_one_of_another_command_which_stays_as_it_was(tmp_path) -> None:
    path = tmp_path / "k.json"
    opened(path).run([task("a")])
    before = path.read_text()
    with pytest.raises(ValueError, match="holds a run of 'kernels', which one of 'models' does"):
        Session.open("models", SETTINGS, path, resume=True)
    assert path.read_text() == before


def test_what_was_cut_off_before_it_began_has_no_table(tmp_path, capsys) -> None:
    session = opened(tmp_path / "k.json")
    session.begin(Comparison("a", [], facts={"dtype": "fp32"}))
    report.show(session.report, Console(width=80))
    assert "provider" not in capsys.readouterr().out


def test_what_is_of_another_commit_but_the_same_source_is(tmp_path) -> None:
    path = tmp_path / "k.json"
    opened(path).run([task("a")])
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"environment": content["environment"] | {"commit": "?"}}))
    assert names(opened(path, resume=True).report) == ["a"]


def test_ctrl_c_keeps_what_there_is(tmp_path) -> None:
    path = tmp_path / "k.json"
    tasks = [task("a"), task("b", row(), then=interrupt), task("c")]
    report = opened(path).run(tasks)
    assert report.interrupted
    assert Report.load(path) == report
    assert [(c.name, c.complete) for c in report.comparisons] == [("a", True), ("b", False)]
    assert len(report.comparisons[1].timed) == 1


def test_what_was_cut_off_comes_after_what_was_never_begun(tmp_path) -> None:
    path, order = tmp_path / "k.json", list[str]()
    opened(path).run([task("a", row(), row("slow", "late")), task("b", then=interrupt)])
    tasks = [task(name, then=partial(order.append, name)) for name in "abc"]
    report = opened(path, resume=True).run(tasks)
    assert order == ["c", "a", "b"]
    assert all(comparison.complete for comparison in report.comparisons)


def test_a_second_try_that_finds_less_changes_nothing(tmp_path) -> None:
    path = tmp_path / "k.json"
    opened(path).run([task("a", row("x"), row("y"), row("z", "late"))])
    (kept,) = opened(path, resume=True).run([task("a", row("x"), row("y", "late"))]).comparisons
    assert [r.provider for r in kept.timed] == ["x", "y"]
    (kept,) = opened(path, resume=True).run([task("a", then=interrupt)]).comparisons
    assert [r.provider for r in kept.timed] == ["x", "y"]


def test_what_cannot_be_set_up_is_a_failure_and_the_rest_is_measured(tmp_path, capsys) -> None:
    def missing() -> None:
        raise ImportError("No module named 'sklearn'\nand more")

    path = tmp_path / "k.json"
    report = opened(path).run([task("a", row("x"), then=missing), task("b")])
    assert report.failed
    assert report.failures == ["a: ImportError: No module named 'sklearn'"]
    assert report.failures[0] in capsys.readouterr().err
    assert [(c.name, c.complete) for c in report.comparisons] == [("a", False), ("b", True)]
    assert Report.load(path) == report
    assert not opened(path, resume=True).run([task("a")]).failed  # the next run tries again


def test_after_the_deadline_nothing_is_begun(tmp_path, capsys) -> None:
    session = opened(tmp_path / "k.json", settings=replace(SETTINGS, minutes=0.0))
    assert names(session.run([task("a")])) == []
    assert "out of time: 1 of 1" in capsys.readouterr().err


def test_nor_is_what_would_take_longer_than_is_left(tmp_path) -> None:
    session = opened(tmp_path / "k.json")
    session.deadline = time.monotonic() + 1.0

    def slow() -> None:
        time.sleep(0.6)

    assert names(session.run([task("a", then=slow), task("b")])) == ["a"]


def test_the_file_is_written_inside_a_comparison_too(tmp_path, monkeypatch) -> None:
    path = tmp_path / "k.json"
    session = opened(path)
    monkeypatch.setattr("vertebra.bench.session._SAVE_EVERY_S", 0.0)

    def look() -> None:
        session.tick("next")
        assert len(Report.load(path).comparisons[0].rows) == 1

    session.run([task("a", then=look)])


def test_settings_are_chosen_for_the_machine() -> None:
    assert Settings.choose(device="cpu").batches == (4,)
    assert Settings.choose(device="cpu", sweep="batch", batches=[6]).batches == (1, 2, 4, 6)
    assert Settings.choose(device="cpu", tiny=True).image_size == 64
    assert Settings.choose(device="cpu").minutes == math.inf
