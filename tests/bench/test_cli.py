"""The commands as a user meets them: help, errors, and Ctrl-C."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vertebra.bench.results import Report

testing = pytest.importorskip("typer.testing")

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> Any:
    from vertebra.__main__ import app

    return testing.CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "120"})


@pytest.mark.parametrize("name", ["kernels", "models", "train"])
def test_help_names_every_option(name) -> None:
    done = command(name, "--help")
    assert done.exit_code == 0
    for option in (
        *("device", "dtype", "batch", "layout", "providers", "filter", "rounds", "sweep", "tiny"),
        *("minutes", "patience", "json", "csv", "plot", "resume"),
    ):
        assert f"--{option}" in done.output


def test_help_does_not_wait_for_what_it_does_not_need() -> None:
    code = """
import sys
from typer.testing import CliRunner
from vertebra.__main__ import app
for name in ("kernels", "models", "train"):
    assert CliRunner().invoke(app, ["bench", name, "--help"]).exit_code == 0
heavy = {"timm", "torchvision", "transformers", "matplotlib", "sklearn", "PIL", "torch._inductor"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models", "resnet5O"], "no model is called 'resnet5O'; did you mean resnet50"),
        (["models", "--providers", "jax"], "providers are eager-nchw,"),
        (["train", "--batch", "many"], "batch must be a number, or several: 1,8,64; got 'many'"),
        (["train", "--batch", "0"], "at least 1"),
        (["models", "--layout", "nhcw"], "layouts are nchw, nhwc; got nhcw"),
        (["models", "--sweep", "size"], "sweep must be 'batch'"),
        (["models", "--batch", "1,2", "--sweep", "batch"], "up to one batch"),
        (["models", "--image-size", "8"], "image_size must be at least 32; got 8"),
        (["kernels", "conv"], "ops are scale_bias_act,"),
        (["kernels", "--dtype", "int8"], "dtype must be one of fp32, bf16, fp16; got 'int8'"),
        (["kernels", "--rounds", "few"], "valid integer"),
        (["kernels", "--filter", "no such case"], "nothing is called so"),
        (["ceilings", "--device", "tpu"], "device must be cpu, cuda or cuda:1; got 'tpu'"),
        (["models", "--device", "cpu:1"], "device must be cpu, cuda or cuda:1; got 'cpu:1'"),
        (["models", "--batch", "4,-1"], "batch must be at least 1; got -1"),
        (["kernels", "--rounds", "0"], "rounds must be at least 1; got 0"),
        (["train", "--minutes", "-1"], "minutes must be at least 0; got -1"),
        (["train", "--patience", "0"], "patience must be more than 0 seconds; got 0"),
        (["models", "--plot", "chart.txt"], "plot must end in .png, .svg, .pdf; got 'chart.txt'"),
        (["train", "--floor", "--plot", "chart"], "plot must end in .png, .svg, .pdf; got 'chart'"),
        (["compile", "--plot", "chart.txt"], "plot must end in .png, .svg, .pdf"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, message) -> None:
    done = command(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output


def test_ctrl_c_shows_and_saves_what_there_is(tmp_path) -> None:
    path = tmp_path / "kernels.json"
    arguments = ["kernels", "global_avg_pool", "--tiny", "--rounds", "1000000"]
    arguments += ["--providers", "eager,vertebra", "--json", str(path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vertebra", "bench", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(path)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, log = process.communicate(timeout=60)
    assert process.returncode == 130, log
    assert "Interrupted" in out
    assert "Traceback" not in log
    report = Report.load(path)
    assert report.interrupted
    assert "global_avg_pool, fp32" in out
    assert len({len(row.samples_ms) for row in report.comparisons[0].rows}) == 1


def _wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists() and Report.load(path).comparisons:
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")
