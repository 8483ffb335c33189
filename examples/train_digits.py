"""Train three small networks on scikit-learn's handwritten digits, here and in timm.

    python examples/train_digits.py
    python examples/train_digits.py --models convnext_atto --implementations vertebra timm

Every implementation starts from the same weights and sees the same batches in the same order, so
that only rounding tells them apart. `vertebra` runs on Triton where it can, `eager` is vertebra in
plain PyTorch, `timm` is timm's model of that name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import vertebra

MODELS = ("resnet18", "regnety_002", "convnext_atto")
IMPLEMENTATIONS = ("vertebra", "eager", "timm")
Step = Callable[[float], None]


class Digits:
    """1797 images of handwritten digits, (N, 1, 8, 8), in two parts by a fixed permutation."""

    def __init__(self, device: torch.device) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 8 - 1
        y = torch.tensor(labels)[order]
        self.x, self.y = x[:1437].to(device), y[:1437].to(device)
        self.test_x, self.test_y = x[1437:].to(device), y[1437:].to(device)


def build(name: str, **options: Any) -> nn.Module:
    """Build one of our networks for (N, 1, size, size) digits."""
    torch.manual_seed(0)
    return small_stem(vertebra.create_model(name, num_classes=10, in_chans=1, **options))


def build_peer(name: str, **options: Any) -> nn.Module:
    """Build timm's network of the same name."""
    import timm

    return small_stem(timm.create_model(name, num_classes=10, in_chans=1, **options))


def small_stem(model: Any) -> nn.Module:
    """Give a ResNet the stem that images of 32 pixels call for: a 3x3 without a pool."""
    if hasattr(model, "maxpool"):
        model.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def train(
    model: nn.Module,
    digits: Digits,
    *,
    epochs: int = 4,
    batch_size: int = 128,
    size: int = 32,
    lr: float = 2e-3,
    step: Step = lambda loss: None,
) -> float:
    """Train a network; return its accuracy on the test images. `step` is told every loss."""
    generator = torch.Generator().manual_seed(0)
    batches = len(digits.y) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * batches)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(digits.y), generator=generator).to(digits.x.device)
        for batch in order[: batches * batch_size].split(batch_size):
            loss = F.cross_entropy(model(resize(digits.x[batch], size)), digits.y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step(loss.item())
    # so few steps leave the running statistics of batch norms far behind the weights
    batches_seen = (resize(x, size) for x in digits.x.split(batch_size))
    torch.optim.swa_utils.update_bn(batches_seen, model)
    return accuracy(model, digits, size)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits, size: int = 32) -> float:
    """Return the share of the test images that the network gets right."""
    model.eval()
    right = [
        (model(resize(x, size)).argmax(1) == y).sum()
        for x, y in zip(digits.test_x.split(120), digits.test_y.split(120), strict=True)
    ]
    return float(torch.stack(right).sum()) / len(digits.test_y)


def resize(x: Tensor, size: int) -> Tensor:
    """Enlarge the digits to what the networks' strides leave something of."""
    return F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def compare(
    name: str, implementations: Sequence[str], digits: Digits, **options: Any
) -> Iterator[tuple[str, float]]:
    """Train one network in each implementation, from the same weights; yield accuracies."""
    for implementation in implementations:
        ours = build(name)
        if implementation == "timm":
            model = build_peer(name)
            model.load_state_dict(vertebra.models.export_weights(ours, "timm"))
        else:
            model = ours
        path = "eager" if implementation == "eager" else "auto"
        with vertebra.backend(path):
            yield implementation, train(model.to(digits.x.device), digits, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, show the progress, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=MODELS, help=", ".join(MODELS))
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS[:2]
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="pixels that the 8x8 digits become")
    options = parser.parse_args(argv)

    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = Digits(device)
    steps = options.epochs * (len(digits.y) // options.batch_size)
    table = Table("model", *options.implementations, title="accuracy on 360 test digits")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        for name in options.models:
            task = progress.add_task(name, total=steps * len(options.implementations), loss=0.0)
            results = compare(
                name,
                options.implementations,
                digits,
                epochs=options.epochs,
                batch_size=options.batch_size,
                size=options.size,
                step=lambda loss, task=task: progress.update(task, advance=1, loss=loss),
            )
            table.add_row(name, *(f"{100 * value:.1f} %" for _, value in results))
    console.print(table)


if __name__ == "__main__":
    main()
