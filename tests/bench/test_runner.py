"""The runner: nothing wrong is timed, and what is right is timed in turn."""

import time
from collections.abc import Callable

import pytest
import torch

from vertebra.bench import runner
from vertebra.bench.oracle import Answers, Oracle
from vertebra.bench.runner import Clock, Provider, Step, Unavailable, measure, settle_threads

TRUTH = torch.linspace(-1, 1, 12, dtype=torch.float64)


@pytest.fixture
def oracle() -> Oracle:
    oracle = Oracle({"y": TRUTH}, torch.float32)
    oracle.calibrate({"y": TRUTH.float()})
    return oracle


@pytest.fixture
def clock() -> Clock:
    return Clock(torch.device("cpu"))


def provider(name: str, call: Callable[[], Answers], peer: bool = True) -> Provider:
    def make() -> Step:
        return lambda _: call()

    return Provider(name, peer, make)


def right() -> Answers:
    time.sleep(0.02)  # a sample then is few calls
    return {"y": TRUTH.float()}


@pytest.mark.parametrize(
    "answer", [TRUTH.float() + 1e-4, TRUTH.float() * float("nan"), TRUTH.float()[1:]]
)
def test_a_wrong_answer_is_refused_and_not_timed(oracle, clock, answer) -> None:
    calls: list[int] = []

    def wrong() -> Answers:
        calls.append(1)
        return {"y": answer}

    rows = measure([provider("wrong", wrong), provider("right", right)], oracle, clock, rounds=2)
    assert [row.status for row in rows] == ["WRONG", "ok"]
    assert rows[0].failed
    assert "y: error" in rows[0].detail
    assert rows[0].samples_ms == []
    assert len(rows[1].samples_ms) == 2
    assert len(calls) == 1  # checked, and never called again


def test_an_answer_that_turns_wrong_while_it_is_timed_loses_its_times(oracle, clock) -> None:
    calls: list[int] = []

    def drifting() -> Answers:
        calls.append(1)
        return {"y": right()["y"] + 1e-3 * (len(calls) - 1)}

    (row,) = measure([provider("drifting", drifting)], oracle, clock, rounds=2)
    assert row.status == "WRONG"
    assert row.samples_ms == []


def test_what_raises_is_a_row_and_the_others_are_timed(oracle, clock) -> None:
    def broken() -> Answers:
        raise RuntimeError("no such kernel\nand a long trace")

    def missing() -> Answers:
        raise Unavailable("timm has no resnet0")

    providers = [provider("broken", broken), provider("missing", missing), provider("ok", right)]
    rows = measure(providers, oracle, clock, rounds=1)
    assert [row.status for row in rows] == ["FAILED", "absent", "ok"]
    assert [row.failed for row in rows] == [True, False, False]
    assert rows[0].detail == "RuntimeError: no such kernel"


def test_only_a_peer_may_be_absent(oracle, clock) -> None:
    def missing() -> Answers:
        raise ImportError("triton is broken")

    (row,) = measure([provider("ours", missing, peer=False)], oracle, clock, rounds=1)
    assert row.status == "FAILED"


def test_every_round_times_everybody_once_in_changing_order(oracle, clock) -> None:
    order: list[str] = []

    def named(name: str) -> Provider:
        def call() -> Answers:
            order.append(name)
            time.sleep(0.06)  # one call is a sample
            return {"y": TRUTH.float()}

        return provider(name, call)

    measure([named(name) for name in "abc"], oracle, clock, rounds=6)
    timed = order[3 * 4 : -3]  # after check and calibration, before the last check
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 1 + 6
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1


def test_after_the_deadline_nothing_new_is_begun(oracle, clock) -> None:
    def slow() -> Answers:
        time.sleep(0.05)
        return {"y": TRUTH.float()}

    deadline = time.monotonic() + 0.1
    providers = [provider(name, slow) for name in ("first", "second", "third")]
    rows = measure(providers, oracle, clock, rounds=50, deadline=deadline)
    assert [row.status for row in rows] == ["ok", "late", "late"]
    assert len(rows[0].samples_ms) == 3  # what was begun gets as many as a spread needs


def test_every_check_and_every_round_is_announced(oracle, clock) -> None:
    seen: list[str] = []
    measure([provider("a", right)], oracle, clock, rounds=2, tick=seen.append)
    assert seen == ["a: build and check", "warm-up", "round 1 of 2", "round 2 of 2"]


def test_short_kernels_are_timed_behind_a_lead_longer_than_their_launches(monkeypatch) -> None:
    leads: list[float] = []

    def events(clock: Clock, step: Step, first: int, count: int) -> tuple[float, bool]:
        leads.append(clock.lead_ms)
        return 6.0, clock.lead_ms < 8  # the GPU overtook the launches

    monkeypatch.setattr(Clock, "_events", events)
    clock = Clock(torch.device("cuda"), queued=True)
    assert clock(lambda _: {}, 0, 3) == 2.0
    assert clock(lambda _: {}, 0, 3) == 2.0
    assert leads == [2, 4, 8, 8]  # and keeps what it found


def test_threads_are_settled_within_what_was_allowed(monkeypatch) -> None:
    monkeypatch.setattr(runner, "_THREADS", 2)
    torch.set_num_threads(7)
    settle_threads()
    assert torch.get_num_threads() in (1, 2)
