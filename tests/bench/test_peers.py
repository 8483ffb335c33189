"""The peers' models and the weights they are given."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import vertebra
from vertebra.bench import peers, photos
from vertebra.bench.runner import Unavailable
from vertebra.models import export_weights

pytestmark = pytest.mark.parity
pytest.importorskip("sklearn")


def test_both_peers_import_in_a_fresh_process() -> None:
    code = "from vertebra.bench import peers; peers.timm(); print(peers.torchvision().__version__)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_random_weights_leave_no_norm_at_its_default() -> None:
    torch.manual_seed(0)
    _, model = peers.reference_model("resnet18")
    peers.randomise(model, photos.batch(4, 64), seed=0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert all(norm.momentum == 0.1 for norm in norms)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert all(getattr(norm, name).std() > 0 for norm in norms), name


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "convnextv2_atto"])
def test_random_weights_tell_images_and_branches_apart(name) -> None:
    images = photos.batch(4, 64)
    logits: list[torch.Tensor] = []
    for _ in range(2):
        torch.manual_seed(0)
        _, model = peers.reference_model(name)
        peers.randomise(model, images, seed=0)
        logits.append(model.eval()(images).detach())
    assert torch.equal(*logits)  # the same weights every time
    assert len(set(logits[0].argmax(1).tolist())) > 1
    for key, parameter in model.named_parameters():  # no branch is scaled to nothing
        assert parameter.std() > 1e-3, key


def test_a_residual_branch_that_is_off_shows() -> None:
    images = photos.batch(4, 64)
    _, model = peers.reference_model("convnext_tiny")
    peers.randomise(model, images, seed=0)
    with torch.no_grad():
        before = model.eval()(images)
        dict(model.named_parameters())["features.5.3.layer_scale"].mul_(1.05)
        change = (model(images) - before).norm() / before.norm()
    assert change > 1e-4  # a hundred times the error of fp32


def test_timm_stands_in_where_torchvision_has_no_such_model() -> None:
    assert peers.reference_model("resnet18")[0] == "torchvision"
    assert peers.reference_model("resnet26")[0] == "timm"
    with pytest.raises(Unavailable, match="timm has no resnet0"):
        peers.reference_model("resnet0")


@pytest.mark.parametrize(
    ("name", "library", "module"),
    [
        ("regnet_x_400mf", "timm", "timm.models.regnet"),  # regnetx_004_tv, not regnetx_004
        ("regnety_016", "torchvision", "torchvision.models.regnet"),
        ("resnet18", "transformers", "transformers.models.resnet"),
    ],
)
def test_a_network_is_found_under_the_name_a_library_gives_it(name, library, module) -> None:
    ours = vertebra.create_model(name)
    theirs = peers.build(library, name, ours)
    assert type(theirs).__module__.startswith(module)
    assert not any(parameter.is_meta for parameter in theirs.parameters())
    exported = export_weights(ours, library)
    assert all(torch.equal(value, exported[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("name", "library", "reason"),
    [
        ("resnet10t", "torchvision", "torchvision has no resnet10t"),
        ("resnext50_32x4d", "transformers", "cannot express"),
        ("regnety_008", "torchvision", "regnet_y_800mf is another network"),
    ],
)
def test_what_a_library_lacks_is_said(name, library, reason) -> None:
    with pytest.raises(Unavailable, match=reason):
        peers.build(library, name, vertebra.create_model(name))
