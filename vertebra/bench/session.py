"""A run: tasks one after the other, what they find written down as they go, until time or Ctrl-C.

The JSON is written after every comparison, and now and then inside one, so that whatever ends the
run leaves what there is. A run of the same source, on the same kind of machine, with the same
settings can take up an earlier one.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Column

from . import ceilings, cpu, environment, outputs
from .results import Comparison, Report, plain
from .runner import Limits
from .settings import Settings

_SAVE_EVERY_S = 5.0


@dataclass(frozen=True)
class Task:
    """Some comparisons that are made together: their names, what makes them, its steps."""

    names: tuple[str, ...]
    make: Callable[[Session], None]
    steps: int


@dataclass
class Session:
    """A run in progress.

    Attributes:
        report: what it found so far.
        path: where that is kept; None for nowhere.
        deadline: `time.monotonic()` after which nothing is begun.
        log: where progress is shown.
    """

    report: Report
    path: Path | None = None
    deadline: float = math.inf
    log: Console = field(default_factory=lambda: Console(stderr=True))
    _progress: _Bar = field(init=False)
    _saved_at: float = 0.0

    def __post_init__(self) -> None:
        self._progress = _Bar(self.log)

    @classmethod
    def open(
        cls, kind: str, settings: Settings, path: Path | None = None, *, resume: bool = False
    ) -> Session:
        """Begin a run, or with `resume` take up that in `path`, if it may stand beside this one.

        Raises:
            ValueError: `path` cannot be written, or holds something else than such a run.
        """
        outputs.check(path)
        device = torch.device(settings.device)
        # what was asked for may change from run to run, how it is measured may not
        how = plain(asdict(replace(settings, match="", minutes=0.0)))
        session = cls(
            Report(kind, environment.describe(device), how),
            path,
            deadline=time.monotonic() + 60 * settings.minutes,
        )
        if resume and path is not None and path.exists():
            session._take_up(Report.load(path))
        return session

    def _take_up(self, earlier: Report) -> None:
        own = self.report
        if earlier.kind != own.kind:
            raise ValueError(
                f"{self.path} holds a run of {earlier.kind!r}, which one of {own.kind!r} does not "
                "go on from; name another file, or leave out --resume to replace it"
            )
        same = environment.same(earlier.environment, plain(own.environment))
        if same and earlier.settings == own.settings:
            own.comparisons, own.ceilings = earlier.comparisons, earlier.ceilings
            done = sum(comparison.complete for comparison in own.comparisons)
            self.say(f"{done} comparisons are there already")
        else:
            self.say(f"{self.path} is of another source, machine or setting: beginning anew")

    def run(self, tasks: Sequence[Task]) -> Report:
        """Carry out the tasks that are not done yet, those that were cut off last."""
        complete = {c.name for c in self.report.comparisons if c.complete}
        begun = {c.name for c in self.report.comparisons}
        todo = [task for task in tasks if not complete.issuperset(task.names)]
        todo.sort(key=lambda task: not begun.isdisjoint(task.names))
        try:
            with self._progress:
                self._progress.restart(sum(task.steps for task in todo))
                begin = time.monotonic()
                for i, task in enumerate(todo):
                    now = time.monotonic()
                    mean = (now - begin) / max(
                        i, 1
                    )  # of the tasks so far: another may take as long
                    if now + mean > self.deadline:
                        self.say(f"out of time: {len(todo) - i} of {len(todo)} are left for later")
                        break
                    if self.report.ceilings is None:
                        self._measure_ceilings()
                    self._progress.begin(task, f"{i + 1}/{len(todo)} {task.names[0]}")
                    self._carry_out(task)
        except KeyboardInterrupt:
            self.report.interrupted = True
            self.say("interrupted: this is what there is")
        self.save()
        return self.report

    def _measure_ceilings(self) -> None:
        settings = self.report.settings
        device = torch.device(settings["device"])
        if device.type == "cpu":
            cpu.settle()
        self.report.ceilings = ceilings.measure(
            device,
            (settings["dtype"],),
            tiny=settings["tiny"],
            say=self._progress.describe,
        )

    def _carry_out(self, task: Task) -> None:
        """Make the comparisons of a task; where an earlier run had timed more, keep that one."""
        earlier = {c.name: c for c in self.report.comparisons if c.name in task.names}
        try:
            task.make(self)
        except Exception as error:  # of the setting up: what a provider raises is in its row
            reason = f"{task.names[0]}: {type(error).__name__}: {error}".partition("\n")[0]
            self.report.failures.append(reason)
            self.say(reason)
        finally:
            for comparison in list(self.report.comparisons):
                kept = earlier.get(comparison.name, comparison)
                if len(comparison.timed) < len(kept.timed):
                    self.begin(kept)
            self.save()

    def begin(self, comparison: Comparison) -> Comparison:
        """Put a comparison, which is filled in later, into the report in place of its namesake."""
        others = [c for c in self.report.comparisons if c.name != comparison.name]
        self.report.comparisons = [*others, comparison]
        return comparison

    def limits(self, first_answer_s: float) -> Limits:
        """Return how long a comparison may take."""
        return Limits(self.deadline, first_answer_s)

    def tick(self, text: str) -> None:
        """Show what comes next; write down what there is now and then."""
        self._progress.step(text)
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self.save()

    def say(self, text: str) -> None:
        """Print one line beside the progress."""
        self._progress.print(text)

    def save(self) -> None:
        """Write the report."""
        if self.path is not None:
            self.report.save(self.path)
        self._saved_at = time.monotonic()


class _Bar:
    """Progress: a bar on a terminal, a line for each task elsewhere."""

    def __init__(self, console: Console) -> None:
        # of the words goes what does not fit
        words = TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1))
        columns: list[Any] = [SpinnerColumn(), words, BarColumn(20), MofNCompleteColumn()]
        self._console = console
        self._bar = Progress(
            *columns,
            Elapsed(),
            console=console,
            transient=True,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._done = self._end = 0
        self._title = ""
        self._total = 0

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def restart(self, total: int) -> None:
        """Begin a run of so many steps."""
        self._done = self._end = 0
        self._total = total

    def begin(self, task: Task, title: str) -> None:
        """Show that a task begins; the one before it is done, in however many steps."""
        self._done, self._end, self._title = self._end, self._end + task.steps, title
        if not self._console.is_terminal:
            self.print(title)
        self.describe("")

    def step(self, text: str) -> None:
        """Show the next step of a task."""
        self.describe(text)
        self._done = min(self._done + 1, self._end)

    def describe(self, text: str) -> None:
        """Show what is going on."""
        title = ": ".join(filter(None, (self._title, text)))
        self._bar.update(
            self._task, completed=self._done, total=self._total or None, description=title
        )

    def print(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, highlight=False)
        if not self._console.is_terminal:
            sys.stderr.flush()
