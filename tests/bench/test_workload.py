"""What is compared: every library's model is the same network, and the batch is balanced."""

import copy
from contextlib import suppress

import pytest
import torch

from vertebra.bench import models
from vertebra.bench.runner import Unavailable
from vertebra.bench.settings import Settings
from vertebra.bench.workload import VARIANTS, Workload, jitter

pytestmark = pytest.mark.parity
pytest.importorskip("sklearn")


def workload(
    batch: int, dtype: torch.dtype = torch.float64, name: str = "resnet18", size: int = 32
) -> Workload:
    return Workload.create(name, batch, size, torch.device("cpu"), dtype)


@pytest.mark.parametrize("batch", [3, 11, 32, 33, 64, 256])
def test_every_image_comes_equally_often(batch, monkeypatch) -> None:
    from vertebra.bench import photos

    monkeypatch.setattr(photos, "batch", lambda count, size: torch.randn(count, 3, size, size))
    index = workload(batch).index
    counts = index.bincount()
    assert len(index) == batch
    assert (counts == batch // len(counts)).all()


@pytest.mark.parametrize(
    "mode", ["forward", pytest.param("training", marks=pytest.mark.thorough), "sgd"]
)
def test_the_truth_of_the_distinct_images_is_that_of_the_batch(mode) -> None:
    work = workload(33)  # eleven images, three times each
    oracle = work.oracle(mode)
    (provider,) = work.providers(["vertebra-nhwc"], mode)
    step = provider.make()
    assert len(work.images) == 11
    for i in range(2):  # an optimizer step leaves the weights alone
        verdict = oracle.judge(step(i))
        assert not verdict.wrong
        assert max(verdict.errors.values()) < 1e-11


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("resnet18", "torchvision"),
        pytest.param("regnety_004", "timm", marks=pytest.mark.thorough),
        ("regnet_x_400mf", "torchvision"),
        ("convnext_atto", "timm"),
        pytest.param("convnextv2_atto", "timm", marks=pytest.mark.thorough),
    ],
)
def test_every_library_computes_the_same_in_double(name, library) -> None:
    """Other names, shapes and layouts of weights make no difference to any gradient."""
    work = workload(2, name=name, size=64)
    assert work.library == library
    oracle = work.oracle("training")
    plain = [n for n, variant in VARIANTS.items() if variant.compile is None]
    judged: list[str] = []
    for provider in work.providers(plain, "training"):
        with suppress(Unavailable):
            verdict = oracle.judge(provider.make()(0))
            assert not verdict.wrong, (provider.name, verdict.wrong)
            assert max(verdict.errors.values()) < 1e-9, provider.name
            judged.append(provider.name)
    ours = {"accelerated", "vertebra-nchw", "vertebra-nhwc"}
    assert ours | {"eager-nchw", "eager-nhwc", library, "transformers"} <= set(judged)


@pytest.mark.parametrize(
    "name",
    ["resnet18", *(pytest.param(n, marks=pytest.mark.thorough) for n in models.TINY[1:])],
)
def test_half_precision_has_a_yardstick(name) -> None:
    """The random weights are such that eager PyTorch itself is right enough to judge others.

    At the sizes of a tiny run, where the fewest values are averaged.
    """
    tiny = Settings.choose(device="cpu", tiny=True, known=VARIANTS)
    workload(*tiny.batches, torch.bfloat16, name, tiny.image_size).oracle("training")


def test_weights_that_are_rounded_once_more_are_right() -> None:
    """As a norm's that is folded into them: its errors are those of channels, which no pool evens.

    Ten roundings are wrong.
    """
    work = workload(4, torch.bfloat16, size=64)
    oracle, eps = work.oracle("forward"), torch.finfo(torch.bfloat16).eps
    providers = {p.name: p for p in work.providers(["eager-nhwc", "fused"], "forward")}
    eager, fused = (oracle.judge(p.make()(0)) for p in providers.values())
    assert not eager.wrong
    assert not fused.wrong
    model = copy.deepcopy(work.reference).bfloat16().double()
    jitter(model, 1, eps / 2)
    rounded = oracle.judge(work._exact(model, "forward"))
    assert 1.8 * rounded.errors["logits"] < rounded.allowed["logits"]
    assert rounded.errors["logits"] > 1.5 * eager.errors["logits"]
    jitter(model, 2, 5 * eps)
    assert oracle.judge(work._exact(model, "forward")).wrong


def test_costs_are_those_that_others_count() -> None:
    """1.82 GMACs, 2.48 M activations, 11.69 M parameters: timm's results for a ResNet-18."""
    work = Workload.create("resnet18", 2, 224, torch.device("cpu"), torch.float32)
    cost = work.cost("forward")
    assert (cost.parameters, cost.flops) == (11_689_512, 2 * 1_814_073_344)
    assert cost.activations == 2_484_712
    # of the first layer nobody wants the gradient of the image
    stem = 2 * 64 * 112 * 112 * 3 * 49
    assert work.cost("sgd").flops == 3 * cost.flops - stem


def test_a_models_providers_suit_the_machine() -> None:
    settings = Settings.choose(device="cpu", known=VARIANTS)
    work = workload(2)
    names = work.names(settings, "forward")
    assert "torchvision" not in names  # whose model the eager one is
    assert {"timm", "transformers", "compile", "freezing"} <= set(names)
    assert not {"max-autotune", "reduce-overhead"} & set(names)
    assert "freezing" not in work.names(settings, "sgd")
    nchw = Settings.choose(device="cpu", layouts=["nchw"], known=VARIANTS)
    assert work.names(nchw, "forward") == ["eager-nchw", "vertebra-nchw"]
    asked = Settings.choose(device="cpu", providers=["torchvision"], known=VARIANTS)
    assert work.names(asked, "sgd") == ["torchvision"]


def test_every_model_measured_by_default_is_one() -> None:
    for names in (models.ON_GPU, models.ON_CPU, models.TINY):
        models.tasks(names, Settings.choose(device="cpu", known=VARIANTS), "forward")


@pytest.mark.thorough
def test_what_is_frozen_has_its_norms_folded() -> None:
    """Of the networks that Inductor makes of one, only the frozen one holds packed weights."""
    from torch._inductor.utils import run_and_get_code

    work = workload(2, torch.float32, size=64)
    torch.compiler.reset()
    for name, folded in (("compile", False), ("freezing", True)):
        (provider,) = work.providers([name], "forward")
        _, codes = run_and_get_code(provider.make(), 0)
        assert ("mkldnn._convolution_pointwise" in "".join(codes)) is folded
