"""Weights: every way a ResNet checkpoint is stored, and every way it can be the wrong one."""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vertebra.models import ResNet, create_model, load_weights
from vertebra.nn import FrozenBatchNormAct2d

State = dict[str, Tensor]


def tiny(**options: Any) -> ResNet:
    """A model small enough to save a dozen times."""
    options = {"layers": (1, 1), "hidden_sizes": (8, 16), "embedding_size": 8, **options}
    model = create_model("resnet18", **{"num_classes": 5, **options})
    assert isinstance(model, ResNet)
    return model


@pytest.fixture
def weights(randomize: Callable[[nn.Module], nn.Module]) -> State:
    return dict(randomize(tiny()).state_dict())


def assert_holds(model: nn.Module, expected: State) -> None:
    assert list(model.state_dict()) == list(expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def assert_refused(model: nn.Module, source: Any, message: str, **options: Any) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, source, **options)
    assert_holds(model, before)


def save_torch(content: Any, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path)
    return path


def save_legacy(content: Any, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def save_safetensors(content: Any, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    pytest.importorskip("safetensors.torch").save_file(content, path)
    return path


@pytest.mark.parametrize("save", [save_torch, save_legacy, save_safetensors])
@pytest.mark.parametrize("as_path", [Path, str])
def test_loads_files(save, as_path, weights, tmp_path):
    path = as_path(save(weights, tmp_path))
    model = tiny()
    load_weights(model, path)
    assert_holds(model, weights)
    options = {"layers": (1, 1), "hidden_sizes": (8, 16), "embedding_size": 8, "num_classes": 5}
    assert_holds(create_model("resnet18", weights=path, **options), weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        OrderedDict,
        lambda w: {"state_dict": w, "epoch": 90},
        lambda w: {"model": w, "optimizer": {"lr": 0.1}, "epoch": 3},
        lambda w: {"model_ema": w},
        lambda w: {"state_dict": {"model": w}},
        lambda w: {f"module.{k}": v for k, v in w.items()},
        lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
        lambda w: {f"_orig_mod.module.{k}": v for k, v in w.items()},
        lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()},
        lambda w: {f"module.module.{k}": v for k, v in w.items()} | {"n_averaged": torch.tensor(1)},
        lambda w: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in w.items()},
    ],
)
def test_finds_the_weights_in_what_training_scripts_save(wrap, weights, tmp_path):
    for source in (wrap(weights), save_torch(wrap(weights), tmp_path)):
        model = tiny()
        load_weights(model, source)
        assert_holds(model, weights)


def test_takes_the_model_rather_than_its_average(weights):
    average = {key: torch.zeros_like(value) for key, value in weights.items()}
    model = tiny()
    load_weights(model, {"model_ema": average, "model": weights})
    assert_holds(model, weights)


def test_copies_into_the_models_own_memory_and_dtype(weights):
    model = tiny().double()
    parameter = model.conv1.weight
    load_weights(model, weights)
    assert model.conv1.weight is parameter
    assert parameter.dtype == torch.float64
    assert torch.equal(parameter, weights["conv1.weight"].double())
    parameter.data.zero_()
    assert weights["conv1.weight"].abs().sum() > 0


def test_counters_may_be_missing(weights):
    old = {key: value for key, value in weights.items() if "num_batches" not in key}
    model = tiny()
    load_weights(model, old)
    expected = {k: v if k in old else torch.zeros_like(v) for k, v in weights.items()}
    assert_holds(model, expected)


def test_frozen_norms_take_the_weights_of_batch_norms_and_give_them_back(weights):
    frozen, model = tiny(norm_layer=FrozenBatchNormAct2d), tiny()
    load_weights(frozen, weights)
    assert torch.equal(frozen.layer1[0].bn1.running_var, weights["layer1.0.bn1.running_var"])
    load_weights(model, frozen.state_dict())
    for key, value in frozen.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


# image channels


@pytest.mark.parametrize("stem_type", ["", "deep"])
@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
@pytest.mark.parity
def test_adapts_an_rgb_stem_as_timm_does(in_chans, stem_type, timm, randomize):
    options = {"stem_type": stem_type, "stem_width": 4}
    weights = dict(randomize(tiny(**options)).state_dict())
    key = "conv1.0.weight" if stem_type else "conv1.weight"
    model = tiny(in_chans=in_chans, **options)
    load_weights(model, weights)
    expected = timm.models.adapt_input_conv(in_chans, weights[key])
    assert_holds(model, {**weights, key: expected})


def test_a_grey_image_means_the_same_to_an_adapted_model(weights):
    rgb, grey = tiny().eval(), tiny(in_chans=1).eval()
    load_weights(rgb, weights)
    load_weights(grey, weights)
    x = torch.randn(2, 1, 33, 29)
    torch.testing.assert_close(grey(x), rgb(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_does_not_guess_what_four_channels_mean(weights):
    weights["conv1.weight"] = torch.randn(8, 4, 7, 7)
    assert_refused(tiny(), weights, r"conv1.weight: floats of shape \(8, 4, 7, 7\)")


# classes


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_another_number_of_classes_is_an_error(num_classes, weights):
    message = r"fc.weight: floats of shape \(5, 16\)(.*\n)+Only the classifier differs.*keep_class"
    assert_refused(tiny(num_classes=num_classes), weights, message)


def test_the_classifier_is_kept_on_request(weights):
    model = tiny(num_classes=3)
    own = {key: value.clone() for key, value in model.state_dict().items() if "fc." in key}
    load_weights(model, weights, keep_classifier=True)
    assert_holds(model, {**weights, **own})


def test_weights_without_a_classifier_need_the_same_request(weights):
    backbone = {key: value for key, value in weights.items() if "fc." not in key}
    model = tiny()
    assert_refused(model, backbone, "fc.weight: nothing, the model has floats")
    own = {key: value.clone() for key, value in model.state_dict().items() if "fc." in key}
    load_weights(model, backbone, keep_classifier=True)
    assert_holds(model, {**backbone, **own})


def test_a_model_without_a_classifier_takes_the_rest(weights):
    model = tiny(num_classes=0)
    load_weights(model, weights)
    assert_holds(model, {key: value for key, value in weights.items() if "fc." not in key})


# wrong weights


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("layer2.0.bn2.bias"), "layer2.0.bn2.bias: nothing, the model has floats"),
        (
            lambda w: w.update(extra=torch.ones(2)),
            "extra: floats of shape .2,., the model has noth",
        ),
        (lambda w: w.update({"bn1.bias": torch.ones(9)}), r"bn1.bias: floats of shape \(9,\)"),
        (lambda w: w.update({"bn1.bias": torch.ones(8).int()}), "bn1.bias: integers"),
        (lambda w: w.update({"bn1.bias": 3.0}), "got float under 'bn1.bias'"),
        (lambda w: w.clear(), "conv1.weight: nothing"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(spoil, message, weights):
    spoil(weights)
    for keep_classifier in (False, True):
        assert_refused(tiny(), weights, message, keep_classifier=keep_classifier)


def test_names_the_model_the_weights_belong_to():
    with torch.device("meta"):
        others = {
            name: create_model(name, in_chans=1, num_classes=7).state_dict()
            for name in ("resnet18", "resnet26t", "wide_resnet50_2")
        }
    for name, other in others.items():
        message = rf"\n  and \d+ more\nThey fit {name}( or \w+)*,"
        assert_refused(create_model("resnet34"), other, message)
    assert_refused(tiny(), others["resnet18"] | {"x": torch.ones(1)}, "fit no registered model")


def test_a_model_on_the_meta_device_has_no_room(weights):
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(ValueError, match="to_empty"):
        load_weights(model, weights)


# wrong files


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        create_model("resnet18", weights=tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        load_weights(tiny(), tmp_path)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x02}q\x00."])
def test_a_file_that_is_something_else_is_refused(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused(tiny(), path, "weights")


def test_a_file_that_holds_code_is_not_run(weights, tmp_path):
    holder = {"state_dict": weights, "args": argparse.Namespace(lr=0.1)}
    assert_refused(tiny(), save_torch(holder, tmp_path), "state dict of tensors and nothing else")
    assert_refused(tiny(), save_torch([1, 2], tmp_path), "must hold a state dict; got list")
