"""`vertebra bench` end to end, on a ResNet-18 and images of 64 pixels."""

import json
from typing import Any

import pytest
import torch
from torch import nn

import vertebra
from vertebra.bench import ceilings, main_job, workload
from vertebra.bench.ceilings import Ceilings
from vertebra.bench.results import Report

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
testing = pytest.importorskip("typer.testing")

EAGER = "eager-nchw,eager-nhwc,timm,transformers,accelerated,vertebra-nchw,vertebra-nhwc"
INFERENCE = f"{EAGER},fused,vertebra-fused"
TINY = ["--model", "resnet18", "--image-size", "64", "--batch", "2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Ceilings(1e11, {"fp32": 1e11, "bf16": 1e12}, 1e11)
    monkeypatch.setattr(ceilings, "measure", lambda *_, **__: known)


def command(*arguments: str) -> Any:
    from vertebra.__main__ import app

    return testing.CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})


def test_help_names_every_option() -> None:
    done = command("bench", "--help")
    assert done.exit_code == 0
    for option in ("batch", "rounds", "dtype", "device", "model", "providers", "image-size", "out"):
        assert f"--{option}" in done.output


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.thorough)])
def test_a_tiny_run_checks_measures_and_writes(tmp_path, dtype) -> None:
    options = ["--device", "cpu", "--dtype", dtype, "--quick", "--out", str(tmp_path)]
    done = command("bench", *TINY, *options)
    assert done.exit_code == 0, done.output
    report = Report.load(tmp_path / "main.json")
    assert [c.facts["mode"] for c in report.comparisons] == ["forward", "training"]
    for comparison, names in zip(report.comparisons, (INFERENCE, EAGER), strict=True):
        assert {row.provider for row in comparison.timed} == set(names.split(","))
        assert all(len(row.samples_ms) == 1 for row in comparison.rows)
        assert all(0 < row.errors["logits"] <= row.allowed["logits"] for row in comparison.rows)
        assert all(row.provider in done.output for row in comparison.rows)
    assert all(row.errors["gradients"] > 0 for row in report.comparisons[1].rows)
    assert report.environment["torch"] == torch.__version__
    assert report.ceilings is not None
    assert "No GPU" in done.output
    assert "a copy moves" in done.output
    assert (tmp_path / "main.png").stat().st_size > 1000


@pytest.mark.parity
def test_a_wrong_model_is_refused_not_timed_and_fails_the_run(tmp_path, monkeypatch) -> None:
    def almost(*arguments: Any, **options: Any) -> nn.Module:
        model: Any = vertebra.create_model(*arguments, **options)
        with torch.no_grad():
            model.layer2[0].bn1.weight[3] *= 1.05
        return model

    monkeypatch.setattr(workload, "create_model", almost)
    done = command(
        *("bench", *TINY, "--device", "cpu", "--seed", "1", "--out", str(tmp_path)),
        *("--providers", "eager-nchw,vertebra-nhwc"),
    )
    assert done.exit_code == 1, done.output
    assert "WRONG" in done.output
    for comparison in json.loads((tmp_path / "main.json").read_text())["comparisons"]:
        peer, ours = comparison["rows"]
        assert peer["status"] == "ok"
        assert ours["status"] == "WRONG"
        assert ours["samples_ms"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "fp32"),
        (["--providers", "eager-nchw,tensorflow"], "tensorflow"),
        (["--batch", "0"], "at least 1"),
        (["--device", "tpu"], "tpu"),
        (["--model", "resnet5"], "did you mean resnet50"),
    ],
)
def test_bad_options_are_usage_errors(options, message) -> None:
    done = command("bench", *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_quick_compiles_nothing() -> None:
    settings = main_job.choose(quick=True, device="cpu")
    chosen = [v for v in workload.VARIANTS.values() if v.suits(settings, "forward")]
    assert chosen
    assert {variant.compile for variant in chosen} == {None}
    assert (settings.rounds, settings.image_size) == (3, 128)


def test_list_and_env() -> None:
    assert "resnet50" in command("list", "resnet*").output.split()
    assert torch.__version__ in command("env").output
