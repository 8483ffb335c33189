"""The roofline against an independent count, published numbers, and sums done by hand."""

import json
import time
from dataclasses import replace
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
from vertebra.bench import floor_chart, floors
from vertebra.bench.anatomy import Anatomy, dissect, macs
from vertebra.bench.construction import construct
from vertebra.bench.part_times import PartTimes, measure_parts
from vertebra.bench.roofline import LAUNCH_S, draw
from vertebra.bench.schedules import Rates
from vertebra.bench.tracing import trace
from vertebra.kernels import backend
from vertebra.kernels._op import Op
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


def beyond_the_script(
    anatomy: Anatomy, way: str, training: bool, batch: int
) -> tuple[float, float]:
    """Return the elements and tensor operations of a batch that we count and the script does not.

    It knows nothing of what is inside a squeeze and excitation, moves gradients of weights as fp32
    except depthwise ones that have a kernel of their own, reads ConvNeXt's classifier once in all
    and does not write its logits.
    """
    *parts, head = anatomy.parts
    gates = [conv for part in parts for conv in part.gate]
    passes = (4 if way == "block" else 3) if training else 1
    flops = 2.0 * batch * passes * sum(conv.macs for conv in gates)
    elements = sum(conv.weight for conv in gates) * (3 if training else 1)
    if training:
        elements -= sum(
            conv.weight
            for part in parts
            for conv in part.all_convs
            if conv not in part.gate and not (conv.depthwise and way == "conv")
        )
    if anatomy.family == "convnext":
        elements += 2 * head.convs[0].weight if training else batch * head.y
    return elements, flops


@pytest.mark.parametrize(("name", "row"), [c for c in counted() if c.values[1]["way"] != "eager"])
def test_what_is_constructed_is_what_was_counted_by_hand(name: str, row: dict[str, Any]) -> None:
    anatomy, training = anatomy_of(name), row["training"]
    recomputes = row["way"] == "recompute"
    way = "block" if recomputes else row["way"]
    # where computing takes no time, nothing is kept to save it
    rates = RATES._replace(tensor=1e30) if recomputes else RATES
    found = construct(anatomy, way, training=training, batch=BATCH, itemsize=2, rates=rates)
    elements, flops = beyond_the_script(anatomy, way, training, BATCH)
    assert len(found.kernels) == row["kernels"]
    assert found.bytes - 2 * elements == pytest.approx(BATCH * row["bytes"], rel=1e-9)
    tensor = sum(kernel.tensor_flops for kernel in found.kernels)
    assert tensor - flops == pytest.approx(BATCH * row["tensor_flops"], rel=1e-9)
    assert found.flops - tensor == pytest.approx(BATCH * row["fma_flops"], rel=1e-9)
    assert found.saved_bytes == pytest.approx(BATCH * row["saved_bytes"], rel=1e-9)
    assert found.bytes == pytest.approx(BATCH * row["bytes"], rel=0.01)
    assert found.floor(RATES) == pytest.approx(BATCH * row["floor_s"], rel=0.002)


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
    convs = [conv for part in anatomy_of(name).parts for conv in part.all_convs]
    assert sum(conv.macs for conv in convs) == macs(name)
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


def test_a_gate_costs_weights_between_two_convolutions_and_a_pass_at_the_end() -> None:
    def moved(name: str) -> float:
        anatomy = dissect(name, 64)
        return construct(anatomy, "conv", training=False, batch=1, itemsize=1, rates=RATES).bytes

    with_gate, without = dissect("seresnet18", 64), dissect("resnet18", 64)
    blocks = [part for part in without.parts if part.kind == "residual"]
    assert [part.gate_after for part in with_gate.parts if part.kind == "residual"] == [1] * 8
    # the last convolution reads no residual, the gate reads it with the map, and writes
    weights = sum(conv.weight for part in with_gate.parts for conv in part.gate)
    passes = sum(2 * part.y for part in blocks)
    assert moved("seresnet18") - moved("resnet18") == passes + weights
    between = dissect("regnety_002", 64)
    weights = sum(conv.weight for part in between.parts for conv in part.gate)
    for part in between.parts:
        part.gate_after, part.gate[:] = None, []
    bare = construct(between, "conv", training=False, batch=1, itemsize=1, rates=RATES)
    assert moved("regnety_002") - bare.bytes == weights > 0


def test_a_pool_before_a_convolution_is_read_through() -> None:
    plain, averaged, blurred = (
        dissect(name, 64) for name in ("resnet50", "resnet50d", "resnetblur50")
    )
    at = [part.name for part in plain.parts].index("layer2.0")
    strided, pooled = plain.parts[at].shortcut, averaged.parts[at].shortcut
    assert strided is not None
    assert pooled is not None
    assert pooled.macs == strided.macs
    assert pooled.read == 4 * strided.read == averaged.parts[at].x
    third, behind_blur = plain.parts[at].convs[2], blurred.parts[at].convs[2]
    assert behind_blur.macs == third.macs
    assert behind_blur.read == 4 * third.read == blurred.parts[at].convs[1].y
    assert averaged.parts[0].pool == (64 * 32 * 32, 64 * 16 * 16) == blurred.parts[0].pool


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


@pytest.mark.parametrize(("training", "way"), [(False, "ops"), (True, "eager")])
def test_measured_times_have_the_parts_of_the_floors(
    training: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # kernels in name only, which is quicker
    monkeypatch.setattr(Op, "triton", property(lambda op: op.eager), raising=False)
    model, anatomy = tiny_resnet().train(training), dissect(tiny_resnet(), 32)
    with backend("auto" if way == "ops" else "eager"):
        times = measure_parts(model, torch.randn(2, 3, 32, 32), anatomy, rounds=1)
    assert times.way == way
    assert list(times.seconds) == [part.name for part in anatomy.parts]
    assert min(times.seconds.values()) > 0


def test_a_part_lasts_while_its_modules_run_forward_and_backward() -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *dy: torch.Tensor) -> torch.Tensor:
            time.sleep(0.04)
            return dy[0]

    model = tiny_resnet().train()
    anatomy = dissect(model, 32)
    images = torch.randn(1, 3, 32, 32)
    conv: Any = model.get_submodule("layer1.0.conv2")
    conv.register_forward_hook(lambda module, args, y: Slow.apply(y))
    seconds = measure_parts(model, images, anatomy, rounds=2).seconds
    assert max(seconds, key=seconds.__getitem__) == "layer1.0"
    model.eval()
    assert measure_parts(model, images, anatomy, rounds=1).seconds["layer1.0"] < seconds["layer1.0"]


def test_tables_plot_and_json(tmp_path: Path) -> None:
    times = {part.name: 1e-3 for part in anatomy_of("resnet18").parts}
    found = draw("resnet18", RATES, batch=2, image_size=64)
    found = replace(found, measured=PartTimes("ops", times))
    text = StringIO()
    console = Console(file=text, width=150)
    floors.show(found, console)
    floors.show_parts(found, console)
    floors.show_kernels(found, "layer1.0", console)
    assert "one kernel per convolution" in text.getvalue()
    layer = found.floors("ops")["layer1.0"]
    assert f" {1e-3 / layer:.2f} " in text.getvalue()
    assert text.getvalue().count("scale_bias_act") == 2  # of this block, in the way that has it
    floor_chart.plot(found, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    data = json.loads(json.dumps(found.to_dict()))
    kernels = data["schedules"]["conv"]["kernels"]
    assert sum(k["bytes"] for k in kernels) == found.schedules["conv"].bytes
    assert {k["bound"] for k in kernels} <= {"memory", "tensor", "fma"}
    assert data["measured"]["seconds"]["layer1.0"] == 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_a_single_image_pays_for_weights_and_launches(name: str) -> None:
    for row in MODELS[name]["schedules"]:
        if "latency_s" not in row:
            continue
        one = construct(
            anatomy_of(name), row["way"], training=False, batch=1, itemsize=2, rates=RATES
        )
        gaps = len(one.kernels) * LAUNCH_S
        # the script reads all weights, then works; a kernel here does both at once
        assert row["latency_s"] / 2 < gaps / 2 + one.floor(RATES) + gaps / 2
        assert one.floor(RATES) + gaps < 1.01 * row["latency_s"]
        assert row["kernels"] * LAUNCH_S == gaps


def command(*arguments: str) -> Result:
    found = CliRunner().invoke(app, ["bench", *arguments, "--floor"], env={"COLUMNS": "160"})
    return found


@pytest.mark.parametrize(("kind", "ways"), [("models", 4), ("train", 5)])
def test_the_command_needs_no_machine_to_speak_of_another(
    kind: str, ways: int, tmp_path: Path
) -> None:
    data = tmp_path / "floors.json"
    size = ("--image-size", "64", "--batch", "2,4")
    found = command(kind, "resnet18", *size, "--machine", "h200", "--json", str(data))
    assert found.exit_code == 0, found.output
    assert "4,300 GB/s" in found.output
    content = json.loads(data.read_text())["rooflines"]
    assert [(r["batch"], len(r["schedules"])) for r in content] == [(2, ways), (4, ways)]
    assert {r["dtype"] for r in content} == {"bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("resnet1",), "did you mean resnet18"),
        (("resnet18", "--machine", "abacus"), "machines are h200"),
        (("resnet18", "--machine", "h200", "--dtype", "fp32"), "the rates of h200 are for bf16"),
        (("resnet18", "--bandwidth", "-1"), "rates must be positive"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line(arguments: tuple[str, ...], says: str) -> None:
    found = command("models", *arguments)
    assert found.exit_code == 2
    assert says in found.output
