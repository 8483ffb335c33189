"""`make gpu`: tests and measurements on a GPU, in stages that each end within their minutes.

Runs from the source tree with the machine's own torch and triton. A stage is a command of its own:
it begins nothing new when 85 % of its time are over and writes its JSON as it goes. Should it not
end, it is interrupted, then killed; what it has written stays, and the next run of the same source
on the same kind of machine goes on from there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

RESULTS = Path("bench/results")
TUNED = ("resnet50", "regnety_040", "convnext_tiny")
INTERRUPTED = 130

# of a stage's time: when it begins nothing more, when it is interrupted, when it is killed
_SOFT, _INTERRUPT, _KILL = 0.85, 0.93, 0.985
_GRACE_S = 20.0  # after Ctrl-C


@dataclass(frozen=True)
class Options:
    """Where and how to measure; `tiny` is for trying the stages out on a CPU."""

    device: str
    tiny: bool
    minutes: float
    match: str
    out: Path

    def path(self, stage: str, suffix: str = ".json") -> Path:
        """Return where a stage keeps its results."""
        return self.out / f"gpu-{stage}{suffix}"


Stage = Callable[[Options], list[str]]
"""From the options to the command that a stage is."""


def _tests(options: Options) -> list[str]:
    """Return a run of the tests; interrupted, pytest still writes its report."""
    tests = "tests/kernels/test_dispatch.py" if options.tiny else "tests"
    command = [sys.executable, "-m", "pytest", tests, "-q", "-m", "not parity and not aot"]
    if find_spec("xdist") and not options.tiny:  # compiling takes the time: use the cores
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"]
    return [*command, f"--junitxml={options.path('test', '.xml')}"]


def measuring(*command: str, files: Sequence[str] = ("json", "csv", "plot")) -> Stage:
    """Return the stage that is `vertebra COMMAND`, which has to have these options.

    Args:
        command: with its arguments; the stage has its name.
        files: the options that name a file to be written.
    """
    name = command[1] if command[0] == "bench" else command[0]

    def stage(options: Options) -> list[str]:
        arguments = [sys.executable, "-m", "vertebra", *command, "--resume"]
        arguments += ["--device", options.device, "--minutes", f"{options.minutes * _SOFT:.3f}"]
        for option in files:
            suffix = ".png" if option == "plot" else f".{option}"
            arguments += [f"--{option}", str(options.path(name, suffix))]
        if options.match:
            arguments += ["--filter", options.match]
        return [*arguments, *(["--tiny"] if options.tiny else [])]

    return stage


STAGES: dict[str, Stage] = {
    "test": _tests,
    "kernels": measuring("bench", "kernels"),
    "models": measuring("bench", "models"),
    "train": measuring("bench", "train"),
    "compile": measuring("bench", "compile"),
    "tune": measuring("tune", *TUNED, "--batch", "256,1", files=("json",)),
}


def run(stage: str, options: Options) -> int:
    """Run a stage within its time and return its exit code: 130 if it had to be interrupted."""
    kept = RESULTS / options.path(stage).name
    if kept.exists() and not options.path(stage).exists():
        shutil.copy(kept, options.path(stage))
    begin, minute = time.monotonic(), 60 * options.minutes
    # a group of its own, so that whatever it has started can be ended with it
    process = subprocess.Popen(STAGES[stage](options), start_new_session=True)
    try:
        for share, number in ((_INTERRUPT, signal.SIGINT), (_KILL, signal.SIGKILL)):
            try:
                return process.wait(max(0.0, begin + share * minute - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"{stage}: its time is over, {number.name}", flush=True)
                process.send_signal(number)
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        raise
    finally:
        _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    """Kill what is left of a stage's process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _options() -> tuple[list[str], Options]:
    parser = argparse.ArgumentParser(prog="python -m vertebra.bench.gpu", description=__doc__)
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all, in order")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the stages out")
    parser.add_argument("--minutes", type=float, default=8.0, help="per stage")
    parser.add_argument("--match", default="", help="only cases and models whose name has this")
    out = Path(os.environ.get("OUT", RESULTS))
    parser.add_argument("--out", type=Path, default=out, help=f"default: $OUT, else {RESULTS}")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; try: --device cpu --tiny")
    if missing := [name for name in ("rich", "typer") if find_spec(name) is None]:
        parser.error(f"{' and '.join(missing)} not found; pip install {' '.join(missing)}")
    options = Options(given.device, given.tiny, given.minutes, given.match, given.out)
    return given.stage or list(STAGES), options


def main() -> int:
    """Run the stages asked for; return 1 if a test failed or an answer was wrong."""
    stages, options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the stage ends too
    failed: list[str] = []
    unfinished: list[str] = []
    try:
        for stage in stages:
            print(f"--- {stage}", flush=True)
            code = run(stage, options)
            if code in (INTERRUPTED, -signal.SIGKILL):
                unfinished.append(stage)
            elif code != 0:
                failed.append(stage)
    except KeyboardInterrupt:
        return INTERRUPTED
    if unfinished:
        print(f"cut off, run again for the rest: {', '.join(unfinished)}")
    print(f"failed: {', '.join(failed)}" if failed else "all stages passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
