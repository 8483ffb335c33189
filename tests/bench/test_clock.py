"""The clock: samples of the right size; on a GPU, which is feigned here, by the right method."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vertebra.bench import ceilings, runner
from vertebra.bench.clock import Clock, EventTimer, LeadTimer, Timer, cache_copies
from vertebra.bench.oracle import Oracle
from vertebra.bench.results import Comparison
from vertebra.bench.runner import Provider

GPU = torch.device("cuda", 0)


class Feigned:
    """A GPU that takes 3 ms for what is enqueued between two events, and launches slowly."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lead_ms = 0.0
        self.captures = True

    def event(self, **_: Any) -> Any:
        return SimpleNamespace(
            record=lambda: self.log.append("record"),
            query=lambda: self.lead_ms < 8,  # it overtook the launches
            synchronize=lambda: None,
            elapsed_time=lambda _: 3.0,
        )

    def sleep(self, cycles: int) -> None:
        self.lead_ms = cycles / 2e6
        self.log.append(f"sleep {self.lead_ms:g}")

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.log.append(f"capture on {stream.name}")
        yield
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.log.append(f"enter {stream.name}")
        yield
        self.log.append(f"leave {stream.name}")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Feigned:
    feigned = Feigned()

    def stream(name: str) -> Any:
        def wait_stream(other: Any) -> None:
            feigned.log.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait_stream)

    def graph() -> Any:
        return SimpleNamespace(replay=lambda: feigned.log.append("replay"))

    properties = SimpleNamespace(L2_cache_size=50 << 20, multi_processor_count=2)
    for name, stand_in in {
        "Event": feigned.event,
        "Stream": lambda _: stream("ours"),
        "current_stream": lambda _=None: stream("theirs"),
        "stream": feigned.on,
        "graph": feigned.graph,
        "CUDAGraph": graph,
        "_sleep": feigned.sleep,
        "synchronize": lambda _=None: None,
        "get_device_properties": lambda _=None: properties,
        "empty_cache": lambda: None,
        "memory_reserved": lambda _=None: 1000,
        "memory_allocated": lambda _=None: 100,
        "max_memory_allocated": lambda _=None: 700,
        "reset_peak_memory_stats": lambda _=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return feigned


def step(_: int) -> dict[str, torch.Tensor]:
    return {"y": torch.ones(1)}


def test_a_sample_is_as_many_calls_as_its_time_asks_for() -> None:
    class Slow(Timer):
        def elapsed(self, first: int, count: int) -> float:
            return 4.0 * count

    clock = Clock(torch.device("cpu"), target_ms=20.0)
    slow = Slow(step)
    assert clock.sized(slow).calls == 5
    assert slow.sample(0) == 4.0
    assert Clock(torch.device("cpu"), target_ms=20.0, least=9).sized(slow).calls == 9
    assert Clock(torch.device("cpu"), target_ms=20.0, most=2).sized(slow).calls == 2


def test_models_are_timed_by_events_alone(gpu) -> None:
    timer = Clock(GPU).timer(step, capturable=True)
    assert (type(timer), timer.method) == (EventTimer, "events")
    assert timer.sample(0) == 3.0 / timer.calls
    assert not any(entry.startswith(("sleep", "capture")) for entry in gpu.log)


def test_short_kernels_are_timed_behind_a_lead_longer_than_their_launches(gpu) -> None:
    timer = LeadTimer(step, GPU)
    assert timer.elapsed(0, 3) == 3.0
    assert timer.elapsed(0, 3) == 3.0
    leads = [entry for entry in gpu.log if entry.startswith("sleep")]
    assert leads == ["sleep 2", "sleep 4", "sleep 8", "sleep 8"]  # and keeps what it found


def test_a_lead_does_not_grow_for_ever(gpu, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "sleep", lambda _: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None)
    assert LeadTimer(step, GPU).elapsed(0, 1) == 3.0


def test_what_can_be_captured_is_replayed(gpu) -> None:
    calls: list[int] = []

    def counted(i: int) -> dict[str, torch.Tensor]:
        calls.append(i)
        return {"y": torch.full((1,), float(i))}

    timer = Clock(GPU, short=True, target_ms=3.0, least=4).timer(counted, capturable=True)
    assert timer.method == "graph"
    assert calls[-timer.calls :] == list(range(timer.calls))  # by every input
    before = len(calls)
    assert timer.sample(17) == 3.0 / timer.calls
    assert len(calls) == before
    assert timer.answers()["y"] == timer.calls - 1  # of the last replay
    assert gpu.log.count("replay") == 2
    assert "capture on ours" in gpu.log


def test_what_cannot_be_captured_after_all_has_a_lead(gpu) -> None:
    gpu.captures = False
    timer = Clock(GPU, short=True).timer(step, capturable=True)
    assert timer.method == "lead"


def test_everything_happens_on_one_stream_of_the_clock(gpu) -> None:
    with Clock(GPU, short=True).stream():
        gpu.log.append("work")
    assert gpu.log == [
        "ours waits for theirs",
        "enter ours",
        "work",
        "leave ours",
        "theirs waits for ours",
    ]


def test_inputs_are_rotated_until_they_exceed_the_cache(gpu) -> None:
    assert cache_copies(1 << 30, GPU) == 2
    assert cache_copies(50 << 20, GPU) == 3
    assert cache_copies(10 << 20, GPU) == 11
    assert cache_copies(0, GPU) == 32
    assert cache_copies(1 << 30, torch.device("cpu")) == 2


def test_the_runner_goes_its_way_on_a_gpu(gpu, monkeypatch) -> None:
    oracle = Oracle({"y": torch.ones(1, dtype=torch.float64)}, torch.float32)
    oracle.calibrate({"y": torch.ones(1)})
    providers = [Provider("a", True, lambda: step, capturable=True)]
    providers += [Provider("b", False, lambda: step)]
    comparison = Comparison("c", [])
    runner.measure(comparison, providers, oracle, Clock(GPU, short=True), 3)
    assert [row.method for row in comparison.rows] == ["graph", "lead"]
    assert [row.peak_bytes for row in comparison.rows] == [600, 600]
    assert all(len(row.samples_ms) == 3 for row in comparison.rows)


def test_ceilings_of_a_gpu_are_measured_by_events(gpu, monkeypatch) -> None:
    build = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device: build(*size))
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: torch.zeros(*size))
    monkeypatch.setattr(ceilings, "_multiply_adds", lambda device, tiny: 1.0)
    found = ceilings.measure(GPU, ("bf16",), tiny=True)
    assert list(found.matmul_flops_per_s) == ["fp32", "tf32", "bf16"]
    assert torch.backends.cuda.matmul.fp32_precision == "none"
