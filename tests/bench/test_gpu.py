"""`make gpu` on a CPU: the stages run, write, and take up where they stopped."""

import sys
from pathlib import Path

import pytest
import torch

from vertebra.bench import gpu, kernels
from vertebra.bench.results import Report
from vertebra.testing.cases import OPS

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    options = ["--device", "cpu", "--tiny", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    return gpu.main()


def test_tiny_cases_cover_every_op_in_both_layouts() -> None:
    covered = {(case.op, case.layout) for case in kernels.bench_cases(tiny=True)}
    assert covered == {(op, layout) for op in OPS for layout in ("nchw", "nhwc")}


@pytest.mark.slow
def test_kernels_are_checked_and_timed_both_ways(monkeypatch, tmp_path) -> None:
    (case, *_) = kernels.bench_cases(tiny=True)
    monkeypatch.setattr(kernels, "bench_cases", lambda _: [case])
    assert run(monkeypatch, tmp_path, "--stage", "kernels") == 0
    report = Report.load(tmp_path / "gpu-kernels.json")
    assert [c.facts["direction"] for c in report.comparisons] == ["forward", "backward"]
    for comparison in report.comparisons:
        assert [r.provider for r in comparison.timed] == ["eager", "compile", "vertebra"]
        assert comparison.work["bytes"] > 0
        assert comparison.facts["copy_bytes_per_s"] > 0
    forward, backward = (set(c.rows[0].errors) for c in report.comparisons)
    assert forward == {"y"}
    assert backward == {"dx", "dweight", "dbias", "dresidual"}


@pytest.mark.parity
@pytest.mark.parametrize("stage", ["models", "train"])
def test_a_stage_takes_up_where_it_stopped(monkeypatch, tmp_path, stage, capsys) -> None:
    assert run(monkeypatch, tmp_path, "--stage", stage) == 0
    first = Report.load(tmp_path / f"gpu-{stage}.json")
    assert len(first.comparisons) == 1
    assert run(monkeypatch, tmp_path, "--stage", stage) == 0
    assert "1 comparisons are there already" in capsys.readouterr().out
    assert Report.load(tmp_path / f"gpu-{stage}.json") == first


@pytest.mark.parity
def test_another_machines_results_are_not_continued(monkeypatch, tmp_path) -> None:
    assert run(monkeypatch, tmp_path, "--stage", "models") == 0
    path = tmp_path / "gpu-models.json"
    other = Report.load(path)
    other.environment["device"] = "another"  # a changed commit alone would not matter
    other.comparisons *= 2
    other.save(path)
    assert run(monkeypatch, tmp_path, "--stage", "models") == 0
    assert len(Report.load(path).comparisons) == 1


def test_a_stage_without_time_begins_nothing(monkeypatch, tmp_path, capsys) -> None:
    assert run(monkeypatch, tmp_path, "--stage", "models", "--minutes", "0") == 0
    assert "out of time" in capsys.readouterr().out
    assert not (tmp_path / "gpu-models.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_user_is_told_what_to_try(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--tiny" in capsys.readouterr().err
