"""The roofline against an independent count, published numbers, and sums done by hand."""

import json
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from vertebra.__main__ import app
from vertebra.bench import floors, roofline
from vertebra.bench.anatomy import dissect, macs
from vertebra.bench.roofline import PRESETS, Roofline, draw
from vertebra.bench.schedules import Rates, construct
from vertebra.bench.tracing import trace
from vertebra.models import ResNet
from vertebra.models.resnet import ResNetConfig

COUNTED: dict[str, Any] = json.loads((Path(__file__).parent / "data/roofline.json").read_text())
MODELS = COUNTED["models"]
RATES = Rates(**COUNTED["settings"]["rates"])
BATCH = COUNTED["settings"]["batch"]
anatomy_of = cache(dissect)
drawn = cache(draw)
TINY = ("resnet18", "regnety_002", "convnext_atto", "convnextv2_atto", "seresnet18")


def counted() -> list[Any]:
    return [
        pytest.param(name, row, id=f"{name}-{row['way']}-{'train' if row['training'] else 'infer'}")
        for name, model in MODELS.items()
        for row in model["schedules"]
    ]


@pytest.mark.parametrize(("name", "row"), [c for c in counted() if c.values[1]["way"] != "eager"])
def test_what_is_constructed_is_what_was_counted_by_hand(name: str, row: dict[str, Any]) -> None:
    found = construct(
        anatomy_of(name), row["way"], training=row["training"], batch=BATCH, itemsize=2, rates=RATES
    )
    assert len(found.kernels) == row["kernels"]
    assert found.bytes / BATCH == pytest.approx(row["bytes"], rel=1e-9)
    tensor = sum(kernel.tensor_flops for kernel in found.kernels)
    assert tensor / BATCH == pytest.approx(row["tensor_flops"], rel=1e-9)
    assert found.floor(RATES) / BATCH == pytest.approx(row["floor_s"], rel=1e-9)
    assert found.saved_bytes / BATCH == pytest.approx(row["saved_bytes"], rel=1e-9)


@pytest.mark.parametrize(("name", "row"), [c for c in counted() if c.values[1]["way"] == "eager"])
def test_what_is_traced_agrees_within_two_percent(name: str, row: dict[str, Any]) -> None:
    training = row["training"]
    found = trace(
        name, anatomy_of(name), "eager", training=training, batch=BATCH, dtype=torch.bfloat16
    )
    assert found.bytes / BATCH == pytest.approx(row["bytes"], rel=0.02)
    tensor = sum(kernel.tensor_flops for kernel in found.kernels)
    assert tensor / BATCH == pytest.approx(row["tensor_flops"], rel=0.02)
    assert found.floor(RATES) / BATCH == pytest.approx(row["floor_s"], rel=0.02)
    if training:
        assert found.saved_bytes / BATCH == pytest.approx(row["saved_bytes"], rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_and_parameters_are_the_published_ones(name: str) -> None:
    published = MODELS[name]
    assert macs(name) / 1e9 == pytest.approx(published["published_gmacs"], rel=0.01)
    assert anatomy_of(name).params == pytest.approx(published["params"], rel=0.001)


def tiny_resnet() -> ResNet:
    config = ResNetConfig("basic", layers=(1,), hidden_sizes=(8,), embedding_size=8, num_classes=5)
    return ResNet(config)


def test_a_tiny_network_is_what_a_person_counts() -> None:
    # 3 x 32 x 32 -> conv 7x7/2 -> 8 x 16 x 16 -> pool -> 8 x 8 x 8 -> two 3x3 -> 8 -> 5
    image, wide, narrow = 3 * 32 * 32, 8 * 16 * 16, 8 * 8 * 8
    weights = [8 * 3 * 49, 8 * 8 * 9, 8 * 8 * 9, 8 * 5]
    anatomy = dissect(tiny_resnet(), 32)
    work = weights[0] * 256 + weights[1] * 64 + weights[2] * 64 + weights[3]
    assert anatomy.macs == work
    found = construct(anatomy, "conv", training=False, batch=4, itemsize=4, rates=RATES)
    maps = (image + wide) + (wide + narrow) + 2 * narrow + 3 * narrow + (narrow + 5)
    assert found.bytes == 4 * (4 * maps + sum(weights))
    assert found.flops == 4 * 2 * work
    whole = construct(anatomy, "block", training=False, batch=4, itemsize=4, rates=RATES)
    maps = (image + narrow) + 2 * narrow + (narrow + 5)
    assert whole.bytes == 4 * (4 * maps + sum(weights))


def test_a_gate_between_two_convolutions_costs_inference_nothing_and_one_at_the_end_a_pass() -> (
    None
):
    def moved(name: str) -> float:
        anatomy = dissect(name, 64)
        return construct(anatomy, "conv", training=False, batch=1, itemsize=1, rates=RATES).bytes

    with_gate, without = dissect("seresnet18", 64), dissect("resnet18", 64)
    blocks = [part for part in without.parts if part.kind == "residual"]
    assert [part.gate_after for part in with_gate.parts if part.kind == "residual"] == [1] * 8
    # the last convolution reads no residual, the gate reads it with the map, and writes
    assert moved("seresnet18") - moved("resnet18") == sum(2 * part.y for part in blocks)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_floors_fall_from_eager_to_whole_blocks(name: str, training: bool) -> None:
    found = drawn(name, RATES, training=training, batch=16, image_size=64)
    ways = (
        ("eager", "ops", "conv", "shared", "block")
        if training
        else ("eager", "ops", "conv", "block")
    )
    assert tuple(found.schedules) == ways
    moved = [schedule.bytes for schedule in found.schedules.values()]
    floors = [schedule.floor(RATES) for schedule in found.schedules.values()]
    if training:  # what is inside a block is computed twice, which may take longer
        moved, floors = moved[:-1], floors[:-1]
    assert moved == sorted(moved, reverse=True)
    assert floors == sorted(floors, reverse=True)


@pytest.mark.parametrize("name", TINY)
def test_every_kernel_belongs_to_a_part_and_every_part_has_kernels(name: str) -> None:
    found = drawn(name, RATES, training=True, batch=16, image_size=64)
    parts = [part.name for part in found.anatomy.parts]
    for way in found.schedules:
        assert list(found.parts(way)) == parts
        assert sum(found.floors(way).values()) == pytest.approx(
            found.schedules[way].floor(RATES), rel=1e-12
        )


@pytest.mark.parametrize("way", ["eager", "ops"])
def test_traced_maps_scale_with_the_batch(way: Any) -> None:
    anatomy = dissect("resnet18", 64)

    def moved(batch: int) -> float:
        return trace(
            "resnet18", anatomy, way, training=False, batch=batch, dtype=torch.float16
        ).bytes

    one, two, three = map(moved, (1, 2, 3))
    assert three - two == two - one > 0


def test_twice_the_bytes_per_element_are_twice_the_bytes() -> None:
    anatomy = dissect("regnety_002", 64)

    def moved(itemsize: int) -> float:
        return construct(
            anatomy, "shared", training=True, batch=3, itemsize=itemsize, rates=RATES
        ).bytes

    assert moved(4) == 2 * moved(2)


def test_our_ops_move_what_they_declare_and_nothing_twice() -> None:
    found = draw("resnet18", RATES, training=True, batch=2, image_size=64)
    names = {kernel.name for kernel in found.schedules["ops"].kernels}
    assert {"batch_norm_act", "batch_norm_act backward", "batch_norm_act_pool"} <= names
    assert not names & {"native_batch_norm", "relu_", "threshold_backward", "max_pool2d"}


def test_the_hidden_map_is_kept_only_where_that_is_faster() -> None:
    anatomy = dissect("convnext_tiny", 64)

    def saved(rates: Rates) -> float:
        return construct(
            anatomy, "block", training=True, batch=4, itemsize=2, rates=rates
        ).saved_bytes

    assert saved(RATES._replace(tensor=1e18)) < saved(RATES._replace(bytes=1e18))


def test_a_model_of_another_library_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="build its twin with vertebra"):
        dissect(torch.nn.Sequential())


def test_inference_has_no_gradients_to_share() -> None:
    with pytest.raises(ValueError, match="use conv"):
        construct(
            dissect("resnet18", 64), "shared", training=False, batch=1, itemsize=2, rates=RATES
        )


def roofline_of_a_tiny_network() -> Roofline:
    return draw(tiny_resnet(), PRESETS["h200-bf16"], batch=2, image_size=32, dtype=torch.float32)


def test_measured_times_have_the_parts_of_the_floors() -> None:
    model, found = tiny_resnet().eval(), roofline_of_a_tiny_network()
    times = roofline.measure_parts(model, torch.randn(2, 3, 32, 32), found.anatomy, rounds=2)
    assert list(times) == [part.name for part in found.anatomy.parts]
    assert min(times.values()) > 0


def test_tables_plot_and_json(tmp_path: Path) -> None:
    found = roofline_of_a_tiny_network()
    text = StringIO()
    console = Console(file=text, width=150)
    measured = {part.name: 1e-3 for part in found.anatomy.parts}
    floors.show(found, console)
    floors.show_parts(found, console, measured)
    assert "layer1.0" in text.getvalue()
    assert "one kernel per convolution" in text.getvalue()
    floors.plot(found, tmp_path / "roofline.png", measured)
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    data = json.loads(json.dumps(found.to_dict()))
    assert data["schedules"]["conv"]["bytes"] == found.schedules["conv"].bytes


def test_a_single_image_pays_for_weights_and_launches() -> None:
    found = draw("resnet50", RATES, batch=1)
    conv = found.schedules["conv"]
    weights = 2 * sum(c.weight for part in found.anatomy.parts for c in part.all_convs)
    assert conv.bytes > weights
    assert found.latency("conv") == pytest.approx(conv.floor(RATES) + 55e-6)


def command(*arguments: str) -> Result:
    found = CliRunner().invoke(app, ["bench", *arguments, "--floor"], env={"COLUMNS": "160"})
    return found


@pytest.mark.parametrize(("kind", "ways"), [("models", 4), ("train", 5)])
def test_the_command_needs_no_machine_to_speak_of_another(
    kind: str, ways: int, tmp_path: Path
) -> None:
    data = tmp_path / "floors.json"
    size = ("--image-size", "64", "--batch", "2,4", "--dtype", "bf16")
    found = command(kind, "resnet18", *size, "--machine", "h200-bf16", "--json", str(data))
    assert found.exit_code == 0, found.output
    assert "4,300 GB/s" in found.output
    content = json.loads(data.read_text())["rooflines"]
    assert [(r["batch"], len(r["schedules"])) for r in content] == [(2, ways), (4, ways)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("resnet1",), "did you mean resnet18"),
        (("resnet18", "--machine", "abacus"), "machines are h200-bf16"),
        (("resnet18", "--bandwidth", "-1"), "rates must be positive"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line(arguments: tuple[str, ...], says: str) -> None:
    found = command("models", *arguments)
    assert found.exit_code == 2
    assert says in found.output
