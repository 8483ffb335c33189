"""The image folder example: one process and two, straight through and resumed."""

import csv
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vertebra

sklearn_datasets = pytest.importorskip("sklearn.datasets")
image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("typer")

ROOT = Path(__file__).parents[2]
PATH = ROOT / "examples" / "train_imagefolder.py"
TRAIN, VAL = 48, 37  # 37 images are not the same for two processes
PLAIN = ["--size=32", "--resize=32", "--crop-scale=1", "--flip=0", "--workers=0", "--device=cpu"]
SHORT = [*PLAIN, "--epochs=2", "--warmup-epochs=0", "--batch-size=8", "--log-every=2"]
SIZES = {"layers": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 16}
RESNET = [
    "--model=resnet18",
    f"--model-options={json.dumps(SIZES)}",
]
CONVNEXT = [  # has no batch norm: the mean of two processes' gradients is that of one
    "--model=convnext_atto",
    f"--model-options={json.dumps({'depths': [1, 1], 'dims': [8, 16], 'ls_init_value': 1.0})}",
]
DROPPING = [
    "--model=convnext_atto",
    f"--model-options={json.dumps({'depths': [1, 2], 'dims': [8, 16], 'drop_path_rate': 0.5})}",
]


@pytest.fixture(autouse=True)
def _eager(eager_on_one_thread: None) -> None:
    """Here and in the processes that are started, images are small and kernels not the subject."""


@pytest.fixture(scope="module")
def example(torchvision: ModuleType) -> Any:
    pytest.importorskip("torchvision.datasets")
    spec = importlib.util.spec_from_file_location("train_imagefolder", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where typer looks up the types of the options
    spec.loader.exec_module(module)
    return module


def write(folder: Path, images: list[tuple[np.ndarray, str]], held_out: int) -> Path:
    for number, (pixels, label) in enumerate(images):
        part = "val" if number < held_out else "train"
        path = folder / part / label / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_module.fromarray(pixels).save(path)
    return folder


def digits(folder: Path, train: int, val: int) -> Path:
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    pixels = (images * 15.9).astype(np.uint8).reshape(-1, 8, 8).repeat(4, 1).repeat(4, 2)
    pairs = [(x, str(y)) for x, y in zip(pixels, labels, strict=True)]
    return write(folder, pairs[: train + val], val)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("digits"), TRAIN, VAL)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of two photographs, which are the classes."""
    crops: list[tuple[np.ndarray, str]] = []
    rng = np.random.default_rng(0)
    photographs = sklearn_datasets.load_sample_images().images
    for _ in range(20):
        for photograph, label in zip(photographs, ("china", "flower"), strict=True):
            top, left = (rng.integers(side - 96) for side in photograph.shape[:2])
            crops.append((photograph[top : top + 96, left : left + 80], label))
    return write(tmp_path_factory.mktemp("photos"), crops, 16)


def rows(output: Path) -> list[dict[str, float]]:
    with (output / "log.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def checkpoint(output: Path) -> dict[str, Any]:
    return torch.load(output / "last.pt", weights_only=True)


def gradients(state: dict[str, Any]) -> list[Tensor]:
    """Return those of the first step, with which SGD's momentum begins."""
    return [moment["momentum_buffer"] for moment in state["optimizer"]["state"].values()]


def lively(model: nn.Module) -> dict[str, Tensor]:
    """Return weights of a size at which every parameter has a gradient to speak of."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.normal_(parameter)
    return model.state_dict()


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def terminate_in(example: Any, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let a run receive a SIGTERM in that step."""
    take = example.Job.step

    def step_and_terminate(job: Any) -> None:
        take(job)
        if job.at.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(example.Job, "step", step_and_terminate)


# the same command, as a user runs it


@pytest.fixture
def launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: Any
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the example in processes of its own."""
    (tmp_path / "sitecustomize.py").write_text("import conftest\n")  # what torchvision needs here
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'tests'}:{ROOT}")
    monkeypatch.setenv("VERTEBRA_BACKEND", "eager")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    started: list[subprocess.Popen[str]] = []

    def start(argv: list[str], processes: int = 1) -> subprocess.Popen[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(PATH), *argv]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=60)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def test_two_processes_do_what_one_does(
    example: Any, launch: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """One step on the same 48 images from the same weights, and the same 37 images to judge."""
    start = tmp_path / "start.pt"
    torch.save(lively(example.build(example.parse([".", *CONVNEXT]), 10, None)), start)
    argv = [str(data), *PLAIN, *CONVNEXT, "--epochs=1", "--warmup-epochs=0", f"--weights={start}"]
    one, two = tmp_path / "one", tmp_path / "two"
    running = launch([*argv, f"--output={two}", "--batch-size=6", "--accumulate=4"], 2)
    example.main([*argv, f"--output={one}", "--batch-size=48"])
    finish(running)
    found, expected = checkpoint(two), checkpoint(one)
    assert found["at"]["step"] == expected["at"]["step"] == 1
    torch.testing.assert_close(found["model"], expected["model"])
    torch.testing.assert_close(gradients(found), gradients(expected))
    assert all(gradient.norm() > 0.01 for gradient in gradients(expected))
    (ours,), (theirs,) = rows(two), rows(one)
    assert ours["top1"] == theirs["top1"]
    assert ours["top5"] == theirs["top5"]
    assert (ours["top5"] / 100 * VAL) == pytest.approx(round(ours["top5"] / 100 * VAL))
    assert ours["loss"] == pytest.approx(theirs["loss"])
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"])


@pytest.mark.thorough
def test_a_torchrun_that_is_terminated_resumes(
    launch: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    """Two processes with loaders of their own, which torchrun signals too; batch norms agree."""
    output, straight = tmp_path / "stopped", tmp_path / "straight"
    argv = [str(data), *SHORT, *RESNET, "--workers=1", "--log-every=1", "--batch-size=4"]
    argv += ["--epochs=12"]
    running = launch([*argv, f"--output={output}"], 2)
    until = time.monotonic() + 200
    while not (output / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=100)
    assert running.returncode != 0
    assert "stopped after step" in said
    assert "killed by signal" not in said
    before = checkpoint(output)
    assert 0 < before["at"]["step"] < 72
    finish(launch([*argv, f"--output={output}"], 2))
    finish(launch([*argv, f"--output={straight}"], 2))
    assert [row["epoch"] for row in rows(output)] == list(range(1, 13))
    found, expected = checkpoint(output), checkpoint(straight)
    weights = [key for key in found["model"] if "running" not in key]
    same([found["model"][key] for key in weights], [expected["model"][key] for key in weights])


@pytest.mark.thorough
def test_the_command_stops_and_goes_on(
    launch: Callable[..., Any], data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    argv = [str(data), *SHORT, *RESNET, "--epochs=40", "--workers=2", f"--output={output}"]
    running = launch(argv)
    until = time.monotonic() + 200
    while not (output / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=100)
    assert running.returncode == 128 + signal.SIGINT, said
    assert 0 < checkpoint(output)["at"]["step"] < 240
    finish(launch(argv))
    assert len(rows(output)) == 40


# one process, here


def test_learns_digits(example: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    """The loss falls, and the best weights are a file for `create_model` that does as logged."""
    argv = [*SHORT, *RESNET, "--epochs=6", "--label-smoothing=0", f"--output={tmp_path}"]
    example.main([str(data), *argv])
    found = rows(tmp_path)
    assert [row["epoch"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["train_loss"] < 0.7 * found[0]["train_loss"]
    assert f"{TRAIN} images, 10 classes" in capsys.readouterr().out

    weights = tmp_path / "best.pt"
    model = vertebra.create_model("resnet18", weights=weights, num_classes=10, **SIZES).eval()
    transform = vertebra.models.ImageTransform(32, 32)
    images = sorted((data / "val").rglob("*.png"))
    x = torch.stack([transform(image_module.open(image)) for image in images])
    right = [model(x).argmax(1)[n] == int(image.parent.name) for n, image in enumerate(images)]
    assert 100 * sum(right) / VAL == pytest.approx(max(row["top1"] for row in found))


@pytest.mark.thorough
def test_learns_digits_well(example: Any, tmp_path: Path) -> None:
    data = digits(tmp_path / "data", 640, 241)
    argv = [*PLAIN, *RESNET, "--epochs=6", "--warmup-epochs=1", "--batch-size=16", "--ema=0.9"]
    example.main([str(data), *argv, f"--output={tmp_path / 'out'}"])
    assert rows(tmp_path / "out")[-1]["ema_top1"] > 90


EVERYTHING = [
    *(*SHORT, *DROPPING, "--crop-scale=0.3", "--flip=0.5", "--trivial-augment", "--ema=0.5"),
    *("--clip-grad=1", "--accumulate=2", "--batch-size=4", "--optimizer=adamw", "--lr=0.01"),
    *("--warmup-epochs=1", "--amp=bf16", "--channels-last", "--layer-decay=0.8"),
]


RUNS = {"everything": EVERYTHING, "resnet": [*SHORT, *RESNET]}


@pytest.fixture(scope="module")
def straight(
    example: Any, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return where a run left its files that went through without a stop."""

    @cache
    def outcome(run: str) -> Path:
        output = tmp_path_factory.mktemp(run)
        example.main([str(data), *RUNS[run], f"--output={output}"])
        return output

    return outcome


# an epoch has 6 steps, and signals are looked for after each second one
@pytest.mark.parametrize(
    ("run", "step", "stops_at"), [("everything", 3, 4), ("everything", 6, 6), ("resnet", 9, 10)]
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    run: str,
    step: int,
    stops_at: int,
    straight: Callable[[str], Path],
    example: Any,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = [str(data), *RUNS[run], f"--output={tmp_path}"]
    handlers = [signal.getsignal(signum) for signum in example.SIGNALS]
    with monkeypatch.context() as patch:
        terminate_in(example, patch, step)
        with pytest.raises(SystemExit) as stopped:
            example.main(argv)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoint(tmp_path)["at"]["step"] == stops_at
    assert [signal.getsignal(signum) for signum in example.SIGNALS] == handlers
    torch.manual_seed(1234)  # what was drawn before has no part in it
    example.main(argv)
    found, expected = checkpoint(tmp_path), checkpoint(straight(run))
    assert found["at"] == expected["at"]
    assert found["schedule"] == expected["schedule"]
    for part in ("model", "model_ema", "optimizer"):
        same(found[part], expected[part])
    assert (tmp_path / "log.csv").read_text() == (straight(run) / "log.csv").read_text()
    assert bool(found["model_ema"]) == (run == "everything")


def test_a_second_signal_does_what_it_always_does(example: Any) -> None:
    with example.stopping_on_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_nothing_is_left_to_do(example: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    argv = [str(data), *SHORT, *CONVNEXT, f"--output={tmp_path}"]
    example.main(argv)
    before = checkpoint(tmp_path)
    example.main(argv)
    assert "0 epochs to go" in capsys.readouterr().out
    same(checkpoint(tmp_path)["model"], before["model"])


def test_workers_change_nothing(example: Any, data: Path, tmp_path: Path) -> None:
    argv = [str(data), *SHORT, *DROPPING, "--crop-scale=0.3", "--flip=0.5", "--epochs=1"]
    for workers in ("0", "2"):
        example.main([*argv, f"--output={tmp_path / workers}", f"--workers={workers}"])
    same(checkpoint(tmp_path / "2")["model"], checkpoint(tmp_path / "0")["model"])


def test_augmentation_depends_on_seed_epoch_and_image(example: Any, photos: Path) -> None:
    options = example.parse([str(photos), "--size=32", "--seed=3"])
    images, _ = example.open_images(options)
    first = images[4][0]
    torch.rand(5)
    same(images[4][0], first)
    images.epoch = 1
    other_epoch = images[4][0]
    images.epoch, images.seed = 0, 4
    assert not torch.equal(other_epoch, first)
    assert not torch.equal(images[4][0], first)


def test_a_step_sees_the_same_images_in_any_number_of_processes(example: Any, data: Path) -> None:
    def seen(processes: int, epoch: int) -> list[set[float]]:
        """Return what tells the images of each step apart: their sums of pixels."""
        steps: list[set[float]] = [set() for _ in range(2)]
        for rank in range(processes):
            options = example.parse([str(data), *SHORT, f"--batch-size={24 // processes}"])
            job = example.Job.__new__(example.Job)
            job.options, job.group = options, example.Group(torch.device("cpu"), rank, processes)
            job.training, _ = example.open_images(options)
            job.layout, job.images_per_step, job.steps = torch.contiguous_format, 24, 2
            for step, (x, _) in enumerate(job.batches(epoch, 0)):
                steps[step] |= {float(image.double().sum()) for image in x}
        return steps

    assert seen(1, 0) == seen(2, 0) == seen(3, 0)
    assert seen(1, 0) != seen(1, 1)


class WithAnother:
    """Stands in for two processes, in the other of which every value is larger by 2."""

    size = 2

    def total(self, x: Tensor) -> Tensor:
        return x.mul_(2).add_(2)


def test_running_statistics_are_averaged(example: Any) -> None:
    """Those of the averaged network too; what counts batches counts on."""
    job = example.Job.__new__(example.Job)
    job.group, job.model = WithAnother(), vertebra.create_model("resnet18", **SIZES)
    job.average = example.AveragedModel(job.model, use_buffers=True)
    job.average_statistics()
    for model in (job.model, job.average.module):
        same(model.bn1.running_mean, torch.ones(16))
        same(model.bn1.running_var, torch.full((16,), 2.0))
        assert model.bn1.num_batches_tracked == 0


def test_photographs_in_other_libraries_models(
    example: Any, photos: Path, tmp_path: Path, timm: ModuleType
) -> None:
    argv = [str(photos), "--size=64", "--epochs=1", "--warmup-epochs=0", "--workers=0"]
    argv += ["--batch-size=12", "--device=cpu", "--lr=0.01", "--ema=0.9"]
    for model in ("timm:test_convnext", "torchvision:resnet18"):
        output = tmp_path / model.partition(":")[0]
        example.main([*argv, f"--model={model}", f"--output={output}"])
        (row,) = rows(output)
        assert 0 < row["ema_loss"] < 10
        assert math.isfinite(row["train_loss"])


@pytest.mark.parametrize("model", ["timm:resnet18", "torchvision:resnet18"])
def test_other_libraries_models_are_accelerated_unless_told_not_to(
    model: str, example: Any, timm: ModuleType
) -> None:
    for flag, expected in (("--accelerate", False), ("--no-accelerate", True)):
        built = example.build(example.parse([".", f"--model={model}", flag]), 3, None)
        reasons = [site.reason for site in vertebra.interop.report(built)]
        assert reasons
        assert any(reason == "accelerate was not called" for reason in reasons) is expected
        assert built(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_starts_from_weights(example: Any, timm: ModuleType, tmp_path: Path) -> None:
    saved = timm.create_model("resnet18", num_classes=3)
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    for model in ("resnet18", "timm:resnet18"):
        options = example.parse([".", f"--model={model}"])
        built = example.build(options, 3, str(tmp_path / "weights.pt"))
        same(dict(built.state_dict()), dict(saved.state_dict()))


def test_learning_rate(example: Any) -> None:
    """Up a line, down a cosine, to nothing; early layers by `--layer-decay`."""
    model = vertebra.create_model("convnext_atto", depths=(1, 1), dims=(8, 16), num_classes=3)
    options = example.parse([".", "--lr=0.8", "--layer-decay=0.5", "--weight-decay=0.1"])
    optimizer = example.build_optimizer(model, options)
    schedule = example.build_schedule(optimizer, 4, 12)
    expected = [0.8 * (n + 1) / 5 for n in range(4)]
    expected += [0.4 * (1 + math.cos(math.pi * n / 8)) for n in range(9)]
    for rate in expected:
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate * group["lr_scale"], abs=1e-12)
        optimizer.step()
        schedule.step()
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2
    vectors = [g for g in optimizer.param_groups if all(p.ndim <= 1 for p in g["params"])]
    assert vectors
    assert {group["weight_decay"] for group in vectors} == {0.0}


def test_a_failed_write_leaves_what_was_there(example: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    example.save({"model": torch.ones(2)}, path)
    with pytest.raises(AttributeError, match="pickle"):
        example.save({"model": lambda: None}, path)
    same(torch.load(path, weights_only=True)["model"], torch.ones(2))


def test_a_loss_that_is_not_finite_ends_the_run(example: Any, data: Path, tmp_path: Path) -> None:
    """The last good checkpoint stays."""
    with pytest.raises(SystemExit, match="lower --lr"):
        example.main([str(data), *SHORT, *CONVNEXT, "--lr=1e30", f"--output={tmp_path}"])
    assert not (tmp_path / "last.pt").exists()


class Board:
    """Stands in for TensorBoard's writer."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        boards.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass


boards: list[Board] = []


def test_tensorboard(
    example: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    example.main([str(data), *SHORT, *CONVNEXT, "--tensorboard", f"--output={tmp_path}"])
    logged = {(name, step): value for name, value, step in boards.pop().scalars}
    assert [logged["top1", step] for step in (6, 12)] == [row["top1"] for row in rows(tmp_path)]


# what cannot be done


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--epochs=0"], "Invalid value for '--epochs'"),
        (["--nonsense"], "No such option: --nonsense"),
        (["--model=resnet81"], "no model is called 'resnet81'; did you mean"),
        (["--model=timm:resnet81"], "--model timm:resnet81: Unknown model"),
        (["--model=torchvision:resnet81"], "Unknown model resnet81"),
        (["--model=keras:resnet18"], "--model is NAME, timm:NAME or torchvision:NAME; got keras"),
        (["--model-options=3"], "--model-options must be a JSON object"),
        (["--model-options={"], "--model-options must be a JSON object"),
        (['--model-options={"depth": 3}'], "--model resnet18: unknown option 'depth'"),
        (["--weights=missing.pt"], "there is no file missing.pt"),
        (["--resume=missing.pt"], "--resume: there is no file missing.pt"),
        (["--sync-bn"], "--sync-bn needs a GPU: torch.nn.SyncBatchNorm does not run on a CPU"),
        (["--amp=fp16"], "--amp fp16 needs a GPU; --amp bf16 runs on a CPU too"),
        (["--device=tpu"], "--device is cuda or cpu; got tpu"),
        (["--batch-size=49"], "a step takes 49 images, and train has only 48"),
        (["--warmup-epochs=2"], "--warmup-epochs must be less than --epochs; got 2 and 2"),
        (["--resize=31"], "--resize must be --size or more, to crop from; got 31 and 32"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_options_are_a_line(
    argv: list[str], said: str, example: Any, data: Path, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stopped:
        example.main([str(data), *SHORT, f"--output={tmp_path / 'out'}", *argv])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("train_imagefolder: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tensorboard_that_is_not_installed_is_a_line(
    example: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit):
        example.main([str(data), *SHORT, *CONVNEXT, "--tensorboard", f"--output={tmp_path}"])
    assert "--tensorboard needs: pip install tensorboard" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["train", "val", "class"])
def test_a_folder_that_is_not_of_images_is_a_line(
    missing: str, example: Any, tmp_path: Path, capsys: Any
) -> None:
    data = digits(tmp_path / "data", 48, 37)
    for path in (data / missing, data / "val" / "3"):
        if path.exists():
            path.rename(tmp_path / "away")
            break
    with pytest.raises(SystemExit):
        example.main([str(data), *SHORT, f"--output={tmp_path / 'out'}"])
    error = capsys.readouterr().err
    expected = "same classes; one alone has ['3']" if missing == "class" else f"data/{missing}"
    assert expected in error
    assert error.count("\n") == 1


def test_another_run_is_not_resumed(example: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    """The checkpoint stays as it was."""
    argv = [str(data), *SHORT, *CONVNEXT, f"--output={tmp_path}"]
    example.main([*argv, "--epochs=1"])
    before = (tmp_path / "last.pt").read_bytes()
    for option, difference in (
        ("--epochs=3", "epochs 1, and this one has 3"),
        ("--batch-size=4", "images per step 8, and this one has 4"),
    ):
        with pytest.raises(SystemExit):
            example.main([*argv, "--epochs=1", option])
        assert difference in capsys.readouterr().err
    (tmp_path / "other.pt").write_bytes(before[:1000])
    with pytest.raises(SystemExit):
        example.main([*argv, "--epochs=1", f"--resume={tmp_path / 'other.pt'}"])
    assert "other.pt is no checkpoint of this command" in capsys.readouterr().err
    assert (tmp_path / "last.pt").read_bytes() == before


def test_the_documentation_has_every_option(example: Any) -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    table = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `--")]
    shown = {name.strip(" `") for cell in table for name in cell.split(",")}
    fields = [name.replace("_", "-") for name in example.Options.__dataclass_fields__]
    flags = {f"--{name}" for name in fields if name not in ("data", "accelerate")}
    assert shown == flags | {"--no-accelerate"}
