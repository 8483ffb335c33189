"""A settled CPU: no more threads than were allowed, no pages that come and go."""

import subprocess
import sys

import pytest
import torch

from vertebra.bench import cpu

ONE_CALL_S_PAGES = """
import resource, torch
from vertebra.bench import cpu
if {settled}:
    cpu.settle()
def call():  # three maps of 4 MiB, at the end of the heap or mapped on their own
    torch.ones(1 << 20) + torch.ones(1 << 20)
for _ in range(3):
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    call()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5)
"""


def test_threads_are_settled_within_what_was_allowed(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "_THREADS", 2)
    torch.set_num_threads(7)
    cpu.settle()
    assert torch.get_num_threads() in (1, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_settled_calls_need_no_new_pages() -> None:
    def pages(settled: bool) -> float:
        # the C library's own defaults: a threshold given by the environment stops moving
        run = [sys.executable, "-c", ONE_CALL_S_PAGES.format(settled=settled)]
        environment = {"MALLOC_MMAP_THRESHOLD_": "131072", "TRITON_INTERPRET": "0"}
        return float(subprocess.check_output(run, env=environment, text=True))

    assert pages(settled=False) > 1000
    assert pages(settled=True) < 10
