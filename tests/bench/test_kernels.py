"""Ops beside their peers: what is compared, and that nothing wrong is timed."""

import sys
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vertebra.bench import kernels, modules
from vertebra.bench.kernels import DIRECTIONS, Problem, Way
from vertebra.bench.results import Comparison
from vertebra.bench.runner import Unavailable
from vertebra.bench.session import Session
from vertebra.bench.settings import Settings
from vertebra.testing.cases import OPS, Case, cases

TINY = Settings.choose(device="cpu", tiny=True)
CPU = torch.device("cpu")


def test_tiny_cases_cover_every_op_in_both_layouts() -> None:
    covered = {(case.op, case.layout) for case in kernels.bench_cases((), TINY)}
    assert covered == {(op, layout) for op in OPS for layout in ("nchw", "nhwc")}


def test_a_gpu_takes_every_case_in_its_own_size() -> None:
    settings = replace(TINY, tiny=False, device="cuda", dtype="bf16", batches=())
    assert sorted(c.id for c in kernels.bench_cases((), settings)) == sorted(
        c.id for c in cases("bench")
    )
    of_one = kernels.bench_cases(["squeeze_excite"], replace(settings, match="nchw-bias"))
    assert {(case.op, case.layout) for case in of_one} == {("squeeze_excite", "nchw")}
    first = [case.op for case in kernels.bench_cases((), settings)][: len(OPS)]
    assert set(first) == set(OPS)  # the ops take turns


def test_a_cpu_takes_one_of_each_unless_it_is_asked_for_more() -> None:
    settings = replace(TINY, tiny=False, batches=(1, 3))
    found = kernels.bench_cases(["layer_norm_2d"], settings)
    assert [(case.shape[0], case.layout) for case in found] == [
        (1, "nhwc"),
        (3, "nhwc"),
        (1, "nchw"),
        (3, "nchw"),
    ]
    assert len(kernels.bench_cases((), replace(settings, match="layer_norm"))) > 4
    only = replace(settings, layouts=("nchw",))
    assert {case.layout for case in kernels.bench_cases((), only)} == {"nchw"}


def test_unknown_ops_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer_norm_2d, .*got layer_norm"):
        kernels.tasks(["layer_norm"], TINY)


def compared(case: Case, names: list[str]) -> list[Comparison]:
    session = Session.open("kernels", TINY)
    kernels.compare(case, names, TINY, session)
    return session.report.comparisons


@pytest.mark.slow
def test_a_case_is_checked_and_timed_both_ways() -> None:
    (case, *_) = kernels.bench_cases(["scale_bias_act"], TINY)
    forward, backward = compared(case, ["eager", "compile", "vertebra"])
    assert set(forward.rows[0].errors) == {"y"}
    assert set(backward.rows[0].errors) == {"dx", "dweight", "dbias", "dresidual"}
    for comparison, direction in ((forward, "forward"), (backward, "backward")):
        assert comparison.facts["direction"] == direction
        assert [row.provider for row in comparison.timed] == ["eager", "compile", "vertebra"]
        assert all(row.method == "host" for row in comparison.rows)
        assert comparison.work["bytes"] > 0
    assert [row.saved_bytes for row in forward.rows] == [None] * 3
    assert all(row.saved_bytes is not None for row in backward.rows)


@pytest.mark.parametrize("wrong", ["y", "dweight"])
def test_a_wrong_op_is_refused_not_timed(monkeypatch, wrong) -> None:
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
            return t * 1.001 if wrong == "y" else t.clone()

        @staticmethod
        def backward(ctx: Any, dt: torch.Tensor) -> torch.Tensor:
            return dt.roll(1) if wrong == "dweight" else dt

    def bind(case: Case) -> modules.Function:
        def call(inputs: Any) -> torch.Tensor:
            off = {**inputs, "weight": Off.apply(inputs["weight"])}
            y = case.run(off)["y"]
            return Off.apply(y) if wrong == "y" else y

        return call

    monkeypatch.setitem(kernels.PROVIDERS, "ours", Way(bind, "eager", peer=False))
    (case, *_) = kernels.bench_cases(["layer_norm_2d"], TINY)
    forward, backward = compared(case, ["eager", "ours"])
    eager, ours = (forward if wrong == "y" else backward).rows
    assert (eager.status, len(eager.samples_ms)) == ("ok", 2)
    assert (ours.status, ours.samples_ms, ours.failed) == ("WRONG", [], True)
    assert wrong in ours.detail
    if wrong == "dweight":
        assert forward.rows[1].status == "ok"


@pytest.mark.parity
@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers"])
@pytest.mark.parametrize(
    ("dtype", "directions"),
    [("fp32", DIRECTIONS), ("bf16", ("forward",))],  # whose gradients CPUs add up in bf16
)
def test_modules_of_the_peers_compute_what_the_ops_do(library, dtype, directions) -> None:
    found: set[str] = set()
    for case in kernels.bench_cases((), replace(TINY, dtype=dtype)):
        problem = Problem.create(case, CPU)
        for direction in directions:
            with suppress(Unavailable):
                step = problem.provider(library, direction).make()
                verdict = problem.oracle(direction).judge(step(0))
                assert not verdict.wrong, (case.id, direction, verdict.wrong)
                found.add(case.op)
    assert "layer_norm_2d" in found
    assert len(found) >= (3 if library == "transformers" else 4)


def test_apex_has_one_type_and_one_layout(monkeypatch) -> None:
    class Stand(torch.nn.BatchNorm2d):
        """What apex's module promises: (N, H, W, C) maps, the residual, the ReLU."""

        def __init__(self, channels: int, fuse_relu: bool) -> None:
            super().__init__(channels, momentum=0.3)
            self.fuse_relu = fuse_relu

        def cuda(self) -> "Stand":  # pyright: ignore
            return self

        def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
            assert x.is_contiguous()
            y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            y = y if z is None else y + z
            return y.relu() if self.fuse_relu else y

    stand_in = SimpleNamespace(BatchNorm2d_NHWC=Stand)
    monkeypatch.setitem(sys.modules, "apex.contrib.groupbn.batch_norm", stand_in)
    fp16 = replace(TINY, dtype="fp16")
    channels_last, nchw = kernels.bench_cases(["batch_norm_act"], fp16)
    for direction in DIRECTIONS:
        problem = Problem.create(channels_last, CPU)
        step = problem.provider("apex", direction).make()
        assert not problem.oracle(direction).judge(step(0)).wrong
    for case in (nchw, replace(channels_last, dtype=torch.bfloat16)):
        with pytest.raises(Unavailable, match="channels_last alone"):
            modules.of("apex")(case)


def test_what_a_peer_lacks_is_said() -> None:
    (case, *_) = kernels.bench_cases(["drop_path_add"], TINY)
    with pytest.raises(Unavailable, match="timm has no module for drop_path_add"):
        modules.of("timm")(case)
