"""The list of models: a table for people, names for scripts, and every number from elsewhere."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

import vertebra
from vertebra._cli._libraries import libraries_with
from vertebra.bench import sizes
from vertebra.models import create_model

PARITY = Path(vertebra.__file__).parents[1] / "bench" / "results" / "parity.json"


@pytest.fixture(scope="module")
def compared() -> list[dict]:
    """What a run of `vertebra parity` over all models found."""
    return json.loads(PARITY.read_text())


def test_a_pipe_gets_names(run) -> None:
    assert run("list").stdout.splitlines() == vertebra.list_models()
    assert run("list", "resnet5*").stdout.splitlines() == vertebra.list_models("resnet5*")
    assert run("list", "resnet50").stdout == "resnet50\n"


def test_options_choose(read) -> None:
    chosen = read("list", "*50*", "--weights", "--family", "resnet")
    assert [m["name"] for m in chosen] == ["resnet50", "resnext50_32x4d", "wide_resnet50_2"]
    assert {m["family"] for m in read("list", "--family", "regnet")} == {"regnet"}


@pytest.mark.parametrize(("order", "key"), [("params", "parameters"), ("macs", "macs")])
def test_the_largest_is_last(order: str, key: str, read, run) -> None:
    models = read("list", "--sort", order)
    assert len(models) == len(vertebra.list_models())
    assert [m[key] for m in models] == sorted(m[key] for m in models)
    names = run("list", "--sort", order).stdout.splitlines()
    assert names == [m["name"] for m in models]


def test_a_terminal_gets_a_table(run) -> None:
    text = pytest.importorskip("rich.text")
    colourful = run("list", "resnet50*", TTY_COMPATIBLE="1", TERM="xterm").stdout
    text = text.Text.from_ansi(colourful).plain
    rows = {line.split()[0]: line.split() for line in text.splitlines() if "resnet50" in line}
    assert list(rows) == vertebra.list_models("resnet50*")
    assert rows["resnet50"][1:7] == ["resnet", "25.6", "4.09", "224", "V1,", "V2"]
    assert rows["resnet50"][7:] == ["torchvision,", "timm,", "transformers"]


def test_what_json_has(read) -> None:
    (model,) = read("list", "regnet_y_128gf")
    assert model == {
        "name": "regnet_y_128gf",
        "family": "regnet",
        "parameters": 644812894,
        "macs": 374570006400,
        "image_size": 384,
        "weights": ["IMAGENET1K_SWAG_E2E_V1", "IMAGENET1K_SWAG_LINEAR_V1"],
        "also_in": ["torchvision", "transformers"],
    }


def test_nothing_to_list(refused) -> None:
    assert "no model is called 'resnet'; for all with that in their name: '*resnet*'" in refused(
        "list", "resnet"
    )
    assert "'vit*'" in refused("list", "vit*")


def test_other_libraries_are_those_of_the_comparison(compared) -> None:
    found = defaultdict(set)
    for row in compared:
        found[row["model"]].add(row["peer"])
    assert {name: set(libraries_with(name)) for name in vertebra.list_models()} == found


# ------------------------------------------------------------------------------------- sizes


def test_parameters_are_those_of_the_comparison(compared) -> None:
    counted = {row["model"]: row["peer_parameters"] for row in compared}
    assert {name: sizes.size_of(name).parameters for name in vertebra.list_models()} == counted


@pytest.mark.parity
def test_sizes_are_torchvisions(torchvision) -> None:
    from torchvision import models

    for name in vertebra.list_models(pretrained=True):
        meta = models.get_model_weights(name).DEFAULT.meta
        size = sizes.size_of(name)
        assert size.parameters == meta["num_params"]
        assert round(size.macs / 1e9, 3) == meta["_ops"], name


SOME = [
    "resnet10t",
    "ecaresnet26t",
    "seresnext26d_32x4d",
    "regnetz_005",
    "regnet_y_128gf",
    "convnextv2_atto",
]


REST = [name for name in vertebra.list_models() if name not in SOME]


@pytest.mark.parametrize(
    "name", [*SOME, *(pytest.param(name, marks=pytest.mark.thorough) for name in REST)]
)
def test_what_is_kept_is_what_is_counted(name: str) -> None:
    assert sizes.size_of(name) == sizes.count(name)


def test_a_model_of_your_own_is_counted(monkeypatch) -> None:
    from vertebra.models import _registry

    def tiny(**options) -> vertebra.models.ResNet:
        return create_model("resnet18", **{"layers": (1,), "hidden_sizes": (8,), **options})

    monkeypatch.setitem(_registry._builders, "tiny", tiny)
    assert sizes.size_of("tiny").parameters == sum(p.numel() for p in tiny().parameters())
    assert libraries_with("tiny") == ()
