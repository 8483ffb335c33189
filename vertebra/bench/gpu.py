"""`make gpu`: tests and measurements on a GPU, in stages that each end within their minutes.

Runs from the source tree with the machine's own torch and triton. A stage writes its JSON after
every comparison, and takes up an earlier run of the same source on the same kind of machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from . import environment, kernels, main_job, report
from .results import Comparison, Report
from .runner import Clock
from .workload import VARIANTS, Mode

RESULTS = Path("bench/results")
MODELS = ("resnet18", "resnet50", "resnext50_32x4d")


@dataclass(frozen=True)
class Session:
    """Where and how to measure; `tiny` is for trying the stages out on a CPU."""

    device: torch.device
    tiny: bool
    minutes: float
    match: str
    out: Path
    console: Console

    @property
    def rounds(self) -> int:
        """Samples per provider."""
        return 2 if self.tiny else 10

    def deadline(self) -> float:
        """Return when a stage that begins now has to begin nothing more."""
        return time.monotonic() + 60 * self.minutes

    def path(self, stage: str) -> Path:
        """Return where a stage keeps its results."""
        return self.out / f"gpu-{stage}.json"

    def resume(self, stage: str) -> Report:
        """Return the unfinished report of an equal run, or an empty one."""
        settings = {"tiny": self.tiny, "rounds": self.rounds}
        found = Report(stage, environment.describe(self.device), settings)
        kept = RESULTS / self.path(stage).name
        path = next((path for path in (self.path(stage), kept) if path.exists()), None)
        if path is not None:
            earlier = Report.load(path)
            same = environment.same(earlier.environment, found.environment)
            if same and earlier.settings == found.settings:
                found.comparisons = [c for c in earlier.comparisons if c.complete]
                self.say(f"{len(found.comparisons)} comparisons are there already")
        return found

    def add(self, found: Report, comparisons: list[Comparison]) -> None:
        """Write down what was measured."""
        found.comparisons += comparisons
        found.save(self.path(found.kind))

    def say(self, text: str) -> None:
        """Print one line of progress."""
        self.console.print(text, markup=False, highlight=False)


def test(session: Session) -> bool:
    """Run the tests; the interrupt at the end of the time lets pytest still write its report."""
    junit = session.out / "gpu-test.xml"
    tests = "tests/kernels/test_dispatch.py" if session.tiny else "tests"
    command = [sys.executable, "-m", "pytest", tests, "-q", "-m", "not parity and not aot"]
    if find_spec("xdist") and not session.tiny:  # compiling takes the time: use the cores
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"]
    with subprocess.Popen([*command, f"--junitxml={junit}"]) as process:
        try:
            return process.wait(60 * session.minutes) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            return False


def measure_kernels(session: Session) -> bool:
    """Time every op on every bench case."""
    found, deadline = session.resume("kernels"), session.deadline()
    clock = Clock(session.device, queued=True)
    done = {comparison.name for comparison in found.comparisons}
    bandwidth = kernels.copy_bandwidth(clock, 2**24 if session.tiny else 2**30)
    session.say(f"a copy moves {bandwidth / 1e9:,.0f} GB/s")
    for case in kernels.bench_cases(session.tiny):
        names = {f"{case.id} {direction}" for direction in kernels.DIRECTIONS}
        if session.match not in case.id or names <= done:
            continue
        if time.monotonic() > deadline:
            session.say("out of time: run again for the rest")
            break
        session.say(case.id)
        compared = kernels.compare(case, clock, session.rounds, bandwidth, deadline=deadline)
        session.add(found, compared)
    report.show_kernels(found, session.console)
    return not found.failed


def measure_models(session: Session) -> bool:
    """Time inference."""
    return _compare_models(session, "models", "forward")


def measure_training(session: Session) -> bool:
    """Time forward, backward and optimizer step, and weigh them."""
    return _compare_models(session, "train", "sgd")


def _compare_models(session: Session, stage: str, mode: Mode) -> bool:
    found, deadline = session.resume(stage), session.deadline()
    done = {comparison.facts["model"] for comparison in found.comparisons}
    for model in MODELS[:1] if session.tiny else MODELS:
        if session.match not in model or model in done:
            continue
        if time.monotonic() > deadline:
            session.say("out of time: run again for the rest")
            break
        settings = main_job.Settings.choose(model, device=str(session.device))
        settings = replace(settings, rounds=session.rounds)
        if session.tiny:
            eager = [name for name, variant in VARIANTS.items() if variant.compile is None]
            settings = replace(settings, batch=2, image_size=64, providers=eager)
        with tempfile.TemporaryDirectory() as folder:
            workload = main_job.create(settings, Path(folder))
            compared = main_job.compare(workload, settings, mode, deadline, session.say)
        session.add(found, [compared])
    report.show(found, session.console)
    report.plot(found, session.path(stage).with_suffix(".png"))
    return not found.failed


STAGES: dict[str, Callable[[Session], bool]] = {
    "test": test,
    "kernels": measure_kernels,
    "models": measure_models,
    "train": measure_training,
}


def main() -> int:
    """Run the stages asked for; return 1 if a test failed or an answer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m vertebra.bench.gpu", description=__doc__)
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all, in order")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the stages out")
    parser.add_argument("--minutes", type=float, default=8.0, help="per stage")
    parser.add_argument("--match", default="", help="only cases and models whose name has this")
    out = Path(os.environ.get("OUT", RESULTS))
    parser.add_argument("--out", type=Path, default=out, help=f"default: $OUT, else {RESULTS}")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; try: --device cpu --tiny")
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    session = Session(device, options.tiny, options.minutes, options.match, options.out, console)
    failed: list[str] = []
    for stage in options.stage or STAGES:
        console.rule(stage)
        if not STAGES[stage](session):
            failed.append(stage)
    session.say(f"failed: {', '.join(failed)}" if failed else "all stages passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
