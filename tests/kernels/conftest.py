"""Where tests marked `jitted` run: in another process, which compiles kernels.

That process reads lines with a module and the name of a test, and answers each with a line of JSON:
how the test went, and what was printed. Every test has a fork of its own, since importing torch and
Triton takes longer than most tests do.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import ModuleType

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("jitted") is None:
        return None
    stash = pyfuncitem.config.stash
    if _ELSEWHERE not in stash:
        stash[_ELSEWHERE] = Elsewhere()
    stash[_ELSEWHERE].run(pyfuncitem.path.stem, pyfuncitem.name)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if _ELSEWHERE in config.stash:
        config.stash[_ELSEWHERE].close()


class Elsewhere:
    """The other process."""

    def __init__(self) -> None:
        path = [str(Path(__file__).parent), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": ":".join(path),
                "TRITON_INTERPRET": "0",
                "OMP_NUM_THREADS": "1",  # who has one thread may fork
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, module: str, test: str) -> None:
        """Run a test, and its module's `prepare` before it; raise AssertionError if it fails."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        print(module, test, file=process.stdin, flush=True)
        status, printed = json.loads(process.stdout.readline())
        assert status == 0, printed

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


_ELSEWHERE = pytest.StashKey[Elsewhere]()


def serve() -> None:
    """Answer until there is nobody left to."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        module, test = line.split()
        print(json.dumps(forked(importlib.import_module(module), test)), file=answers, flush=True)


def forked(module: ModuleType, test: str) -> tuple[int, str]:
    """Run a test in a fork; return the exit status and what was printed."""
    with tempfile.TemporaryFile("w+") as printed:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for stream in (1, 2):
                    os.dup2(printed.fileno(), stream)
                getattr(module, "prepare", lambda: None)()
                getattr(module, test)()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        printed.seek(0)
        return status, printed.read()


if __name__ == "__main__":
    serve()
