"""Who wins where: from numbers to words, and the command that prints them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vertebra.bench.compile import charts, tables, tasks
from vertebra.bench.compile.plan import Plan
from vertebra.bench.compile.verdicts import payoffs, tally, verdicts
from vertebra.bench.results import Comparison, Report, Row

testing = pytest.importorskip("typer.testing")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


def comparison(aspect: str, rows: list[Row], mode: str = "default", **more: str) -> Comparison:
    facts = {"model": "net", "block": "", "direction": "forward", "aspect": aspect, "mode": mode}
    facts |= {"policy": "automatic", "dtype": "fp32", "device": "cpu", **more}
    name = f"net inference: {aspect}, {mode}"
    sizes = {"batch": 4, "image_size": 32, "load": 0.5, "threads": 1}
    return Comparison(name, rows, {"images": 4}, {**facts, **sizes}, finished=True)


def report(*comparisons: Comparison) -> Report:
    settings = {"backend": "inductor", "device": "cpu", "starts": 3}
    return Report("compile", {"device": "a CPU", "torch": "2"}, settings, list(comparisons))


def row(name: str, *samples: float, status: Any = "ok", **more: Any) -> Row:
    peer = name in ("eager", "compile")
    return Row(name, peer, status, samples_ms=list(samples), **more)


def start(name: str, *seconds: float, restart: float | None = None) -> Row:
    kept = {
        "imports_s": {"torch": 1.0},
        "device_s": 0.0,
        "build_s": 0.1,
        "compiling_s": {"tracing": 0.5 * seconds[0]} if name.endswith("compile") else {},
        "kernels": 1,
        "library_calls": 2,
        "again_ms": [1.0],
        "host_bytes": 10**9,
        "restart_s": restart,
    }
    facts = {"starts": [kept] * len(seconds)}
    return row(name, *(1e3 * s for s in seconds), facts=facts)


def outcome(found: Report, question: str) -> str:
    return next(v.outcome for v in verdicts(found) if v.question.startswith(question))


@pytest.mark.parametrize(
    ("ours", "expected"),
    [([9.0, 9.1, 9.2], "win"), ([9.0, 9.9, 10.8], "tie"), ([10.4, 10.5, 11.0], "loss")],
)
def test_quartiles_decide(ours, expected) -> None:
    found = report(comparison("steady", [row("eager", 10.0, 10.1, 10.2), row("vertebra", *ours)]))
    assert outcome(found, "steady speed, eager or compiled") == expected


def test_a_round_is_won_against_the_fastest_of_it() -> None:
    peers = [row("eager", 10.0, 12.0, 10.0, 12.0), row("compile", 12.0, 10.0, 12.0, 10.0)]
    found = report(comparison("steady", [*peers, row("vertebra", 10.5, 10.5, 10.5, 10.5)]))
    assert outcome(found, "steady speed, eager or compiled") == "loss"


@pytest.mark.parametrize(("ours", "expected"), [(4.0, "win"), (6.0, "tie"), (25.0, "loss")])
def test_of_single_starts_only_a_factor_of_two_counts(ours, expected) -> None:
    found = report(comparison("starts", [start("compile", 10.0), start("vertebra-compile", ours)]))
    assert outcome(found, "first answer, compiled") == expected


def test_a_loss_is_one_too_where_ours_has_no_answer() -> None:
    rows = [row("eager", 1.0, 1.0, 1.0), row("vertebra", status="WRONG")]
    assert outcome(report(comparison("steady", rows)), "steady speed") == "loss"
    rows = [row("eager", status="FAILED"), row("vertebra", 1.0, 1.0, 1.0)]
    assert outcome(report(comparison("steady", rows)), "steady speed") == "win"
    for unheard in ("absent", "late"):
        rows = [row("eager", status=unheard), row("vertebra", 1.0, 1.0, 1.0)]
        assert verdicts(report(comparison("steady", rows))) == []


@pytest.mark.parametrize(("ours", "expected"), [(0, "win"), (1, "tie"), (2, "loss")])
def test_recompilations_and_breaks_are_counted(ours, expected) -> None:
    for aspect, fact in (("shapes", "recompiled"), ("graphs", "breaks")):
        rows = [row("compile", facts={fact: 1}), row("vertebra-compile", facts={fact: ours})]
        (verdict,) = verdicts(report(comparison(aspect, rows)))
        assert verdict.outcome == expected
        assert f"{ours} to 1" in str(verdict)


@pytest.mark.parametrize(("ours", "expected"), [(900, "win"), (1005, "tie"), (1100, "loss")])
def test_bytes_are_compared(ours, expected) -> None:
    rows = [row("eager", 1.0, 1.0, 1.0), row("vertebra", 1.0, 1.0, 1.0)]
    rows[0].saved_bytes, rows[1].saved_bytes = 1000, ours
    assert outcome(report(comparison("steady", rows)), "saved") == expected


def test_the_best_of_all_modes_meets_the_best_of_all_modes() -> None:
    eager = row("eager", 10.0, 10.0, 10.0)
    plain = comparison("steady", [eager, row("vertebra", 6.0, 6.0, 6.0)])
    rows = [row("eager", 20.0, 20.0, 20.0), row("compile", 8.0, 8.0, 8.0)]
    tuned = comparison("steady", rows, mode="max-autotune")
    (verdict,) = [v for v in verdicts(report(plain, tuned)) if "all modes" in v.question]
    assert (verdict.ours, verdict.peer) == ("vertebra", "compile (max-autotune)")
    assert verdict.outcome == "loss"  # 1.67 times eager to 2.5


def test_compiling_pays_after_the_images_that_earn_it_back() -> None:
    first = [start("eager", 0.01), start("compile", 10.01, restart=1.01)]
    steady = [row("eager", 10.0, 10.0, 10.0), row("compile", 8.0, 8.0, 8.0)]
    (paid,) = payoffs(report(comparison("starts", first), comparison("steady", steady)))
    assert paid.cold == pytest.approx(4 * (1 + 10_000 / 2))
    assert paid.again == pytest.approx(4 * (1 + 1_000 / 2))
    slower = [row("eager", 10.0, 10.0, 10.0), row("compile", 11.0, 9.9, 11.0)]
    (never,) = payoffs(report(comparison("starts", first), comparison("steady", slower)))
    assert never.cold is None
    assert "never pays" in str(never)


def everything() -> Report:
    trace = {"operations": {"forward": 9, "backward": 0}, "opaque": {}}
    seen = {"graphs": 2, "breaks": 1, "reasons": ["a planted break"], "here": trace}
    visit = {"batch": 4, "size": 32, "graphs": 1, "reasons": ["size mismatch"], "first_s": 2.0}
    visits = {"visits": [{**visit, "again_ms": [5.0]}] * 2, "recompiled": 1, "stalled_s": 1.9}
    return report(
        comparison("graphs", [row("compile", facts=seen), row("vertebra-compile", facts=seen)]),
        comparison("starts", [start("eager", 0.1), start("compile", 9.0), start("vertebra", 0.3)]),
        comparison(
            "steady",
            [row("eager", 9.0, 9.0, 9.0), row("compile", 5.0, 5.0, 5.0), row("vertebra", 8, 8, 8)],
        ),
        comparison(
            "shapes",
            [row("compile", facts=visits), row("vertebra-compile", status="WRONG", detail="off")],
        ),
    )


@pytest.mark.parametrize("aspect", ["graphs", "starts", "steady", "shapes"])
def test_what_ctrl_c_cut_off_says_so(aspect: str, capsys) -> None:
    from rich.console import Console

    tables.show(report(comparison(aspect, [row("compile")])), Console(width=200))
    assert ("not timed" if aspect == "steady" else "cut off") in capsys.readouterr().out


def test_all_is_shown_and_written(tmp_path, capsys) -> None:
    from rich.console import Console

    found = everything()
    found.notes = list(tasks.notes(found))
    tables.show(found, Console(width=200))
    shown = capsys.readouterr().out
    for text in (
        *("a planted break", "size mismatch", "WRONG, off", "2 s *", "first answer, eager"),
        *("a loss: net inference, steady speed", "compile (default) pays after", "A CPU of"),
    ):
        assert text in shown
    tables.write(found, tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(c.rows) for c in found.comparisons)
    charts.draw(found, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_every_win_and_loss_is_named() -> None:
    found = verdicts(everything())
    first, *rest = tally(found)
    assert first == "Of 5 questions ours win 0, tie in 1 and lose 4."
    assert [text.partition(":")[0] for text in rest] == ["a loss"] * 4


# ------------------------------------------------------------------------------------ the command


def invoke(*arguments: str) -> Any:
    from vertebra.__main__ import app

    return testing.CliRunner().invoke(app, ["bench", "compile", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5O"], "no model is called 'resnet5O'; did you mean resnet50"),
        (["--mode", "max-autotune", "--device", "cpu"], "modes here are default, freezing"),
        (["--batch", "1,8"], "one batch"),
        (["--starts", "0"], "starts must be at least 1"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, message) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output


@pytest.mark.parametrize(("stopped", "code"), [(True, 130), (False, 0)])
def test_ctrl_c_leaves_what_there_is(tmp_path, monkeypatch, stopped, code) -> None:
    def ask(*_: Any) -> None:
        if stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(tasks.graphs, "compare", ask)
    path = tmp_path / "c.json"
    options = ["--quick", "--device", "cpu", "--aspect", "graphs", "--no-blocks", "--tiny"]
    done = invoke("convnext_atto", *options, "--json", str(path))
    assert done.exit_code == code, done.output
    found = Report.load(path)
    assert found.interrupted == stopped
    assert len(found.comparisons) == 1
    assert found.notes


def test_networks_come_before_blocks_and_defaults_before_modes() -> None:
    plan = Plan.of(device="cpu", image_size=32)
    names = [task.names[0] for task in tasks.tasks(["resnet18", "convnext_atto"], plan)]
    assert len(names) == len(set(names))

    def first(of: Callable[[str], bool]) -> int:
        return next(i for i, name in enumerate(names) if of(name))

    last_default = max(i for i, n in enumerate(names) if "atto inf" in n and "automatic" in n)
    assert last_default < first(lambda name: "freezing" in name)
    assert first(lambda name: "freezing" in name) < first(lambda name: "layer1" in name)
    assert not any("freezing" in name and "backward" in name for name in names)


@pytest.mark.thorough
def test_inductor_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    options = ["--quick", "--device", "cpu", "--batch", "2", "--image-size", "32", "--no-blocks"]
    done = invoke("resnet18", *options, "--json", str(path), "--plot", str(tmp_path / "c.png"))
    assert done.exit_code == 0, done.output
    found = Report.load(path)
    by_aspect = {c.facts["aspect"]: c for c in found.comparisons}
    assert list(by_aspect) == ["graphs", "starts", "steady", "shapes"]
    assert all(r.status == "ok" for c in found.comparisons for r in c.rows)
    rows = {r.provider: r for r in by_aspect["starts"].rows}
    compiled = rows["vertebra-compile"].facts["starts"][0]
    assert compiled["kernels"] > 0
    assert compiled["compiling_s"]["kernels"] > 0
    assert compiled["restart_s"] < rows["vertebra-compile"].samples_ms[0] / 1e3
    for row in by_aspect["shapes"].rows:
        assert row.facts["recompiled"] == (2 if row.provider.endswith("compile") else 0)
