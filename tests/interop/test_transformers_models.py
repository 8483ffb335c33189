"""Our networks as models of transformers: configs, checkpoints, outputs, and the auto classes."""

import copy
import json
import pickle
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.models import heads, load_weights
from vertebra.testing.parity import randomize

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("transformers")]

# per family: a name, and options that make it small and have more than weights to be restored
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8},
    "resnetblur18": {"layers": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8},
    "regnet_y_400mf": {"depths": [1, 1], "hidden_sizes": [8, 16], "stem_width": 8},
    "convnext_atto": {"depths": [1, 1], "dims": [8, 16], "ls_init_value": 0.5},
}
networks = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(scope="module")
def interop(transformers: ModuleType) -> ModuleType:
    vertebra.interop.transformers.register()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return vertebra.interop.transformers


def config(name: str, **options: Any) -> Any:
    if "id2label" not in options:
        options = {"num_labels": 5, **options}
    return vertebra.interop.transformers.VertebraConfig(
        architecture=name, model_args=NETWORKS[name], **options
    )


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, those that are in no checkpoint too."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    found, wanted = tensors(actual), tensors(expected)
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


def same(ours: Any, theirs: Any) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@networks
def test_a_new_model_has_the_weights_of_create_model(name, interop) -> None:
    torch.manual_seed(1)
    expected = vertebra.create_model(name, num_classes=5, **NETWORKS[name])
    torch.manual_seed(1)
    assert_same(interop.VertebraForImageClassification(config(name)).network, expected)


@networks
def test_outputs_are_those_of_the_heads(name, interop, transformers) -> None:
    outputs = transformers.modeling_outputs
    x, labels = images(), torch.tensor([1, 4])
    model = interop.VertebraForImageClassification(config(name)).eval()
    ours, head = model(x, labels=labels), heads.ForImageClassification(model.network)
    assert type(ours) is outputs.ImageClassifierOutputWithNoAttention
    assert torch.equal(ours.loss, head(x, labels).loss)
    assert torch.equal(ours.logits, head(x).logits)
    assert model.config.problem_type == "single_label_classification"

    base = interop.VertebraModel(config(name)).eval()
    ours, expected = base(x, output_hidden_states=True), heads.Model(base.network)(x, True)
    assert type(ours) is outputs.BaseModelOutputWithPoolingAndNoAttention
    assert torch.equal(ours.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(ours.pooler_output, expected.pooler_output)
    assert same(ours.hidden_states, expected.hidden_states)
    assert base(x).hidden_states is None


@networks
def test_backbone(name, interop, transformers) -> None:
    chosen = config(name, out_features=["stem", "stage2"])
    model = randomize(transformers.AutoBackbone.from_config(chosen)).eval()
    assert type(model) is interop.VertebraBackbone
    assert isinstance(model, transformers.backbone_utils.BackboneMixin)
    assert model.stage_names == ["stem", "stage1", "stage2"]
    assert model.out_indices == [0, 2]
    assert model.channels == [8, 16]
    assert model.config.hidden_sizes == [8, 16]
    x = images()
    found = model(x, output_hidden_states=True)
    assert type(found) is transformers.modeling_outputs.BackboneOutput
    assert [f.shape[1] for f in found.feature_maps] == model.channels
    states = model.network.forward_states(x)
    assert same(found.hidden_states, states)
    norms = model.hidden_states_norms
    expected = [
        norms[k](f) if k in norms else f
        for k, f in zip(("stem", "stage2"), states[::2], strict=True)
    ]
    assert same(found.feature_maps, expected)
    assert bool(norms) == (name == "convnext_atto")
    assert model(x).hidden_states is None
    listed = model(x, return_dict=False)
    assert type(listed) is tuple
    assert same(listed[0], expected)
    model.config.output_hidden_states = True
    assert same(model(x).hidden_states, states)
    filtered = model.forward_with_filtered_kwargs(x, output_attentions=True)
    assert same(filtered.feature_maps, expected)


@networks
def test_every_parameter_of_a_backbone_gets_a_gradient(name, interop) -> None:
    """As DDP requires: nothing is left of the head."""
    model = interop.VertebraBackbone(config(name))
    model(images()).feature_maps[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@networks
def test_saves_and_loads(name, interop, transformers, tmp_path) -> None:
    labels = {i: word for i, word in enumerate(("cat", "dog", "hen"))}
    model = transformers.AutoModelForImageClassification.from_config(config(name, id2label=labels))
    randomize(model).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    told = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(told) is interop.VertebraConfig
    assert (told.architecture, told.model_args) == (name, NETWORKS[name])
    assert told.id2label == labels
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is interop.VertebraForImageClassification
    assert not loaded.training
    assert_same(loaded, model)
    x = images()
    assert torch.equal(loaded(x).logits, model.eval()(x).logits)


@networks
def test_one_class_loads_what_another_saved(name, interop, transformers, tmp_path) -> None:
    whole = randomize(interop.VertebraForImageClassification(config(name))).eval()
    whole.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(base) is interop.VertebraModel
    x = images()
    states = whole.network.forward_states(x)
    assert torch.equal(base(x).last_hidden_state, whole.network.forward_neck(states[-1]))
    backbone = interop.VertebraBackbone.from_pretrained(tmp_path, out_indices=(0, 1))
    assert backbone.out_features == ["stem", "stage1"]
    maps = backbone(x, output_hidden_states=True)
    assert same(maps.hidden_states, states)
    if backbone.hidden_states_norms:  # which the checkpoint lacks: as new
        states = [nn.functional.layer_norm(f.movedim(1, -1), f.shape[1:2]) for f in states]
        states = [f.movedim(-1, 1) for f in states]
        torch.testing.assert_close(maps.feature_maps, tuple(states[:2]), rtol=1e-4, atol=1e-5)
    else:
        assert same(maps.feature_maps, states[:2])


def test_what_a_checkpoint_lacks_is_as_new(interop, tmp_path) -> None:
    interop.VertebraForImageClassification(config("regnet_y_400mf")).save_pretrained(tmp_path)
    torch.manual_seed(3)
    loaded = interop.VertebraForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True
    )
    torch.manual_seed(3)
    new = interop.VertebraForImageClassification(config("regnet_y_400mf", num_labels=7))
    assert torch.equal(loaded.network.fc.weight, new.network.fc.weight)
    assert not torch.equal(loaded.network.stem[0].weight, new.network.stem[0].weight)


@networks
def test_loads_in_another_type(name, interop, tmp_path) -> None:
    whole = interop.VertebraForImageClassification(config(name))
    whole.save_pretrained(tmp_path)
    loaded = type(whole).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {v.dtype for v in tensors(loaded).values() if v.is_floating_point()} == {torch.bfloat16}
    for key, value in tensors(whole).items():
        assert torch.equal(tensors(loaded)[key], value.to(tensors(loaded)[key].dtype)), key
    assert loaded(images().bfloat16()).logits.dtype == torch.bfloat16


def test_the_meta_device(interop) -> None:
    chosen = config("resnetblur18")
    with torch.device("meta"):
        model = interop.VertebraForImageClassification(chosen)
    assert all(value.is_meta for value in tensors(model).values())
    model.to_empty(device="cpu")
    torch.manual_seed(2)
    model.init_weights()
    torch.manual_seed(2)
    assert_same(model, interop.VertebraForImageClassification(chosen))


@networks
def test_copies(name, interop) -> None:
    model = randomize(interop.VertebraForImageClassification(config(name))).eval()
    x = images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert_same(twin, model)
        assert torch.equal(twin(x).logits, model(x).logits)


def test_compiles_in_one_graph(interop) -> None:
    model = interop.VertebraBackbone(config("resnet18", out_indices=(1, 2))).eval()
    x = images()
    expected = model(x).feature_maps
    found = torch.compile(model, backend="eager", fullgraph=True)(x).feature_maps
    torch.testing.assert_close(found, expected)


@networks
def test_gradient_checkpointing(name, interop) -> None:
    model = randomize(interop.VertebraForImageClassification(config(name))).double().train()
    twin = copy.deepcopy(model)
    twin.activation_checkpointing_enable()
    assert twin.is_activation_checkpointing
    assert not model.is_activation_checkpointing
    x, labels = images().double(), torch.tensor([1, 4])
    for each in (model, twin):
        each(x, labels=labels).loss.backward()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert_same(twin, model)  # each batch counts once in the statistics
    twin.activation_checkpointing_disable()
    assert not twin.is_activation_checkpointing


def test_registering_twice_changes_nothing(interop, transformers) -> None:
    interop.register()
    assert type(transformers.AutoModel.from_config(config("resnet18"))) is interop.VertebraModel


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"architecture": "resnet19"}, KeyError, "did you mean"),
        ({"model_args": {"num_classes": 3}}, TypeError, "give num_labels to the config"),
        ({"model_args": {"in_chans": 1}}, TypeError, "give num_channels to the config"),
        ({"model_args": {"weights": "some.bin"}}, TypeError, "cannot have 'weights'"),
        ({"model_args": {"act_layer": nn.GELU}}, TypeError, "give classes by their names"),
        ({"model_args": {"depth": 3}}, TypeError, "unknown option 'depth'"),
        ({"drop_path_rate": 0.1}, TypeError, "give model_args={'drop_path_rate': 0.1}"),
        ({"in_chans": 1}, TypeError, "give num_channels"),
        ({"out_features": ["stage5"]}, ValueError, "stage5"),
        ({"out_indices": [2, 1]}, ValueError, "order"),
    ],
)
def test_bad_configs_are_refused(interop, options, error, told) -> None:
    with pytest.raises(error, match=told):
        interop.VertebraConfig(**options)


def test_a_config_is_plain_json(interop) -> None:
    chosen = config("convnext_atto", out_features=["stage1"], num_channels=1)
    data = json.loads(chosen.to_json_string())
    again = interop.VertebraConfig.from_dict(data)
    assert again.to_dict() == chosen.to_dict()
    assert interop.VertebraBackbone(again)(torch.randn(1, 1, 64, 64)).feature_maps[0].shape[1] == 8


# what transformers' own models have saved

FOLDERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "resnet50": (
        "ResNet",
        {"hidden_sizes": [32, 64], "depths": [1, 1], "embedding_size": 8},
        {"hidden_sizes": [32, 64], "depths": [1, 1], "embedding_size": 8},
    ),
    "regnet_y_400mf": (
        "RegNet",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "groups_width": 8},
        {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8},
    ),
    "convnext_tiny": (
        "ConvNext",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        {"hidden_sizes": [8, 16], "depths": [1, 1], "layer_norm_eps": 1e-12},
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_loads_a_folder_of_transformers_own(name, interop, transformers, tmp_path) -> None:
    family, options, ours = FOLDERS[name]
    settings = getattr(transformers, f"{family}Config")(num_labels=5, **options)
    peer = randomize(getattr(transformers, f"{family}ForImageClassification")(settings)).eval()
    peer.save_pretrained(tmp_path)
    chosen = interop.VertebraConfig(architecture=name, model_args=ours, num_labels=5)
    model = interop.VertebraForImageClassification(chosen).eval()
    load_weights(model.network, tmp_path)
    x = images()
    torch.testing.assert_close(model(x).logits, peer(x).logits, rtol=1e-4, atol=1e-5)


def test_auto_backbone_reads_no_folder_whoever_saved_it(interop, transformers, tmp_path) -> None:
    """AutoBackbone of transformers 5.23 asks the hub for every name; the class itself does not."""
    from huggingface_hub.errors import HFValidationError

    settings = transformers.ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)
    for model in (
        transformers.ResNetBackbone(settings),
        interop.VertebraBackbone(config("resnet18")),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        with pytest.raises(HFValidationError):
            transformers.AutoBackbone.from_pretrained(folder)
        assert_same(type(model).from_pretrained(folder), model)


# without transformers


def test_one_sentence_where_transformers_is_missing() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import vertebra
try:
    vertebra.interop.transformers
except ImportError as error:
    print(error)
"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "pip install -U transformers" in done.stdout
