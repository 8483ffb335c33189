"""The comparison with torch.compile: what it counts is counted, and nothing wrong is timed.

Small modules, and a compiler that generates nothing: Inductor is a thorough test's.
"""

import importlib
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.bench.compile import child, graphs, process, starts, steady
from vertebra.bench.compile.child import Account, Call
from vertebra.bench.compile.plan import POLICIES, PROVIDERS, Plan, Policy, Variant, Visit
from vertebra.bench.compile.process import Caches, Job
from vertebra.bench.compile.shapes import compare as compare_shapes
from vertebra.bench.compile.step import Batch, Gradient, Inference, Training
from vertebra.bench.compile.subjects import Subject, blocks
from vertebra.bench.results import Comparison, Row
from vertebra.bench.runner import Limits
from vertebra.bench.session import Session
from vertebra.bench.workload import Named, Workload, jitter
from vertebra.models import create_model
from vertebra.models._layouts import LAYOUTS
from vertebra.nn import BatchNormAct2d
from vertebra.testing.parity import build_on_meta

pytest.importorskip("sklearn")

OURS, COMPILED = PROVIDERS["vertebra"], PROVIDERS["vertebra-compile"]


class Net(nn.Sequential):
    """A convolution, a norm with its activation, and another convolution."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, 2), BatchNormAct2d(8), nn.Conv2d(8, 4, 3, 2))


class Wrong(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class WrongWhenSmall(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.01 if x.shape[0] == 1 else 1.0)


class Raises(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand a long trace")


class Work:
    """A workload of small networks: the reference is right, ours is what a test says."""

    name, library = "net", "vertebra"

    def __init__(self, ours: type[Net] = Net) -> None:
        torch.manual_seed(0)
        self.reference = Net().train()
        self.reference(torch.randn(8, 3, 32, 32))
        self._ours = ours

    def build(self, source: str) -> tuple[nn.Module, str]:
        model = Net() if source == "reference" else self._ours()
        model.load_state_dict(self.reference.state_dict())
        return model, "vertebra"

    def keys_in(self, library: str) -> dict[str, str]:
        return {key: key for key in self.reference.state_dict()}

    def named(self, model: nn.Module, library: str) -> list[Named]:
        return [Named(f"gradients:{n}", p, p.shape) for n, p in model.named_parameters()]


@pytest.fixture
def plan() -> Plan:
    plan = Plan.of(device="cpu", image_size=32, batches=[4], rounds=3, backend="aot_eager")
    return replace(plan, starts=1, providers=("eager", "vertebra", "vertebra-compile"))


@pytest.fixture
def session(plan) -> Session:
    return Session.open("compile", plan)


def subject(plan: Plan, ours: type[Net] = Net) -> Subject:
    return Subject(Work(ours), plan)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs do here what their processes would."""

    def run(folder: Path, cache: Path, seconds: float) -> int:
        torch.compiler.reset()
        try:
            child.main(str(folder), {"torch": 0.0, "vertebra": 0.0})
        except RuntimeError:
            return 1
        return 0

    monkeypatch.setattr(process, "_process", run)


def job(it: Subject, variant: Any = OURS, policy: Policy = "static", *visits: Visit) -> Job:
    shapes = list(visits) or [it.plan.base]
    return Job(it, variant, "forward", "default", policy, shapes, again=1)


# ------------------------------------------------------------------------------------ graphs


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        torch._dynamo.graph_break()
        return self[2](self[1](x))


def step(module: nn.Module) -> Inference:
    x = torch.randn(2, 3, 32, 32)
    return Inference(module.eval(), module, [Batch(x, module(x).detach())])


def test_a_graph_break_is_reported_with_its_reason() -> None:
    assert graphs.breaks(step(Net())) == (1, 0, [])
    found = graphs.breaks(step(Broken()))
    assert (found.graphs, found.breaks) == (2, 1)
    assert len(found.reasons) == 1
    assert "graph_break" in found.reasons[0]


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors of a CPU be no reason for kernels, as where nobody tests."""
    monkeypatch.setattr(importlib.import_module("vertebra.kernels._op"), "INTERPRETED", False)


def test_ours_are_opaque_on_kernels_and_operations_elsewhere(no_interpreter) -> None:
    here, there = (graphs.trace(step(Net()), on_triton=on_triton) for on_triton in (False, True))
    assert here.opaque == {}
    assert there.opaque == {"scale_bias_act": 1}
    assert there.operations["forward"] < here.operations["forward"]
    assert there.operations["backward"] == 0


def test_the_backward_graph_is_seen_too(no_interpreter) -> None:
    module = Net().train()
    gradients = [Gradient(name, p.shape) for name, p in module.named_parameters()]
    batch = Batch(torch.randn(2, 3, 32, 32), torch.randn(2, 4, 7, 7))
    before = module[1].running_mean.clone()
    found = graphs.trace(Training(module, module, [batch], gradients, False), on_triton=True)
    assert found.opaque == {"batch_norm_act": 1, "batch_norm_act_backward": 1}
    assert found.operations["backward"] > 0
    torch.testing.assert_close(module[1].running_mean, before)  # nothing has run


# ------------------------------------------------------------------------------------ shapes

VISITS = [Visit(4, 32), Visit(3, 32), Visit(2, 32), Visit(4, 48), Visit(4, 32)]


@pytest.mark.parametrize(
    ("policy", "counts"),
    [
        ("static", [1, 1, 1, 1, 0]),
        ("automatic", [1, 1, 0, 1, 0]),
        ("dynamic", [1, 0, 0, 0, 0]),
        ("marked", [1, 0, 0, 0, 0]),
    ],
)
def test_every_compilation_of_a_new_shape_is_counted(
    plan, tmp_path, no_process, policy, counts
) -> None:
    row = Row("vertebra-compile", False)
    account = job(subject(plan), COMPILED, policy, *VISITS).run(row, tmp_path, Limits())
    assert row.status == "ok"
    assert account is not None
    assert [call.graphs for call in account.visits] == counts
    assert [len(call.reasons) for call in account.visits] == [0, *counts[1:]]
    if policy == "static":
        assert "expected 4, actual 3" in account.visits[1].reasons[0]


def test_every_policy_is_tested() -> None:
    assert list(POLICIES) == ["static", "automatic", "dynamic", "marked"]


def test_the_shapes_are_batches_and_sizes_around_the_first(plan) -> None:
    sizes = [Visit(4, 64), Visit(4, 96), Visit(4, 32)]
    batches = [Visit(4, 32), Visit(3, 32), Visit(2, 32)]
    assert plan.visits("training") == batches + sizes
    assert plan.visits("forward") == [*batches, Visit(1, 32), *sizes]
    quick = replace(plan, quick=True, batches=(2,))
    assert quick.visits("training") == [Visit(2, 32), Visit(2, 64), Visit(2, 32)]


def test_an_answer_that_is_wrong_at_one_shape_spoils_the_row(plan, session, no_process) -> None:
    it = subject(replace(plan, quick=True, batches=(2,)), WrongWhenSmall)
    comparison = Comparison("shapes", [])
    compare_shapes(comparison, it, "forward", "dynamic", Caches(), session)
    (row,) = comparison.rows  # eager ones have nothing to do with the policy
    assert (row.provider, row.status) == ("vertebra-compile", "WRONG")
    assert row.detail.startswith("1 x 32²: y: error")
    assert row.facts == {}


# ------------------------------------------------------------------------------------ processes


def test_a_cold_start_accounts_for_all_its_parts(plan, session) -> None:
    only = replace(plan, providers=("vertebra-compile",))
    comparison = Comparison("starts", [])
    starts.compare(comparison, subject(only), "training", "default", Caches(), session)
    (row,) = comparison.rows
    assert (row.status, row.detail) == ("ok", "")
    assert comparison.finished
    (start,) = row.facts["starts"]
    assert set(start["imports_s"]) == {"torch", "vertebra", "compiler"}
    assert set(start["compiling_s"]) == {"tracing", "autograd", "code", "kernels"}
    assert start["compiling_s"]["tracing"] > 0
    assert row.samples_ms[0] / 1e3 > sum(start["compiling_s"].values())
    assert start["build_s"] > 0
    assert start["host_bytes"] > 1e8
    assert len(start["again_ms"]) == 4
    assert max(start["again_ms"]) < row.samples_ms[0]
    assert set(row.errors) == {"y", "gradients"}


def test_a_wrong_provider_is_refused_and_not_timed(plan, session, tmp_path, no_process) -> None:
    it = subject(plan, Wrong)
    row = Row("vertebra", False)
    assert job(it).run(row, tmp_path, Limits()) is None
    assert row.status == "WRONG"
    assert "y: error" in row.detail
    comparison = Comparison("steady", [])
    steady.compare(comparison, it, "forward", "default", Caches(), session)
    status = {row.provider: row.status for row in comparison.rows}
    assert status == {"eager": "ok", "vertebra": "WRONG", "vertebra-compile": "WRONG"}
    assert [len(row.samples_ms) for row in comparison.rows] == [3, 0, 0]


def test_what_raises_in_its_process_is_a_row(plan, tmp_path, no_process) -> None:
    row = Row("vertebra", False)
    assert job(subject(plan, Raises)).run(row, tmp_path, Limits()) is None
    assert (row.status, row.detail) == ("FAILED", "RuntimeError: no such kernel")


def test_a_process_that_is_gone_says_how_far_it_came(plan, tmp_path, monkeypatch) -> None:
    def killed(folder: Path, cache: Path, seconds: float) -> int:
        Account().write(folder, "building")
        (folder / "stderr").write_text("a warning\nout of memory\n")
        return -9

    monkeypatch.setattr(process, "_process", killed)
    row = Row("vertebra", False)
    assert job(subject(plan)).run(row, tmp_path, Limits()) is None
    assert (row.status, row.detail) == ("FAILED", "exit code -9, building: out of memory")


def test_a_process_is_ended_when_its_time_is_over(plan, tmp_path) -> None:
    row = Row("vertebra", False)
    begin = time.monotonic()
    assert job(subject(plan)).run(row, tmp_path, Limits(first_answer_s=0.5)) is None
    assert time.monotonic() - begin < 30
    assert (row.status, row.detail) == ("slow", "ended after 0.5 s, importing")
    late = Row("vertebra", False)
    assert job(subject(plan)).run(late, tmp_path, Limits(deadline=-math.inf)) is None
    assert late.status == "late"


def test_a_process_inherits_nothing_of_what_was_compiled(plan) -> None:
    caches, it = Caches(), subject(plan)
    path = caches.empty(it, "compile", "forward", "default")
    (path / "kernel").write_text("code")
    with caches.copy(it, "compile", "forward", "default") as copy:
        assert [file.name for file in copy.iterdir()] == ["kernel"]
        (copy / "more").write_text("code")
    block = replace(it, path="1")  # of which none was kept: it has the network's
    with caches.copy(block, "compile", "forward", "default") as copy:
        assert [file.name for file in copy.iterdir()] == ["kernel"]
    with caches.copy(it, "vertebra-compile", "forward", "default") as copy:
        assert list(copy.iterdir()) == []
    assert list(caches.empty(it, "compile", "forward", "default").iterdir()) == []


def account(first_s: float) -> Account:
    return Account(visits=[Call(first_s, again_ms=[1.0])])


def test_finished_rows_of_an_earlier_run_are_not_started_again(plan, session, monkeypatch) -> None:
    started: list[str] = []

    def run(job: Job, row: Row, cache: Path, limits: Limits) -> Account:
        started.append(row.provider)
        return account(0.5)

    monkeypatch.setattr(Job, "run", run)
    done = Row("eager", True, samples_ms=[7.0], facts={"starts": [{}]})
    slow = Row("vertebra-compile", False, "slow")
    comparison = Comparison("starts", [slow, done, Row("vertebra", False, "late")])
    starts.compare(comparison, subject(plan), "forward", "default", Caches(), session)
    assert started == ["vertebra"]
    assert [row.provider for row in comparison.rows] == list(plan.chosen)
    assert [row.samples_ms for row in comparison.rows] == [[7.0], [500.0], []]
    assert comparison.finished


def test_a_start_that_is_late_costs_nothing_that_was_there(plan, session, monkeypatch) -> None:
    accounts = iter([account(0.5), None, account(0.7)])

    def run(job: Job, row: Row, cache: Path, limits: Limits) -> Account | None:
        found = next(accounts)
        row.status = "ok" if found else "late"
        return found

    monkeypatch.setattr(Job, "run", run)
    it = subject(replace(plan, providers=("eager",), starts=2))
    comparison = Comparison("starts", [])
    starts.compare(comparison, it, "forward", "default", Caches(), session)
    (row,) = comparison.rows
    assert (row.status, row.samples_ms) == ("ok", [500.0])
    assert not comparison.complete  # so that another run goes on with it
    starts.compare(comparison, it, "forward", "default", Caches(), session)
    assert row.samples_ms == [500.0, 700.0]
    assert comparison.complete


# ------------------------------------------------------------------------------------ subjects


@pytest.mark.parametrize(
    ("name", "library", "expected"),
    [
        ("resnet18", "torchvision", ["layer1.1", "layer2.0", "layer2.1", "layer3.1", "layer4.1"]),
        (
            "regnet_y_400mf",
            "torchvision",
            [f"trunk_output.block{b}" for b in ("1.block1-0", "2.block2-0", "2.block2-2")]
            + [f"trunk_output.block{b}" for b in ("3.block3-5", "4.block4-5")],
        ),
        ("regnety_002", "timm", ["s1.b1", "s2.b1", "s3.b4", "s4.b7"]),
        ("convnext_tiny", "torchvision", [f"features.{i}" for i in ("1.2", "3.2", "5.8", "7.2")]),
        ("convnext_atto", "timm", [f"stages.{i}" for i in ("0.blocks.1", "1.blocks.1")]),
    ],
)
def test_blocks_are_found_in_the_libraries_networks(plan, name, library, expected) -> None:
    ours: Any = build_on_meta(create_model, name)
    layout = LAYOUTS[ours.family][library]
    work: Any = SimpleNamespace(keys_in=lambda _: layout.names(ours.state_dict().keys()))
    found = [Subject(work, plan, path)._path_in(library) for path in blocks(name, plan)]
    assert found[: len(expected)] == expected
    assert len(blocks(name, replace(plan, quick=True))) == 1


@pytest.mark.parametrize("path", ["", "2"])
def test_a_repeated_image_is_judged_by_one(plan, path) -> None:
    repeated = replace(plan, batches=(64,))  # 32 images, twice each
    it = replace(subject(repeated), path=path)
    oracle = it.oracle(repeated.base, "training")
    answers = it.step(OURS, "training")(0)
    assert ("dx" in answers) == bool(path)
    assert oracle.judge(answers).wrong == ""
    weight = f"gradients:{'2' if path else '0'}.weight"
    for name in (weight, *(("dx",) if path else ())):
        assert name in oracle.judge({**answers, name: answers[name] * 1.01}).wrong


def test_weights_that_norms_are_folded_into_are_right(plan) -> None:
    """In half precision they are rounded once more. Ten roundings are wrong."""
    plan, dtype = replace(plan, dtype="bf16", image_size=64), torch.bfloat16
    device, eps = torch.device("cpu"), torch.finfo(dtype).eps
    it = Subject(Workload.create("resnet18", 4, 64, device, dtype), plan)
    oracle, batch = it.oracle(plan.base, "forward"), it.batch(plan.base)

    def moved(by: float) -> nn.Module:
        network = it.build(Variant("reference", False))[0].eval().to(dtype).double()
        jitter(network, 1, by)
        return network

    fused = vertebra.fuse(it.build(Variant("reference", False))[0].eval().to(dtype))
    right, rounded, wrong = (
        oracle.judge(Inference(network, network, [batch.to(device, of, False)])(0))
        for network, of in (
            (fused, dtype),
            (moved(eps / 2), torch.float64),
            (moved(5 * eps), torch.float64),
        )
    )
    assert not right.wrong
    assert 1.8 * rounded.errors["y"] < rounded.allowed["y"]
    assert wrong.wrong


def test_plans_that_cannot_be_carried_out_say_so() -> None:
    for options, message in (
        ({"directions": ["back"]}, "directions are forward, training; got back"),
        ({"aspects": ["speed"]}, "aspects are graphs, starts, steady, shapes; got speed"),
        ({"modes": ["max-autotune"]}, "modes here are default, freezing; got max-autotune"),
        ({"batches": [4, 8]}, "one batch"),
        ({"rounds": 2}, "rounds must be at least 3"),
        ({"providers": ["timm"]}, "providers are eager, compile"),
    ):
        with pytest.raises(ValueError, match=message):
            Plan.of(device="cpu", **options)


def test_what_is_written_can_be_read(tmp_path) -> None:
    wrote = Account(imports_s={"torch": 1.0}, visits=[Call(2.0, 1, ["because"], [3.0])])
    wrote.write(tmp_path, "building")
    assert Account.read(tmp_path) == wrote
    assert json.loads((tmp_path / "account.json").read_text())["doing"] == "building"
