"""Train on scikit-learn's handwritten digits with the Trainer of transformers.

    python examples/trainer_digits.py
    python examples/trainer_digits.py --model resnet18 --output runs/resnet18
    python examples/trainer_digits.py --model transformers/convnext
    python examples/trainer_digits.py --model transformers/convnext --resume

The model is one of ours, by its name in `vertebra.list_models()`, as a model of transformers; or a
ResNet or a ConvNeXt of transformers itself, put on our ops by `vertebra.accelerate`. Trainer
evaluates and writes a checkpoint after every epoch, and `--resume` goes on from the last one, where
a run was cut short. The trained model is saved, loaded again by transformers, and should classify
as it did before: the table has the number of digits it sees differently.

Needs scikit-learn, and transformers with what its Trainer asks for: pip install accelerate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    PreTrainedModel,
    ResNetConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

import vertebra
from vertebra.interop.transformers import VertebraConfig, register

THEIRS = {
    "transformers/resnet": (
        ResNetConfig,
        {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    ),
    "transformers/convnext": (
        ConvNextConfig,
        {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2]},
    ),
}


class Digits(Dataset[dict[str, Tensor]]):
    """Digits of the 1797 in a fixed order, each (1, size, size), as Trainer collates them."""

    def __init__(self, part: slice, size: int) -> None:
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[part]
        images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 8 - 1
        self.images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        self.labels = torch.tensor(labels)[order]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def build(name: str, **options: Any) -> PreTrainedModel:
    """Build a model for ten classes of gray images; `options` go to the network's config."""
    ours = {"num_channels": 1, "num_labels": 10}
    if name in THEIRS:
        config, own = THEIRS[name]
        settings: Any = config(**{**own, **options}, **ours)
    else:
        settings = VertebraConfig(architecture=name, model_args=options, **ours)
    return on_our_ops(AutoModelForImageClassification.from_config(settings))


def on_our_ops(model: PreTrainedModel) -> PreTrainedModel:
    """Accelerate a model of transformers; one of ours is on our ops as it is."""
    return vertebra.accelerate(model)


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of right answers, under the name that Trainer reports it by."""
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(right.mean())}


def make_trainer(
    model: PreTrainedModel,
    output: Path,
    *,
    train: Dataset[Any],
    test: Dataset[Any],
    epochs: int = 4,
    batch_size: int = 128,
    lr: float = 2e-3,
) -> Trainer:
    """Return a Trainer that evaluates and saves after every epoch."""
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        dataloader_pin_memory=torch.cuda.is_available(),
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.3,  # of all steps
        weight_decay=0.02,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,
        report_to="none",
    )
    return Trainer(
        model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=accuracy
    )


def reload(trainer: Trainer, folder: Path, test: Dataset[Any]) -> int:
    """Save the model, load it, and return how many of its predictions differ."""
    trainer.save_model(str(folder))
    loaded = on_our_ops(AutoModelForImageClassification.from_pretrained(folder))
    again = Trainer(loaded, trainer.args, eval_dataset=test)
    before, after = (t.predict(test).predictions.argmax(-1) for t in (trainer, again))
    return int((before != after).sum())


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, save, load, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--model", default="convnext_atto", help=f"a name of ours, or {', '.join(THEIRS)}"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/trainer_digits"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="pixels that the 8x8 digits become")
    options = parser.parse_args(argv)

    register()
    set_seed(0)
    test = Digits(slice(1437, None), options.size)
    trainer = make_trainer(
        build(options.model),
        options.output,
        train=Digits(slice(1437), options.size),
        test=test,
        epochs=options.epochs,
        batch_size=options.batch_size,
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    found = trainer.evaluate()["eval_accuracy"]
    differing = reload(trainer, options.output / "trained", test)
    table = Table("model", "accuracy", "predictions that differ after loading", title="360 digits")
    table.add_row(options.model, f"{100 * found:.1f} %", str(differing))
    Console().print(table)


if __name__ == "__main__":
    main()
