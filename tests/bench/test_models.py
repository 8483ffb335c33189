"""Whole models beside their peers, from the choice of models to the files."""

import csv
from dataclasses import replace

import pytest

from vertebra import backend
from vertebra.bench import charts, models, report, tables
from vertebra.bench.results import Report
from vertebra.bench.session import Session
from vertebra.bench.settings import Settings
from vertebra.bench.workload import VARIANTS

pytestmark = pytest.mark.parity
pytest.importorskip("sklearn")

TINY = Settings.choose(device="cpu", tiny=True, known=VARIANTS)
PLAIN = replace(TINY, providers=("eager-nhwc", "vertebra-nhwc"))


def run(mode, settings: Settings = PLAIN) -> Report:
    kind = "models" if mode == "forward" else "train"
    with backend("eager"):
        return Session.open(kind, settings).run(models.tasks(["resnet18"], settings, mode))


@pytest.fixture(scope="module")
def swept() -> Report:
    return run("forward", replace(PLAIN, batches=(1, 2)))


@pytest.fixture(scope="module")
def trained() -> Report:
    return run("sgd")


def test_a_sweep_measures_every_batch(swept) -> None:
    assert [c.facts["batch"] for c in swept.comparisons] == [1, 2]
    for comparison in swept.comparisons:
        assert [row.provider for row in comparison.timed] == ["eager-nhwc", "vertebra-nhwc"]
        batch = comparison.facts["batch"]
        assert comparison.work["images"] == batch
        assert comparison.work["flops"] == batch * swept.comparisons[0].work["flops"]
        assert comparison.floor_ms(swept.ceilings) > 0  # pyright: ignore


def test_training_is_weighed(trained) -> None:
    (comparison,) = trained.comparisons
    saved = [row.saved_bytes for row in comparison.rows]
    assert all(size and size > 1e6 for size in saved)
    assert {"logits", "gradients"} == set(comparison.rows[0].errors)


def test_csv_has_timms_columns_first(swept, trained, tmp_path) -> None:
    tables.write(swept, tmp_path / "m.csv")
    tables.write(trained, tmp_path / "t.csv")
    infer, train = (
        list(csv.DictReader((tmp_path / name).read_text().splitlines()))
        for name in ("m.csv", "t.csv")
    )
    assert list(infer[0])[:8] == [
        *("model", "infer_img_size", "infer_samples_per_sec", "infer_step_time"),
        *("infer_batch_size", "param_count", "infer_gmacs", "infer_macts"),
    ]
    assert list(train[0])[:6] == [
        *("model", "train_samples_per_sec", "train_step_time", "train_batch_size"),
        *("train_img_size", "param_count"),
    ]
    assert len(infer) == 4
    assert {row["param_count"] for row in infer} == {"11.69"}
    speeds = [float(row["infer_samples_per_sec"]) for row in infer]
    assert speeds == sorted(speeds, reverse=True)
    for row in infer:
        per_second = int(row["infer_batch_size"]) / float(row["infer_step_time"]) * 1e3
        assert float(row["infer_samples_per_sec"]) == pytest.approx(per_second, rel=1e-3)


def test_curves_and_bars_are_drawn(swept, trained, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for name, found in (("curves.png", swept), ("bars.svg", trained)):
        charts.models(found, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    charts.models(replace(trained, comparisons=[]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_tables_fit_the_width_they_are_given(trained, capsys) -> None:
    from rich.console import Console

    for width in (80, 100, 140):
        report.show(trained, Console(width=width))
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= width
        assert "…" not in out
        if width != 100:  # where it depends on the times
            assert ("TFLOP/s  of floor" in out) == (width == 140)
            assert ("a wider terminal also shows of budget" in out) == (width == 80)


def test_a_misspelt_model_is_an_error_that_helps() -> None:
    with pytest.raises(ValueError, match="did you mean resnet50"):
        models.tasks(["resnet5O"], TINY, "forward")


def test_default_models_are_of_all_families() -> None:
    from vertebra.models._registry import family_of

    for names in (models.ON_GPU, models.ON_CPU, models.TINY):
        assert {family_of(name) for name in names} == {"resnet", "regnet", "convnext"}
    tasks = models.tasks([], replace(TINY, match="convnext"), "forward")
    assert [task.names[0].split()[0] for task in tasks] == ["convnext_atto"]
