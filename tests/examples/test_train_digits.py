"""The digits example: the same training on kernels, in plain PyTorch and in timm."""

import importlib.util
from pathlib import Path

import pytest
import torch

import vertebra

pytest.importorskip("sklearn")
PATH = Path(__file__).parents[2] / "examples" / "train_digits.py"
TINY = {
    "resnet18": {"layers": (1,), "hidden_sizes": (16,), "embedding_size": 8},
    "regnety_002": {"depths": (1, 1), "hidden_sizes": (8, 16), "stem_width": 8},
    "convnext_atto": {"depths": (1, 1), "dims": (8, 16)},
    "convnextv2_atto": {"depths": (1, 1), "dims": (8, 16)},
}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_digits", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Few:
    """Two batches of digits to train on, one to test."""

    def __init__(self, digits) -> None:
        self.x, self.y = digits.x[:16], digits.y[:16]
        self.test_x, self.test_y = digits.test_x[:8], digits.test_y[:8]


@pytest.mark.parametrize("name", TINY)
def test_kernels_train_as_eager_does(name: str, example, device) -> None:
    """Step by step the same loss, up to rounding; the accuracy follows."""
    digits = Few(example.Digits(device))
    losses: dict[str, list[float]] = {}
    for path in ("eager", "triton"):
        losses[path] = []
        torch.manual_seed(0)
        model = vertebra.create_model(name, num_classes=10, in_chans=1, **TINY[name]).to(device)
        with vertebra.backend(path):
            example.train(
                model, digits, epochs=2, batch_size=8, size=16, lr=0.02, step=losses[path].append
            )
    assert len(losses["triton"]) == 4
    torch.testing.assert_close(losses["triton"], losses["eager"], rtol=1e-3, atol=1e-4)
    assert max(losses["eager"]) > 1.02 * min(losses["eager"])


@pytest.mark.thorough
@pytest.mark.parity
@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "convnext_atto"])
def test_reaches_the_accuracy_of_timm(name: str, example, timm, device) -> None:
    found = dict(example.compare(name, ["eager", "timm"], example.Digits(device), epochs=4))
    assert min(found.values()) > 0.85
    assert abs(found["eager"] - found["timm"]) < 0.03


def test_the_command(example, capsys) -> None:
    command = "--models convnext_atto --implementations eager --epochs 1 --batch-size 700"
    with vertebra.backend("eager"):
        example.main([*command.split(), "--size", "32"])
    assert "accuracy on 360 test digits" in " ".join(capsys.readouterr().out.split())
