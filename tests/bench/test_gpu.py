"""`make gpu` on a CPU: the stages run, write, take up where they stopped, and end in time."""

import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vertebra.bench import gpu
from vertebra.bench.gpu import Options, Stage
from vertebra.bench.results import Report

typer = pytest.importorskip("typer")

HERE = Options("cpu", tiny=True, minutes=8.0, match="", out=Path("out"))


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    options = ["--device", "cpu", "--tiny", "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which is for processes of its own
    return gpu.main()


def python(code: str) -> Stage:
    return lambda _: [sys.executable, "-c", code]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["kernels", pytest.param("models", marks=[pytest.mark.parity, pytest.mark.thorough])]
)
def test_a_stage_takes_up_where_it_stopped(monkeypatch, tmp_path, stage, capfd) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    match = "global_avg_pool" if stage == "kernels" else "convnext"
    assert run(monkeypatch, tmp_path, "--stage", stage, "--match", match) == 0
    path = tmp_path / f"gpu-{stage}.json"
    first = Report.load(path)
    assert all(comparison.complete for comparison in first.comparisons)
    assert first.ceilings is not None
    for suffix in (".csv", ".png"):
        assert path.with_suffix(suffix).stat().st_size > 100
    assert run(monkeypatch, tmp_path, "--stage", stage, "--match", match) == 0
    assert f"{len(first.comparisons)} comparisons are there already" in capfd.readouterr().err
    assert Report.load(path) == first


def test_every_stage_is_a_command_with_the_options_it_is_given() -> None:
    from vertebra.__main__ import app

    root: Any = typer.main.get_command(app)
    for name, stage in gpu.STAGES.items():
        if name == "test":
            continue
        arguments = stage(replace(HERE, match="resnet"))
        _, _, _, *words = arguments
        command = root.commands[words[0]]
        command = command.commands[words[1]] if words[0] == "bench" else command
        known = {option for parameter in command.params for option in parameter.opts}
        given = {argument for argument in arguments if argument.startswith("--")}
        assert given <= known
        assert {"--resume", "--json", "--minutes", "--filter", "--tiny"} <= given
        minutes = float(arguments[arguments.index("--minutes") + 1])
        assert 6 < minutes < gpu._INTERRUPT * 8  # pyright: ignore


def test_results_that_are_kept_are_taken_up(monkeypatch, tmp_path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "gpu-stub.json").write_text("from before")
    monkeypatch.setattr(gpu, "RESULTS", kept)
    monkeypatch.setitem(gpu.STAGES, "stub", python("pass"))
    assert run(monkeypatch, tmp_path / "out", "--stage", "stub") == 0
    assert (tmp_path / "out" / "gpu-stub.json").read_text() == "from before"


def test_a_stage_that_does_not_end_is_interrupted(monkeypatch, tmp_path, capfd) -> None:
    code = "import sys, time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(130)"
    monkeypatch.setitem(gpu.STAGES, "stub", python(code))
    begin = time.monotonic()
    assert run(monkeypatch, tmp_path, "--stage", "stub", "--minutes", "0.05") == 0
    assert time.monotonic() - begin < 30
    assert "cut off, run again for the rest: stub" in capfd.readouterr().out


def test_a_stage_that_will_not_hear_is_killed_with_all_it_started(monkeypatch, tmp_path) -> None:
    pid = tmp_path / "pid"
    code = f"""
import signal, subprocess, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
open({str(pid)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    monkeypatch.setitem(gpu.STAGES, "stub", python(code))
    begin = time.monotonic()
    assert gpu.run("stub", replace(HERE, minutes=0.05, out=tmp_path)) == -signal.SIGKILL
    assert time.monotonic() - begin < 30
    child = int(pid.read_text())
    while time.monotonic() - begin < 30 and _is_running(child):
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_a_stage_that_fails_fails_the_run_and_the_next_one_runs(
    monkeypatch, tmp_path, capfd
) -> None:
    monkeypatch.setattr(
        gpu, "STAGES", {"bad": python("raise SystemExit(1)"), "good": python("print('done')")}
    )
    assert run(monkeypatch, tmp_path) == 1
    out = capfd.readouterr().out
    assert "done" in out
    assert "failed: bad" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_user_is_told_what_to_try(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--tiny" in capsys.readouterr().err
