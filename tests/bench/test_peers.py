"""The peers' models and the weights they are given."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from vertebra.bench import peers, photos
from vertebra.bench.runner import Unavailable

pytestmark = pytest.mark.parity
pytest.importorskip("sklearn")


def test_both_peers_import_in_a_fresh_process() -> None:
    code = "from vertebra.bench import peers; peers.timm(); print(peers.torchvision().__version__)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_random_weights_leave_no_norm_at_its_default() -> None:
    torch.manual_seed(0)
    model = peers.reference_model("resnet18")
    peers.randomise(model, photos.batch(4, 64), seed=0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert all(norm.momentum == 0.1 for norm in norms)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert all(getattr(norm, name).std() > 0 for norm in norms), name


def test_random_weights_tell_images_apart() -> None:
    images = photos.batch(4, 64)
    logits: list[torch.Tensor] = []
    for _ in range(2):
        torch.manual_seed(0)
        model = peers.reference_model("resnet18")
        peers.randomise(model, images, seed=0)
        logits.append(model.eval()(images).detach())
    assert torch.equal(*logits)  # the same weights every time
    assert len(set(logits[0].argmax(1).tolist())) > 1


def test_timm_stands_in_where_torchvision_has_no_such_model() -> None:
    assert isinstance(peers.reference_model("resnet26"), nn.Module)
    with pytest.raises(Unavailable, match="timm has no resnet0"):
        peers.reference_model("resnet0")


def test_weights_with_other_names_are_refused() -> None:
    model = peers.timm_model("resnet18")
    with pytest.raises(Unavailable, match="other names"):
        peers.load(model, {"stem.weight": torch.zeros(1)})
