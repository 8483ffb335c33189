"""Providers in processes of their own: started, bounded in time, and what they answered judged."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...kernels import current_backend
from ..oracle import Answers
from ..results import Row
from ..runner import Limits
from ..workload import CompileMode
from .child import BOOTSTRAP, Account, Spec
from .plan import Direction, Plan, Policy, Variant, Visit
from .subjects import Subject

_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Job:
    """A provider, and the shapes that it is called at in one process, beginning with its start.

    Attributes:
        subject: what is called.
        variant: whose it is, compiled or not.
        direction: forward, or both.
        mode: Inductor's.
        policy: what the compiler knows of shapes.
        visits: the shapes.
        again: calls after the first at each.
    """

    subject: Subject
    variant: Variant
    direction: Direction
    mode: CompileMode
    policy: Policy
    visits: Sequence[Visit]
    again: int

    def write(self, folder: Path) -> None:
        """Write down what the process needs."""
        plan = self.subject.plan
        module, gradients = self.subject.build(self.variant)
        torch.save(module, folder / "module.pt")
        for i, visit in enumerate(self.visits):
            torch.save(tuple(self.subject.batch(visit)), folder / f"batch-{i}.pt")
        own = self.variant.source == "vertebra"
        spec = Spec(
            source=self.variant.source,
            library="vertebra" if own else self.subject.work.library,
            gradients=gradients,
            visits=len(self.visits),
            training=self.direction == "training",
            wants_dx=bool(self.subject.path),
            mode=self.mode if self.variant.compiled else None,
            policy=self.policy,
            backend=plan.backend,
            again=self.again,
            device=plan.device,
            dtype=plan.dtype,
            channels_last=plan.channels_last,
            threads=torch.get_num_threads(),
        )
        (folder / "spec.json").write_text(json.dumps(asdict(spec)))

    def run(self, row: Row, cache: Path, limits: Limits) -> Account | None:
        """Run the process; return its account, or None where `row` says why there is none.

        Args:
            row: of the provider: gets its status, and errors of the worst answer.
            cache: of the compilers.
            limits: how long it may take, from its start to its end.
        """
        if limits.left_s <= 0:
            row.status, row.detail = "late", "no time was left for it"
            return None
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.write(folder)
            code = _process(folder, cache, min(limits.left_s, limits.first_answer_s))
            account = Account.read(folder)
            if code != 0:
                _say_why(row, code, account, folder, limits)
                return None
            for i, visit in enumerate(self.visits):
                for kept in ("first", "last"):
                    answers: Answers = torch.load(folder / f"{kept}-{i}.pt")
                    if not judge(row, answers, self.subject, visit, self.direction):
                        return None
            return account


def judge(row: Row, answers: Answers, subject: Subject, visit: Visit, direction: Direction) -> bool:
    """Return whether answers are right; `row` keeps the errors that come closest to the budget."""
    verdict = subject.oracle(visit, direction).judge(answers)
    for group, error in verdict.errors.items():
        allowed = verdict.allowed[group]
        if not error * row.allowed.get(group, 0.0) <= row.errors.get(group, 0.0) * allowed:
            row.errors[group], row.allowed[group] = error, allowed
        else:
            row.errors.setdefault(group, error)
            row.allowed.setdefault(group, allowed)
    if verdict.wrong:
        row.status, row.detail = "WRONG", f"{visit}: {verdict.wrong}"
    return not verdict.wrong


def _process(folder: Path, cache: Path, seconds: float) -> int | None:
    """Run a child in `folder` and return its exit code, None if it had to be ended.

    It stays in our process group, so that whatever ends that ends it too; compilers that it has
    started notice that it is gone.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        "VERTEBRA_BACKEND": current_backend(),
        **variables(cache),
    }
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", BOOTSTRAP, str(folder)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            return process.wait(None if math.isinf(seconds) else seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()
            process.wait()


def _say_why(row: Row, code: int | None, account: Account, folder: Path, limits: Limits) -> None:
    """Say in a row why a process has ended without what it was to do."""
    if code is None and limits.left_s > 0:
        row.status = "slow"
        row.detail = f"ended after {limits.first_answer_s:g} s, {account.doing}"
    elif code is None:
        row.status, row.detail = "late", f"the time was over: {account.doing}"
    elif account.error is not None:
        has_room = not (row.peer and "OutOfMemoryError" in account.error)
        row.status, row.detail = "FAILED" if has_room else "memory", account.error
    else:
        lines = (folder / "stderr").read_text().strip().splitlines()
        row.status = "FAILED"
        row.detail = f"exit code {code}, {account.doing}: {''.join(lines[-1:])}"


def variables(cache: Path) -> dict[str, str]:
    """Return the environment that makes compilers keep what they make in `cache`."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}


class Caches:
    """What the last cold starts have compiled, kept for as long as this object is."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vertebra-compile-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def empty(self, subject: Subject, provider: str, direction: Direction, mode: str) -> Path:
        """Return an empty folder in place of what was compiled for the same provider before."""
        path = self._path(subject.name, provider, direction, mode)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    @contextmanager
    def copy(
        self, subject: Subject, provider: str, direction: Direction, mode: str
    ) -> Generator[Path]:
        """Yield a folder that has what a cold start of the same provider has compiled, if any did.

        Of a block without one of its own, the network's.
        """
        names = (subject.name, subject.work.name)
        kept = (self._path(name, provider, direction, mode) for name in names)
        with tempfile.TemporaryDirectory() as folder:
            for path in kept:
                if path.exists():
                    shutil.copytree(path, folder, dirs_exist_ok=True)
                    break
            yield Path(folder)

    def _path(self, *names: Any) -> Path:
        return self.folder / "-".join(names).replace(" ", "-")


def new_row(provider: str, plan: Plan) -> Row:
    """Return the empty row of a provider."""
    return Row(provider, plan.chosen[provider].is_peer)
