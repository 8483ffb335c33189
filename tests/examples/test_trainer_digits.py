"""The Trainer example: it learns, resumes where it stopped, and loads what it saved."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from vertebra.interop._swap import Swapped

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
pytestmark = pytest.mark.usefixtures("eager_on_one_thread")

PATH = Path(__file__).parents[2] / "examples" / "trainer_digits.py"
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
TINY: dict[str, dict[str, Any]] = {
    "regnety_002": {**_STAGES, "stem_width": 8},
    "transformers/resnet": {**_STAGES, "embedding_size": 8},
    "transformers/convnext": {**_STAGES, "num_stages": 2, "drop_path_rate": 0.1},
}


@pytest.fixture(scope="module")
def example(transformers):
    spec = importlib.util.spec_from_file_location("trainer_digits", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register()
    return module


def trainer(example, name: str, output: Path) -> Any:
    example.set_seed(0)
    return example.make_trainer(
        example.build(name, **TINY[name]),
        output,
        train=Subset(example.Digits(slice(1437), 16), range(40)),
        test=Subset(example.Digits(slice(1437, None), 16), range(10)),
        epochs=2,
        batch_size=8,
    )


def is_accelerated(model: nn.Module) -> bool:
    return any(isinstance(module, Swapped) for module in model.modules())


@pytest.mark.parametrize("name", TINY)
def test_resumes_where_it_stopped(name: str, example, tmp_path) -> None:
    """Two epochs at once, or the second by a new process from the first's checkpoint."""
    whole = trainer(example, name, tmp_path)
    assert is_accelerated(whole.model) == (name in example.THEIRS)
    assert name in example.THEIRS or not whole.model_accepts_loss_kwargs  # as ConvNeXt's there
    whole.train()
    resumed = trainer(example, name, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert is_accelerated(resumed.model) == (name in example.THEIRS)
    assert resumed.state.global_step == whole.state.global_step == 10
    state = resumed.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", TINY)
def test_loads_what_it_saved(name: str, example, tmp_path) -> None:
    """Every bit of the logits, by Trainer and by hand."""
    ours = trainer(example, name, tmp_path)
    ours.train()
    assert example.reload(ours, tmp_path / "trained", ours.eval_dataset) == 0
    loaded = example.AutoModelForImageClassification.from_pretrained(tmp_path / "trained")
    assert not is_accelerated(loaded)  # what is saved is transformers' own
    x = torch.stack([row["pixel_values"] for row in ours.eval_dataset])
    with torch.no_grad():
        expected = ours.model.eval()(x).logits
        assert torch.equal(example.on_our_ops(loaded)(x).logits, expected)


def test_trains_with_activation_checkpointing(example, tmp_path) -> None:
    """With Trainer's own option; the numbers are those of training without."""
    weights = []
    for option in (False, True):
        ours = trainer(example, "regnety_002", tmp_path / str(option))
        ours.args.activation_checkpointing = option
        ours.train()
        assert ours.model.gradient_checkpointing == option
        weights.append(ours.model.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, msg=lambda m, key=key: f"{key}: {m}")


def test_the_command(example, tmp_path, capsys, monkeypatch) -> None:
    build = example.build
    monkeypatch.setattr(example, "build", lambda name: build(name, **TINY[name]))
    command = f"--model regnety_002 --epochs 1 --batch-size 720 --size 16 --output {tmp_path}"
    example.main(command.split())
    printed = " ".join(capsys.readouterr().out.split())
    assert "360 digits" in printed
    assert "regnety_002" in printed
    assert (tmp_path / "trained" / "model.safetensors").is_file()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["convnext_atto", "transformers/convnext"])
def test_it_learns(name: str, example, tmp_path) -> None:
    example.set_seed(0)
    test = example.Digits(slice(1437, None), 32)
    train = example.Digits(slice(1437), 32)
    ours = example.make_trainer(example.build(name), tmp_path, train=train, test=test)
    ours.train()
    assert ours.evaluate()["eval_accuracy"] > 0.85
