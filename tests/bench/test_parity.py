"""The parity command: small members of each family, and what it must not let pass."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vertebra.__main__ import app
from vertebra.bench import parity

pytestmark = pytest.mark.parity
SIZES = (64, 45)
PLENTY = 2**40


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("resnet18", "torchvision"),
        ("resnet10t", "timm"),
        ("resnet18", "transformers"),
        ("regnet_y_400mf", "torchvision"),
        ("regnety_002", "timm"),
        ("regnetx_002", "transformers"),
        ("convnext_tiny", "torchvision"),
        ("convnextv2_atto", "timm"),
        ("convnext_atto", "transformers"),
        ("convnextv2_atto", "transformers"),
    ],
)
def test_members_are_those_of_the_peers(name: str, peer: str) -> None:
    row = parity.compare(name, peer, SIZES, PLENTY)
    assert not row.failed, row
    assert row.outputs.keys() == set(SIZES)
    assert row.gradients is not None


def test_what_a_peer_lacks() -> None:
    for name, peer in (("resnet10t", "torchvision"), ("regnet_x_400mf", "timm")):
        with pytest.raises(parity.Unavailable, match=f"{peer} has no {name}"):
            parity.compare(name, peer, SIZES, PLENTY)
    with pytest.raises(parity.Unavailable, match="cannot express"):
        parity.compare("resnext50_32x4d", "transformers", SIZES, PLENTY)


def test_a_network_that_is_a_little_off_fails(monkeypatch) -> None:
    load = parity.load_weights

    def almost(model, weights) -> None:
        load(model, weights)
        with torch.no_grad():
            model.layer1[0].bn1.weight[0] *= 1.001

    monkeypatch.setattr(parity, "load_weights", almost)
    row = parity.compare("resnet18", "torchvision", SIZES, PLENTY)
    assert row.failed
    assert row.keys_equal
    assert min(row.outputs.values()) > 0


def test_what_does_not_fit_the_memory_is_said() -> None:
    row = parity.compare("regnety_1280", "timm", SIZES, 2**33)
    assert (row.outputs, row.gradients) == ({}, None)
    assert row.note == "needs 12 GiB of memory: parameters and keys only"
    assert not row.failed


def test_the_command_prints_and_writes(tmp_path) -> None:
    out = tmp_path / "parity.json"
    options = ["--peers", "torchvision,timm", "--sizes", "40", "--json", str(out)]
    done = CliRunner().invoke(app, ["parity", "resnet18", *options])
    assert done.exit_code == 0, done.output
    assert "2 comparisons, 0 with differences" in done.output
    rows = json.loads(out.read_text())
    assert [(row["model"], row["peer"]) for row in rows] == [
        ("resnet18", "torchvision"),
        ("resnet18", "timm"),
    ]
    done = CliRunner().invoke(app, ["parity", "resnet18", "--peers", "keras"])
    assert done.exit_code == 2
    assert "got keras" in done.output
