"""The runner: nothing wrong is timed, and what is right is timed in turn."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vertebra.bench import runner
from vertebra.bench.clock import Clock, Step
from vertebra.bench.oracle import Answers, Oracle
from vertebra.bench.results import Comparison, Row
from vertebra.bench.runner import Limits, Provider, Unavailable, saved_bytes

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


def measure(providers: list[Provider], *rest: Any, **options: Any) -> list[Row]:
    comparison = runner.measure(Comparison("c", []), providers, *rest, **options)
    assert comparison.finished
    return comparison.rows


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
    assert rows[0].refused
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


def test_what_a_call_holds_at_its_peak_is_in_the_row(oracle, clock) -> None:
    def wasteful() -> Answers:
        answer = right()
        more = torch.empty(1000)
        del more
        return answer

    rows = measure([provider("a", right), provider("b", wasteful)], oracle, clock, rounds=1)
    assert [row.peak_bytes for row in rows] == [4 * 12, 4 * (12 + 1000)]


def test_what_raises_is_a_row_and_the_others_are_timed(oracle, clock) -> None:
    def broken() -> Answers:
        raise RuntimeError("no such kernel\nand a long trace")

    def missing() -> Answers:
        raise Unavailable("timm has no resnet0")

    def greedy() -> Answers:
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    providers = [provider("broken", broken), provider("missing", missing)]
    providers += [provider("greedy", greedy), provider("ok", right)]
    rows = measure(providers, oracle, clock, rounds=1)
    assert [row.status for row in rows] == ["FAILED", "absent", "memory", "ok"]
    assert [row.refused for row in rows] == [True, False, False, False]
    assert not any(row.failed for row in rows)  # peers, all of them
    assert [row.detail for row in rows[:2]] == [
        "RuntimeError: no such kernel",
        "timm has no resnet0",
    ]


@pytest.mark.parametrize("error", [ImportError("triton is broken"), torch.OutOfMemoryError("big")])
def test_only_a_peer_may_be_absent_or_too_large(oracle, clock, error) -> None:
    def missing() -> Answers:
        raise error

    (row,) = measure([provider("ours", missing, peer=False)], oracle, clock, rounds=1)
    assert row.status == "FAILED"
    assert row.failed


def test_what_raises_while_it_is_timed_is_left_out_of_later_rounds(oracle, clock) -> None:
    calls: list[int] = []

    def tiring() -> Answers:
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("enough")
        return right()

    rows = measure([provider("tiring", tiring), provider("ok", right)], oracle, clock, rounds=4)
    assert (rows[0].status, rows[0].detail) == ("FAILED", "RuntimeError: enough")
    assert rows[0].samples_ms == []
    assert len(rows[1].samples_ms) == 4


def test_every_round_times_everybody_once_in_changing_order(oracle, clock) -> None:
    order: list[str] = []

    def named(name: str) -> Provider:
        def call() -> Answers:
            order.append(name)
            time.sleep(0.06)  # one call is a sample
            return {"y": TRUTH.float()}

        return provider(name, call)

    measure([named(name) for name in "abc"], oracle, clock, rounds=6)
    timed = order[3 * 5 : -3]  # after check, peak and calibration, before the last check
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 1 + 6
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1


def test_after_the_deadline_nothing_new_is_begun(oracle, clock) -> None:
    class OneProviderLong(Limits):
        left = iter([float("inf")])

        @property
        def left_s(self) -> float:
            return next(self.left, -1.0)

    providers = [provider(name, right) for name in ("first", "second", "third")]
    rows = measure(providers, oracle, clock, rounds=50, limits=OneProviderLong())
    assert [row.status for row in rows] == ["ok", "late", "late"]
    assert len(rows[0].samples_ms) == 3  # what was begun gets as many as a spread needs


@pytest.mark.parametrize(("deadline_s", "status"), [(60.0, "slow"), (0.2, "late")])
def test_nobody_waits_longer_for_a_first_answer_than_was_agreed(
    oracle, clock, deadline_s, status
) -> None:
    def compiling() -> Answers:
        for _ in range(1000):
            try:
                time.sleep(0.05)
            except Exception:  # what compilers do to errors
                continue
        return {"y": TRUTH.float()}

    limits = Limits(time.monotonic() + deadline_s, first_answer_s=0.2)
    begin = time.monotonic()
    providers = [provider("compiling", compiling), provider("ok", right)]
    rows = measure(providers, oracle, clock, rounds=1, limits=limits)
    assert time.monotonic() - begin < 10
    assert [row.status for row in rows] == [status, "ok" if status == "slow" else "late"]
    assert not rows[0].failed


def test_every_check_and_every_round_is_announced(oracle, clock) -> None:
    seen: list[str] = []
    measure([provider("a", right)], oracle, clock, rounds=2, tick=seen.append)
    assert seen == ["a: build and check", "warm-up", "round 1 of 2", "round 2 of 2"]


def test_an_interruption_leaves_whole_rounds(oracle, clock) -> None:
    comparison = Comparison("c", [])

    def stop(text: str) -> None:
        if text == "round 3 of 9":
            raise KeyboardInterrupt

    providers = [provider("a", right), provider("b", right)]
    with pytest.raises(KeyboardInterrupt):
        runner.measure(comparison, providers, oracle, clock, 9, tick=stop)
    assert [len(row.samples_ms) for row in comparison.rows] == [2, 2]
    assert not comparison.finished
    assert not comparison.complete


def test_saved_bytes_are_of_storages_that_were_not_there_before() -> None:
    class Squares:
        x = torch.randn(100, requires_grad=True)
        weight = torch.randn(100, requires_grad=True)
        given = (x, weight)

        def forward(self, _: int) -> torch.Tensor:
            y = (self.x * self.weight).exp()  # saves both factors, which are given, and y
            return (y.view(10, 10).t() * y.view(10, 10)).sum()  # saves y twice, as views

    assert saved_bytes(Squares()) == 400
