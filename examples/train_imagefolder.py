"""Train a classifier on a folder of images, in one process or in many.

    python examples/train_imagefolder.py DATA
    torchrun --nproc_per_node=8 examples/train_imagefolder.py DATA --model resnet50 --amp bf16

DATA holds train/CLASS/IMAGE and val/CLASS/IMAGE. The models are vertebra's, or another library's on
vertebra's kernels: `--model timm:resnet50`, `--model torchvision:resnet50`.

The same command goes on where it was stopped, in the middle of an epoch too. On a CPU the result is
that of the run that was never stopped, bit for bit: random numbers depend on the seed and on what
they are for, (epoch, image) or (step, process), and never on what was drawn before.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

import vertebra
from vertebra.models import ImageTransform, param_groups_layer_decay, param_groups_weight_decay

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
except ImportError as missing:
    raise SystemExit(f"{missing}; this needs: pip install 'vertebra[cli,peers]'") from None


@dataclass(frozen=True)
class Options:
    """Train a classifier on a folder of images. The same command again goes on where it stopped."""

    data: Annotated[Path, typer.Argument(help="Folder of train/CLASS/IMAGE and val/CLASS/IMAGE.")]
    model: Annotated[
        str, typer.Option(help="NAME, or another library's timm:NAME, torchvision:NAME.")
    ] = "resnet18"
    model_options: Annotated[
        str, typer.Option(help="More of the model's arguments, as a JSON object.")
    ] = "{}"
    weights: Annotated[str | None, typer.Option(help="File or hub id to start from.")] = None
    accelerate: Annotated[
        bool, typer.Option(help="Put another library's model on vertebra's kernels.")
    ] = True
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and logs.")] = Path("out")
    resume: Annotated[
        Path | None, typer.Option(help="Checkpoint to go on from (OUTPUT/last.pt, if there).")
    ] = None

    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 90
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once, in each process.")] = 64
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per optimizer step.")] = 1
    optimizer: Annotated[
        Literal["sgd", "adamw"], typer.Option(help="SGD has Nesterov's momentum of 0.9.")
    ] = "sgd"
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate.")] = 0.1
    weight_decay: Annotated[
        float, typer.Option(min=0, help="For all but biases and other vectors.")
    ] = 5e-5
    layer_decay: Annotated[
        float, typer.Option(min=0, max=1, help="Learning rate of a layer by that of the next.")
    ] = 1.0
    warmup_epochs: Annotated[
        int, typer.Option(min=0, help="Epochs of rising learning rate; a cosine follows.")
    ] = 5
    label_smoothing: Annotated[float, typer.Option(min=0, max=1, help="In the loss.")] = 0.1
    clip_grad: Annotated[
        float, typer.Option(min=0, help="Largest norm of the gradient; 0 for any.")
    ] = 0.0
    ema: Annotated[
        float, typer.Option(min=0, max=1, help="Decay of averaged weights; 0 for none.")
    ] = 0.0

    amp: Annotated[Literal["no", "bf16", "fp16"], typer.Option(help="Type of autocast.")] = "no"
    channels_last: Annotated[bool, typer.Option(help="Memory format of the network.")] = False
    sync_bn: Annotated[
        bool, typer.Option(help="Batch statistics over all processes; needs GPUs.")
    ] = False
    device: Annotated[str | None, typer.Option(help="cuda or cpu (cuda if there is one).")] = None
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0

    size: Annotated[int, typer.Option(min=1, help="Pixels per side.")] = 224
    resize: Annotated[
        int | None, typer.Option(help="Short side before the validation crop (SIZE * 8/7).")
    ] = None
    crop_scale: Annotated[
        float, typer.Option(min=0.01, max=1, help="Least area of a training crop, 1 for all.")
    ] = 0.08
    flip: Annotated[float, typer.Option(min=0, max=1, help="Probability of mirroring.")] = 0.5
    trivial_augment: Annotated[bool, typer.Option(help="TrivialAugment too.")] = False
    workers: Annotated[int, typer.Option(min=0, help="Loaders of images per process.")] = 4

    log_every: Annotated[
        int, typer.Option(min=1, help="Steps between looks at the loss and at signals.")
    ] = 10
    tensorboard: Annotated[bool, typer.Option(help="Log for TensorBoard, beside log.csv.")] = False


# what a resumed run may change: the others decide what is computed
FREE = (
    *("data", "weights", "accelerate", "output", "resume", "batch_size", "accumulate"),
    *("channels_last", "workers", "device", "log_every", "tensorboard"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train; where the options cannot be followed, say why in a line."""
    try:
        options = parse(argv)
        if options is None:
            return
        job = Job(options, Group.join(options))
    except (ImportError, KeyError, OSError, ValueError) as error:
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        sys.stderr.write(f"train_imagefolder: {' '.join(message.split())}\n")
        raise SystemExit(2) from None
    try:
        job.run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse(argv: Sequence[str] | None) -> Options | None:
    """Return what the command line asks for, None if that is help."""
    app = typer.Typer(add_completion=False)
    app.command()(Options)  # its fields are to typer what the parameters of a function are
    try:
        options = app(argv, standalone_mode=False)
    except Exception as error:  # typer exports no class that all its errors are of
        raise ValueError(error.format_message()) from None
    return options if isinstance(options, Options) else None


@dataclass(frozen=True)
class Group:
    """The processes that train together, and the device of this one."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, options: Options) -> Group:
        """Join the processes that torchrun started, if it did."""
        kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind not in ("cuda", "cpu"):
            raise ValueError(f"--device is cuda or cpu; got {kind}")
        if kind == "cpu" and options.sync_bn:
            raise ValueError("--sync-bn needs a GPU: torch.nn.SyncBatchNorm does not run on a CPU")
        if kind == "cpu" and options.amp == "fp16":
            raise ValueError("--amp fp16 needs a GPU; --amp bf16 runs on a CPU too")
        if kind == "cuda":
            here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
            if here > gpus:
                raise ValueError(
                    f"each process needs a GPU of its own: there are {here} processes and {gpus} "
                    "GPUs; lower --nproc_per_node, or give --device cpu"
                )
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.backends.cudnn.benchmark = True  # all images have one size
        device = torch.device(kind, torch.cuda.current_device() if kind == "cuda" else None)
        if "RANK" not in os.environ:
            return cls(device)
        if kind == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        return cls(device, dist.get_rank(), dist.get_world_size())

    def total(self, x: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


# the images


class TrainingImages(ImageFolder):
    """A folder of images, whose augmentation depends on the seed, the epoch and the image alone."""

    seed = epoch = 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an augmented image and its class."""
        reseed(self.seed, self.epoch, index)
        return super().__getitem__(index)


def open_images(options: Options) -> tuple[TrainingImages, ImageFolder]:
    """Open the training images and those for validation."""
    size, resize = options.size, options.resize or round(options.size * 8 / 7)
    if resize < size:
        raise ValueError(f"--resize must be --size or more, to crop from; got {resize} and {size}")
    validation = ImageTransform(size, resize)
    augmentation = v2.Compose(
        [
            v2.RandomResizedCrop(size, (options.crop_scale, 1.0)),
            v2.RandomHorizontalFlip(options.flip),
            v2.TrivialAugmentWide() if options.trivial_augment else v2.Identity(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(validation.mean, validation.std),
        ]
    )
    training = TrainingImages(options.data / "train", augmentation)
    training.seed = options.seed
    held_out = ImageFolder(options.data / "val", validation)
    if training.classes != held_out.classes:
        odd = sorted(set(training.classes) ^ set(held_out.classes))
        raise ValueError(f"train and val must have the same classes; one alone has {odd[:5]}")
    return training, held_out


def reseed(*key: int) -> None:
    """Start torch's generators from the seed and what the numbers are for."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


# the model and what trains it


def build(options: Options, classes: int, weights: str | None) -> nn.Module:
    """Build the network that `--model` names, with the weights it is to start from."""
    torch.manual_seed(options.seed)
    library, _, name = options.model.rpartition(":")
    try:
        more = dict(json.loads(options.model_options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--model-options must be a JSON object: {error}") from error
    if library == "timm":
        import timm

        if weights and Path(weights).exists():
            more["checkpoint_path"] = weights
        elif weights:
            more |= {"pretrained": True, "pretrained_cfg_overlay": {"hf_hub_id": weights}}
        create = timm.create_model
    elif library == "torchvision":
        from torchvision.models import get_model as create

        more |= {"weights": weights} if weights else {}
    elif library == "":
        create = vertebra.create_model
        more |= {"weights": weights} if weights else {}
    else:
        raise ValueError(f"--model is NAME, timm:NAME or torchvision:NAME; got {options.model}")
    try:
        model = create(name, num_classes=classes, **more)
    except (RuntimeError, TypeError) as error:  # weights or options that are not this network's
        raise ValueError(f"--model {options.model}: {error}") from error
    if options.sync_bn:
        model = vertebra.nn.convert_sync_batchnorm(model)
    return vertebra.accelerate(model) if options.accelerate else model


def build_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """Build the optimizer: vectors do not decay, and early layers may learn slower."""
    own: Any = getattr(model, "no_weight_decay", set)
    if options.layer_decay < 1:
        decay = options.layer_decay
        groups = param_groups_layer_decay(model, options.weight_decay, decay, own())
        groups = [{**group, "lr": options.lr * group["lr_scale"]} for group in groups]
    else:
        groups = param_groups_weight_decay(model, options.weight_decay, own())
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, options.lr)
    return torch.optim.SGD(groups, options.lr, momentum=0.9, nesterov=True)


def build_schedule(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> LRScheduler:
    """Build the learning rate's course: up a line, down a cosine."""
    cosine = CosineAnnealingLR(optimizer, steps - warmup)
    if not warmup:
        return cosine
    line = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [line, cosine], [warmup])


# training


@dataclass
class Progressed:
    """How far a run is."""

    step: int = 0  # of the optimizer, over all epochs
    loss: float = 0.0  # summed over the steps of the epoch that is not whole yet
    history: list[dict[str, float]] = field(default_factory=list)  # a row for each whole epoch


class Job:
    """A training run: everything it needs, put where its checkpoint left it."""

    def __init__(self, options: Options, group: Group) -> None:
        self.options, self.group = options, group
        self.training, self.held_out = open_images(options)
        self.images_per_step = options.batch_size * options.accumulate * group.size
        self.steps = len(self.training) // self.images_per_step  # per epoch
        if not self.steps:
            raise ValueError(
                f"a step takes {self.images_per_step} images, and train has only "
                f"{len(self.training)}; lower --batch-size or --accumulate"
            )
        if options.warmup_epochs >= options.epochs:
            raise ValueError(
                f"--warmup-epochs must be less than --epochs; got {options.warmup_epochs} "
                f"and {options.epochs}"
            )

        checkpoint = find_checkpoint(options, group)
        weights = None if checkpoint else options.weights
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = build(options, len(self.training.classes), weights)
        self.model.to(group.device, memory_format=self.layout)
        self.average: AveragedModel | None = None
        if options.ema:
            average = get_ema_multi_avg_fn(options.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
        self.optimizer = build_optimizer(self.model, options)
        self.schedule = build_schedule(
            self.optimizer, options.warmup_epochs * self.steps, options.epochs * self.steps
        )
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=options.amp == "fp16")
        self.at = Progressed()
        if checkpoint:
            self.restore(checkpoint)

        self.parallel = self.model
        if group.size > 1:
            self.parallel = DistributedDataParallel(self.model)
        options.output.mkdir(parents=True, exist_ok=True)
        self.console = Console(quiet=group.rank > 0, highlight=False)
        self.board = open_board(options, self.at.step) if group.rank == 0 else None

    def run(self) -> None:
        """Train to the end, or until asked to stop."""
        epochs = range(len(self.at.history), self.options.epochs)
        self.console.print(
            f"{self.options.model}: {len(self.training)} images, {len(self.training.classes)} "
            f"classes, {self.group.size} x {self.group.device.type}; {len(epochs)} epochs to go"
        )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
        )
        hidden = self.group.rank > 0 or not self.console.is_terminal
        with (
            Progress(*columns, console=self.console, transient=True, disable=hidden) as progress,
            stopping_on_signals() as signals,
        ):
            for epoch in epochs:
                is_whole = self.train(epoch, progress, signals)
                self.average_statistics()
                if is_whole:
                    self.evaluate_both(epoch)
                if self.group.rank == 0:
                    self.write(is_whole)
                self.group.wait()  # torchrun ends the others when one is gone, and one still writes
                if not is_whole:
                    self.console.print(f"stopped after step {self.at.step}; run it again to go on")
                    raise SystemExit(128 + (signals or [signal.SIGTERM])[0])

    def train(self, epoch: int, progress: Progress, signals: Sequence[int]) -> bool:
        """Train for what is left of an epoch; return False if a process was asked to stop."""
        options, group, at = self.options, self.group, self.at
        done = at.step - epoch * self.steps
        task = progress.add_task(f"epoch {epoch + 1}", total=self.steps, completed=done, loss=0.0)
        loss = torch.zeros((), dtype=torch.float64, device=group.device)
        self.model.train()
        for number, (images, labels) in enumerate(self.batches(epoch, done), 1):
            is_step = number % options.accumulate == 0
            reseed(options.seed, epoch, done * options.accumulate + number, group.rank)
            waits = nullcontext() if is_step or group.size == 1 else self.parallel.no_sync()
            with waits:
                with self.autocast():
                    share = self.criterion(self.parallel(images), labels) / options.accumulate
                self.scaler.scale(share).backward()
            loss += share.detach()
            if not is_step:
                continue
            self.step()
            is_end = at.step == (epoch + 1) * self.steps
            if is_end or at.step % options.log_every == 0:
                seen = torch.stack([loss, loss.new_tensor(len(signals))])
                seen_loss, is_stopped = group.total(seen).tolist()
                at.loss += seen_loss / group.size
                loss.zero_()
                if not math.isfinite(at.loss):
                    raise SystemExit(f"the loss is {at.loss} after step {at.step}; lower --lr")
                steps = at.step - epoch * self.steps
                progress.update(task, completed=steps, loss=at.loss / steps)
                if is_stopped:
                    return False
        progress.remove_task(task)
        return True

    def batches(self, epoch: int, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what is left of an epoch for this process after `done` steps.

        Together the processes see the same images in a step, however many processes there are.
        """
        options, group = self.options, self.group
        sampler = DistributedSampler(
            self.training, group.size, group.rank, seed=options.seed, drop_last=True
        )
        sampler.set_epoch(epoch)
        self.training.epoch = epoch
        mine = self.images_per_step // group.size
        return self.load(self.training, list(sampler)[done * mine : self.steps * mine])

    def load(self, images: ImageFolder, order: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels on the device, in batches, in that order."""
        device = self.group.device
        loader = DataLoader(
            images,
            self.options.batch_size,
            sampler=order,
            num_workers=self.options.workers,
            worker_init_fn=ignore_signals,
            pin_memory=device.type == "cuda",
        )
        for x, y in loader:
            x = x.to(device, non_blocking=True, memory_format=self.layout)
            yield x, y.to(device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """Return the context that the network runs in."""
        dtype = torch.float16 if self.options.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.group.device.type, dtype, enabled=self.options.amp != "no")

    def step(self) -> None:
        """Take a step of the optimizer and of all that goes with it."""
        if self.options.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.at.step += 1

    def average_statistics(self) -> None:
        """Average the running statistics, to which each process added its own images."""
        if self.group.size > 1:
            for buffer in [
                *self.model.buffers(),
                *(self.average.buffers() if self.average else ()),
            ]:
                if buffer.is_floating_point():
                    self.group.total(buffer).div_(self.group.size)

    def evaluate_both(self, epoch: int) -> None:
        """Evaluate the network, and its average if there is one; log what was found."""
        row = {
            "epoch": epoch + 1,
            "lr": self.schedule.get_last_lr()[-1],
            "train_loss": self.at.loss / self.steps,
            **self.evaluate(self.model),
        }
        if self.average:
            row |= {f"ema_{key}": value for key, value in self.evaluate(self.average).items()}
        self.at.history.append(row)
        self.at.loss = 0.0
        shown = (f"{key} {value:.4g}" for key, value in row.items())
        self.console.print("  ".join(shown), soft_wrap=True)
        if self.board:
            for key, value in row.items():
                self.board.add_scalar(key, value, self.at.step)
            self.board.flush()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return loss and accuracies on the validation images, each of which is seen once.

        A DistributedSampler would give some images twice where they do not divide evenly.
        """
        counts = torch.zeros(4, dtype=torch.float64, device=self.group.device)
        model.eval()
        mine = range(self.group.rank, len(self.held_out), self.group.size)
        for x, y in self.load(self.held_out, mine):
            with self.autocast():
                logits = model(x).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
            loss = nn.functional.cross_entropy(logits, y, reduction="sum")
            found = (loss, hits[:, 0].sum(), hits.sum(), y.new_tensor(len(y)))
            counts += torch.stack([value.double() for value in found])
        loss, top1, top5, images = self.group.total(counts).tolist()
        return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}

    # checkpoints

    def write(self, is_whole: bool) -> None:
        """Write the log, after a best epoch its weights, and last what training goes on from."""
        output, history = self.options.output, self.at.history
        if history:
            text = io.StringIO()
            writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)
            (output / "log.csv").write_text(text.getvalue())
        key = "ema_top1" if self.average else "top1"
        if is_whole and history[-1][key] == max(row[key] for row in history):
            best = self.average.module if self.average else self.model
            save({"model": best.state_dict()}, output / "best.pt")
        save(self.state(), output / "last.pt")

    def state(self) -> dict[str, Any]:
        """Return all that changes while training, and what it belongs to."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self.average.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "at": asdict(self.at),
            "run": self.identity(),
        }

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a run to be the same."""
        given = {key: value for key, value in asdict(self.options).items() if key not in FREE}
        images = {"training images": len(self.training), "classes": self.training.classes}
        return {**given, "images per step": self.images_per_step, **images}

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of this run."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            run, at = state["run"], Progressed(**state["at"])
        except OSError:
            raise
        except Exception as error:  # the reader has many for a file it cannot make sense of
            raise ValueError(f"{path} is no checkpoint of this command: {error}") from error
        for key, now in self.identity().items():
            if run.get(key) != now:
                raise ValueError(
                    f"{path} is of a run with {key} {run.get(key)}, and this one has {now}; give "
                    "the options it began with, or another --output"
                )
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.load_state_dict(state["model_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.at = at


def find_checkpoint(options: Options, group: Group) -> Path | None:
    """Return the checkpoint to go on from, if there is one."""
    path = options.resume or options.output / "last.pt"
    seen = group.total(torch.tensor(float(path.exists()), device=group.device)).item()
    if 0 < seen < group.size:
        raise ValueError(f"{path} must be where all processes see it; {seen:.0f} of them do")
    if options.resume and not seen:
        raise ValueError(f"--resume: there is no file {path}")
    return path if seen else None


def save(state: dict[str, Any], path: Path) -> None:
    """Write a file that is there as a whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def open_board(options: Options, step: int) -> Any:
    """Open the log for TensorBoard, if it is asked for, at the step training goes on from."""
    if not options.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"--tensorboard needs: pip install tensorboard ({error})") from error
    return SummaryWriter(str(options.output), purge_step=step)


# signals

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_on_signals() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM in a list; the next one does what it always does."""
    received: list[int] = []

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def receive(signum: int, _: Any) -> None:
        received.append(signum)
        restore()

    before = {signum: signal.signal(signum, receive) for signum in SIGNALS}
    try:
        yield received
    finally:
        restore()


def ignore_signals(_: int) -> None:
    """Let a loader's worker live on: Ctrl-C and torchrun signal it too, and the step needs it."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


if __name__ == "__main__":
    main()
