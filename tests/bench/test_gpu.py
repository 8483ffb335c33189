"""`make gpu` on a CPU: the stages run, write, take up where they stopped, and end in time."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from vertebra.bench import gpu
from vertebra.bench.gpu import Options
from vertebra.bench.results import Report

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

ENDLESS = "import time\nwhile True: time.sleep(1)"
STUBBORN = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{ENDLESS}"


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # a stage is a process of its own
    options = ["--device", "cpu", "--tiny", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    return gpu.main()


def python(program: str) -> gpu.Stage:
    return lambda _: [sys.executable, "-c", program]


def options(out: Path, minutes: float) -> Options:
    return Options("cpu", True, minutes, "", out)


@pytest.mark.parity
def test_a_stage_writes_everything_and_takes_up_where_it_stopped(monkeypatch, tmp_path) -> None:
    arguments = ("--stage", "models", "--match", "resnet18")
    assert run(monkeypatch, tmp_path, *arguments) == 0
    first = Report.load(tmp_path / "gpu-models.json")
    assert [c.complete for c in first.comparisons] == [True]
    assert {row.status for c in first.comparisons for row in c.rows} <= {"ok", "absent"}
    assert (tmp_path / "gpu-models.csv").read_text().count("\n") > 1
    assert (tmp_path / "gpu-models.png").stat().st_size > 1000
    assert run(monkeypatch, tmp_path, *arguments) == 0
    assert Report.load(tmp_path / "gpu-models.json").comparisons == first.comparisons


@pytest.mark.parity
@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["kernels", "train", "test"])
def test_every_stage_runs_to_its_end(monkeypatch, tmp_path, stage) -> None:
    assert run(monkeypatch, tmp_path, "--stage", stage) == 0
    suffix = "xml" if stage == "test" else "json"
    assert (tmp_path / f"gpu-{stage}.{suffix}").stat().st_size > 100


def test_a_stage_is_a_command_with_its_deadline(tmp_path) -> None:
    command = gpu.STAGES["kernels"](options(tmp_path, minutes=8))
    assert command[1:5] == ["-m", "vertebra", "bench", "kernels"]
    assert "--resume" in command
    assert float(command[command.index("--minutes") + 1]) < 8


def test_a_stage_that_does_not_end_is_interrupted(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(gpu.STAGES, "models", python(ENDLESS))
    assert gpu.run("models", options(tmp_path, minutes=0.01)) != 0


def test_one_that_will_not_hear_is_killed_and_counts_as_cut_off(
    monkeypatch, tmp_path, capsys
) -> None:
    monkeypatch.setitem(gpu.STAGES, "models", python(STUBBORN))
    assert run(monkeypatch, tmp_path, "--stage", "models", "--minutes", "0.02") == 0
    assert "cut off, run again for the rest: models" in capsys.readouterr().out


def test_nothing_that_a_stage_started_outlives_it(monkeypatch, tmp_path) -> None:
    pid = tmp_path / "pid"
    program = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {ENDLESS!r}])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))"
    )
    monkeypatch.setitem(gpu.STAGES, "models", python(program))
    assert gpu.run("models", options(tmp_path, minutes=1)) == 0
    child = int(pid.read_text())
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    """Return whether a process exists and is no zombie, which only its parent can bury."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_failed_stage_fails_the_run_and_the_next_one_runs(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(gpu.STAGES, "models", python("raise SystemExit(1)"))
    monkeypatch.setitem(gpu.STAGES, "train", python("print('here')"))
    assert run(monkeypatch, tmp_path, "--stage", "models", "--stage", "train") == 1
    assert "failed: models" in capsys.readouterr().out


def test_kept_results_are_where_a_stage_begins(monkeypatch, tmp_path) -> None:
    kept, out = tmp_path / "kept", tmp_path / "out"
    kept.mkdir()
    out.mkdir()
    (kept / "gpu-models.json").write_text("{}")
    monkeypatch.setattr(gpu, "RESULTS", kept)
    monkeypatch.setitem(gpu.STAGES, "models", python(""))
    assert gpu.run("models", options(out, minutes=1)) == 0
    assert (out / "gpu-models.json").read_text() == "{}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_user_is_told_what_to_try(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--tiny" in capsys.readouterr().err
