"""`vertebra tune`: every convolution is found, each candidate checked, the fastest kept."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import vertebra
from vertebra.bench import tune
from vertebra.bench.pages import tuning
from vertebra.bench.pages.sources import Sources
from vertebra.bench.results import Comparison, Report, Row
from vertebra.bench.session import Session
from vertebra.bench.settings import Settings
from vertebra.bench.tune import Place
from vertebra.kernels import _choices
from vertebra.kernels._conv2d import Arguments, site
from vertebra.kernels._op import observe

testing = pytest.importorskip("typer.testing")

SETTINGS = Settings.choose(device="cpu", dtype="fp32", batches=[2], rounds=2)
# tables are for devices, of which this is one that nobody has
DEVICE = "a device of this test"


def module() -> Any:
    return importlib.import_module("vertebra.kernels.conv2d_act")


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(_choices, "device_name", lambda _: DEVICE)
    _choices.forget()
    yield
    _choices.forget()


def place(channels: int = 8, **changes: Any) -> Place:
    weight = torch.empty(16, channels, 1, 1, device="meta")
    x = torch.empty(1, channels, 5, 7, device="meta").contiguous(memory_format=torch.channels_last)
    bias = torch.empty(16, device="meta")
    steps = ((1, 1), (0, 0), (1, 1))
    a = Arguments(x, weight, None, bias, None, *steps, 1, "relu", "tf32", "")
    return Place(tune.ALONE, a._replace(**changes), 3)


def pair() -> Place:
    def maps(channels: int) -> torch.Tensor:
        x = torch.empty(1, channels, 5, 8, dtype=torch.float16, device="meta")
        return x.contiguous(memory_format=torch.channels_last)

    weight, following = (
        torch.empty(*sizes, 1, 1, dtype=torch.float16, device="meta")
        for sizes in ((32, 16), (16, 32))
    )
    acts = ("relu", "relu")
    front = (None, None, "none")
    a = tune.Pair(maps(16), weight, following, None, None, maps(32), *acts, *front, "", "")
    return Place(tune.PAIRS, a, 2)


def bottleneck() -> Place:
    a = pair().arguments
    mid = torch.empty(16, 16, 3, 3, dtype=torch.float16, device="meta")
    mid = mid.contiguous(memory_format=torch.channels_last)
    return Place(tune.PAIRS, a._replace(mid_weight=mid, mid_act="relu"), 2)


def run(where: Place, names: list[str]) -> Report:
    where = where._replace(tuned=where.tuned._replace(candidates=lambda *_: names))
    session = Session.open("tune", SETTINGS)
    return session.run(tune.tasks([where], SETTINGS))


def table(tuned: tune.Tuned = tune.ALONE) -> dict[str, Any]:
    path = tune.table_of(torch.device("cpu"), tuned)
    return json.loads(path.read_text())["choices"] if path.exists() else {}


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "convnext_atto"])
def test_every_convolution_is_found_once(name) -> None:
    tiny = Settings.choose(device="cpu", tiny=True)
    found = tune.places([name], Settings.choose(device="cpu", tiny=True, match=""))
    assert len(found) == 3  # a trial has no more
    from vertebra import create_model, fuse
    from vertebra.kernels._op import observe

    model, x = fuse(create_model(name).eval()), torch.randn(1, 3, *[tiny.image_size] * 2)
    calls: list[Any] = []
    with torch.no_grad(), observe(calls.append):
        model(x)
    convolutions = [Arguments(*call.args) for call in calls if call.op is tune.ALONE.op]
    places = tune.convolutions(model, x)
    assert sum(p.count for p in places) == len(convolutions)
    assert {p.site for p in places} == {site(a) for a in convolutions}
    assert all(p.arguments.x.is_meta for p in places)


def test_the_first_candidate_is_what_runs_without_a_table() -> None:
    problem = tune.Problem.create(place(), 2, torch.device("cpu"))
    names = module().candidates(*problem.sets[0])
    assert names[0].startswith("triton:")
    assert len(names) > 3


def test_the_fastest_is_written_and_then_chosen(monkeypatch) -> None:
    where = place()
    problem = tune.Problem.create(where, 2, torch.device("cpu"))
    names = module().candidates(*problem.sets[0])[:3]
    monkeypatch.setattr(tune, "best", lambda c: next(r for r in c.rows if r.provider == names[2]))
    report = run(where, names)
    (comparison,) = report.comparisons
    assert [row.status for row in comparison.rows] == ["ok"] * 3
    assert not report.failed
    assert table() == {where.site: {"2": names[2]}}
    assert _choices.best("conv2d_act", DEVICE, where.site, 2) == names[2]
    ranked = module()._ranked(problem.sets[0])
    assert ranked[0] == (names[2], f"measured to be the fastest on {DEVICE}")


def test_a_wrong_candidate_is_reported_and_never_chosen(monkeypatch) -> None:
    where = place()

    def wrong(a: Arguments) -> torch.Tensor:
        return module()._eager(*a) * 1.01

    honest = module().CANDIDATES["triton"]
    for name, compute in (("quick", wrong), ("plain", lambda a: module()._eager(*a))):
        liar = honest._replace(compute=compute, refuses=lambda _: None)
        monkeypatch.setitem(module().CANDIDATES, name, liar)
    report = run(where, ["plain", "quick"])
    rows = {row.provider: row.status for row in report.comparisons[0].rows}
    assert rows == {"plain": "ok", "quick": "WRONG"}
    assert report.failed
    assert table() == {where.site: {"2": "plain"}}


@pytest.mark.parametrize("where", [pair(), bottleneck()], ids=["pair", "with 3x3"])
def test_pairs_are_measured_against_the_convolutions_apart(where: Place) -> None:
    problem = tune.Problem.create(where, 2, torch.device("cpu"))
    names = tune.PAIRS.candidates(*problem.sets[0])[:2]
    assert names[0] == "apart"
    assert names[1].startswith("triton:")
    report = run(where, names)
    (comparison,) = report.comparisons
    assert [row.status for row in comparison.rows] == ["ok"] * 2
    assert table(tune.PAIRS)[where.site]["2"] in names
    assert not table()


@pytest.mark.parametrize("adds", [True, False])
def test_candidates_of_a_cpu(adds, on_onednn) -> None:
    where = place(act="none", precision="")
    if adds:
        residual = torch.empty(1, 16, 5, 7, device="meta")
        residual = residual.contiguous(memory_format=torch.channels_last)
        where = place(act="none", precision="", residual=residual)
    problem = tune.Problem.create(where, 2, torch.device("cpu"))
    names = module().candidates(*problem.sets[0])
    assert names == ["onednn", "onednn_linear", "mkl"]
    for a in problem.sets:
        assert isinstance(a.weight, torch.nn.Parameter)  # others are not packed
        assert not a.weight.requires_grad
    report = run(where, names)
    assert [row.status for row in report.comparisons[0].rows] == ["ok"] * 3
    assert table()[where.site]["2"] in names
    assert len(tune.places(["resnet18"], SETTINGS)) > 3


def test_a_pair_with_a_3x3_competes_with_the_best_of_the_pair() -> None:
    """Apart, the pair runs as its own table says, which is there by then."""
    kernel = "triton:64x64:w4:s2"
    _choices.write("conv2d_b2b", DEVICE, {pair().site: {2: kernel}}, {})
    seen: list[tuple[str, str]] = []
    problem = tune.Problem.create(bottleneck(), 2, torch.device("cpu"))
    with observe(lambda call: seen.append((call.op.name, call.path))):
        problem.provider("apart", True).make()(0)
    expected = [("conv2d_b2b", "apart"), ("conv2d_act", "triton"), ("conv2d_b2b", "triton")]
    assert seen[-3:] == expected


def test_the_pairs_of_a_network_are_found() -> None:
    x = torch.randn(1, 3, 64, 64, dtype=torch.float16)
    bottlenecks, plain = (
        tune.pairs(vertebra.fuse(vertebra.create_model(name).half().eval()), x)
        for name in ("resnet50", "resnet18")
    )
    counts = Counter[int]()
    for place in bottlenecks:
        counts[place.convolutions] += place.count
    # between 3, 4 and 6 blocks; the last stage ends in the pool, other first blocks have a stride
    assert counts == {2: 2 + 3 + 5, 3: 2 + 2 + 4}
    sites = [place.site for place in bottlenecks]
    assert sites[:2] == [
        "64x16x16 > 64 3x3 > 256 > 64 float16 residual",
        "64x16x16 > 256 > 64 float16 residual",
    ]
    assert not plain


def compared(default: list[float], **others: list[float]) -> Comparison:
    rows = [Row("default", True, samples_ms=default)]
    rows += [Row(name, False, samples_ms=samples) for name, samples in others.items()]
    return Comparison("", rows)


def test_what_is_not_told_apart_keeps_the_default() -> None:
    def chosen(*args: Any, **others: Any) -> str | None:
        row = tune.best(compared(*args, **others))
        return None if row is None else row.provider

    assert chosen([2.0] * 5, a=[1.0] * 5, b=[1.5] * 5) == "a"
    assert chosen([1.0] * 5, a=[1.2] * 5) == "default"
    assert chosen([1.0, 1.1, 0.9, 1.0, 1.1], a=[0.99, 1.11, 0.91, 0.98, 1.0]) == "default"
    assert chosen([2.0] * 5) == "default"
    assert chosen([], a=[1.0] * 5) == "a"
    assert chosen([]) is None


def test_layouts_shapes_and_types_of_the_inputs() -> None:
    like = place().arguments
    residual = torch.empty(1, 16, 5, 7, device="meta").contiguous(memory_format=torch.channels_last)
    given = like._replace(x=like.x.half(), weight=like.weight.half(), residual=residual.half())
    problem = tune.Problem.create(Place(tune.ALONE, given, 1), 3, torch.device("cpu"))
    assert len(problem.sets) == 2
    for a in problem.sets:
        assert a.x.shape == (3, 8, 5, 7)
        assert a.residual is not None
        assert a.residual.shape == (3, 16, 5, 7)
        assert a.x.dtype == a.residual.dtype == torch.float16
        assert a.x.is_contiguous(memory_format=torch.channels_last)
        assert site(a) == site(given)
    assert problem.sets[0].x.data_ptr() != problem.sets[1].x.data_ptr()
    assert torch.equal(problem.sets[0].x, problem.sets[1].x)


def command(*arguments: str) -> Any:
    from vertebra.__main__ import app

    return testing.CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "140"})


def test_a_trial_prints_and_writes_no_table(tmp_path, monkeypatch) -> None:
    few = tune.ALONE._replace(candidates=lambda *args: module().candidates(*args)[:1])
    monkeypatch.setattr(tune, "ALONE", few)
    path = tmp_path / "tune.json"
    options = ["--device", "cpu", "--tiny", "--image-size", "32", "--batch", "1"]
    done = command("regnetx_002", *options, "--filter", "1x1", "--json", str(path))
    assert done.exit_code == 0, done.output
    assert "all convolutions take" in done.output
    assert len(Report.load(path).comparisons) == 3
    assert not table()


def test_a_run_has_its_table_on_a_page(tmp_path) -> None:
    """What is timed goes in with what is not, and what is not told apart as untuned."""
    rows = [Row("cudnn", True, samples_ms=[2.0] * 3), Row("triton:x", False, samples_ms=[1.0] * 3)]
    facts = {"op": "conv2d_act", "site": "8x5x7 > 16 1x1", "batch": 4, "count": 3, "dtype": "fp32"}
    facts["convolutions"] = 1
    failed = Comparison("b", [Row("cudnn", True, "FAILED")], facts=facts)
    report = Report("tune", {"device": "a GPU", "torch": "2"}, {})
    report.comparisons += [Comparison("a", rows, facts=facts), failed]
    timed, untimed = tune.lines(report)
    assert timed == [facts["site"], "triton:x", "4", "3", "1000.0", "2000.0", "2.00x", ""]
    assert untimed[1] == "nothing was timed"
    assert list(tune.totals(report)) == [
        "Batch 4: all convolutions take 3.000 ms, untuned 6.000 ms, 2.00x."
    ]
    path = tmp_path / "bench/results/gpu-tune.json"
    report.environment |= {"driver": "1", "triton": "3", "python": "3", "commit": "0" * 40}
    report.save(path)
    page = tuning.convolutions(Sources(tmp_path))
    assert "| 8x5x7 > 16 1x1 | triton:x | 4 | 3 | 1000.0 | 2000.0 | 2.00x |" in page
    assert "6.000 ms" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "--device", "cpu"], "TRITON_INTERPRET=1"),
        (["resnet181", "--device", "cpu", "--tiny"], "no model is called 'resnet181'"),
        (["resnet18", "--device", "cpu", "--tiny", "--filter", "9x9"], "no convolution is called"),
        (["resnet18", "--batch", "x"], "batch must be a number"),
    ],
)
def test_errors_are_one_line(arguments, message) -> None:
    done = command(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
