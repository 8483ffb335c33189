"""Results survive JSON, and speed is compared within a round."""

import json
import math

import pytest

from vertebra.bench.ceilings import Ceilings
from vertebra.bench.results import Comparison, Report, Row, quartiles


def row(provider: str, samples: list[float], peer: bool = True) -> Row:
    return Row(provider, peer, errors={"logits": 1e-6}, allowed={"logits": 2e-6}, top1=1.0,
               calls_per_sample=3, samples_ms=samples, first_call_s=0.5)  # fmt: skip


def report() -> Report:
    wrong = Row("off", False, "WRONG", "logits: error", errors={"logits": math.inf})
    rows = [row("a", [2.0, 8.0, 2.0]), row("b", [4.0, 4.0, 4.0]), wrong]
    comparison = Comparison("resnet18", rows, {"images": 4}, {"mode": "forward"})
    found = Report("main", {"torch": "2.13", "threads": 2}, {"batch": 4}, [comparison], ["a note"])
    found.ceilings = Ceilings(1e9, {"fp32": 1e12}, 1e12)
    return found


def test_a_report_survives_json(tmp_path) -> None:
    saved = report()
    path = tmp_path / "deep" / "main.json"
    saved.save(path)
    assert Report.load(path) == saved
    assert sorted(p.name for p in path.parent.iterdir()) == ["main.json"]


def test_the_file_is_json_without_extensions(tmp_path) -> None:
    report().save(tmp_path / "main.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "main.json").read_text(), parse_constant=refuse)
    assert content["schema"] == 1


def test_another_schema_is_refused(tmp_path) -> None:
    path = tmp_path / "main.json"
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 1"):
        Report.load(path)


@pytest.mark.parametrize(
    "text", ["words", "[1]", "{}", '{"schema": 1}', '{"schema": 1, "comparisons": [{"rows": [1]}]}']
)
def test_what_is_no_report_is_refused(text: str, tmp_path) -> None:
    path = tmp_path / "main.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"main\.json must hold what a benchmark found"):
        Report.load(path)


def test_speedup_is_over_the_fastest_peer_of_the_same_round() -> None:
    ours = row("ours", [1.0, 4.0, 4.0], peer=False)
    comparison = Comparison("c", [*report().comparisons[0].rows, ours])
    assert comparison.speedups(ours) == [2.0, 1.0, 0.5]
    assert comparison.best(peer=True) is comparison.rows[0]
    assert comparison.best(peer=False) is ours


def test_without_peers_there_is_no_speedup() -> None:
    ours = row("ours", [1.0], peer=False)
    comparison = Comparison("c", [ours])
    assert comparison.speedups(ours) == []
    assert comparison.best(peer=True) is None


def test_a_wrong_row_of_ours_fails_the_report_and_no_peers_does() -> None:
    assert report().failed
    peers = [Row("timm", True, "absent", "timm is not installed"), Row("max", True, "WRONG")]
    assert not Report("main", {}, {}, [Comparison("c", peers)]).failed
    assert Report("main", {}, {}, failures=["resnet18: no sklearn"]).failed


def test_a_floor_is_the_work_at_the_ceilings_or_what_somebody_knows_better() -> None:
    comparison = Comparison("c", [], {"bytes": 4e6}, {"dtype": "fp32"})
    assert comparison.floor_ms(report().ceilings) == 4.0
    assert comparison.floor_ms(None) is None
    comparison.facts["floor_ms"] = 5.0
    assert comparison.floor_ms(report().ceilings) == comparison.floor_ms(None) == 5.0
    assert Comparison("c", [], {"images": 4}, {"dtype": "fp32"}).floor_ms(report().ceilings) is None


def test_only_a_comparison_that_was_finished_and_lacks_nobody_is_complete() -> None:
    rows = [row("a", [1.0]), Row("b", True, "slow")]
    assert not Comparison("c", rows).complete
    assert Comparison("c", rows, finished=True).complete
    assert not Comparison("c", [*rows, Row("c", True, "late")], finished=True).complete


def test_quartiles_of_one_sample_are_the_sample() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
