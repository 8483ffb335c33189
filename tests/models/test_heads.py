"""The heads of transformers around our networks: fields, shapes, tuples, losses and choices."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from vertebra.models import Backbone, ForImageClassification, Model, create_model, load_weights

CHOICE = ["stem", "stage2", "stage4"]


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 49, 65)


@dataclass
class Pair:
    """Our network, and transformers' model for classification with the same weights."""

    network: nn.Module
    peer: nn.Module
    base: nn.Module
    backbone: nn.Module


@pytest.fixture(scope="module")
def resnet(transformers, randomize) -> Pair:
    options = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 2, 1, 1]}
    config = transformers.ResNetConfig(num_labels=5, out_features=CHOICE, **options)
    peer = randomize(transformers.ResNetForImageClassification(config)).eval()
    network = create_model("resnet50", num_classes=5, **options).eval()
    load_weights(network, peer.state_dict())
    backbone = transformers.AutoBackbone.from_config(config).eval()
    backbone.load_state_dict(peer.resnet.state_dict())
    return Pair(network, peer, peer.resnet, backbone)


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parity
@pytest.mark.parametrize("hidden", [False, True])
def test_model(resnet: Pair, hidden: bool) -> None:
    x = images()
    ours = Model(resnet.network)(x, output_hidden_states=hidden)
    theirs = resnet.base(x, output_hidden_states=hidden)
    assert list(ours) == list(theirs)
    assert torch.equal(ours.last_hidden_state, theirs["last_hidden_state"])
    assert torch.equal(ours["pooler_output"], theirs.pooler_output)
    assert (ours.hidden_states is None) == (theirs.hidden_states is None) == (not hidden)
    if hidden:
        assert same(ours.hidden_states, theirs.hidden_states)
    listed = Model(resnet.network)(x, output_hidden_states=hidden, return_dict=False)
    peers = resnet.base(x, output_hidden_states=hidden, return_dict=False)
    assert isinstance(listed, tuple)
    assert len(listed) == len(peers)
    assert same(listed[:2], peers[:2])
    assert same(ours[:2], peers[:2])


LABELS = {
    "single_label_classification": torch.tensor([1, 4]),
    "multi_label_classification": torch.randint(0, 2, (2, 5)).float(),
    "regression": torch.randn(2, 5),
}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("problem", "inferred"),
    [
        ("single_label_classification", True),
        ("single_label_classification", False),
        ("multi_label_classification", True),
        ("multi_label_classification", False),
        ("regression", False),  # five classes are never taken for one
    ],
)
def test_classification(resnet: Pair, problem: str, inferred: bool) -> None:
    x, labels = images(), LABELS[problem]
    head = ForImageClassification(resnet.network, None if inferred else problem)
    resnet.peer.config.problem_type = None if inferred else problem
    ours, theirs = head(x, labels=labels), resnet.peer(x, labels=labels)
    assert head.problem_type == resnet.peer.config.problem_type == problem
    assert list(ours) == list(theirs) == ["loss", "logits"]
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)
    assert list(head(x)) == list(resnet.peer(x)) == ["logits"]
    assert torch.equal(head(x)[0], theirs.logits)
    listed = head(x, labels, output_hidden_states=True, return_dict=False)
    peers = resnet.peer(x, labels, output_hidden_states=True, return_dict=False)
    assert same(listed[:2], peers[:2])
    assert same(listed[2], peers[2])


@pytest.mark.parametrize("shape", [(3,), (3, 1)], ids=str)
def test_one_class_is_a_regression(shape) -> None:
    head = ForImageClassification(create_model("resnet18", num_classes=1)).eval()
    labels = torch.randn(shape)
    output = head(images(3), labels=labels)
    assert head.problem_type == "regression"
    expected = (output.logits.flatten() - labels.flatten()).square().mean()
    torch.testing.assert_close(output.loss, expected)


def test_a_loss_trains_the_network() -> None:
    head = ForImageClassification(create_model("resnet18", num_classes=3))
    head(images(), labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parity
@pytest.mark.parametrize("hidden", [False, True])
def test_backbone(resnet: Pair, hidden: bool) -> None:
    x = images()
    head = Backbone(resnet.network, CHOICE)
    ours = head(x, output_hidden_states=hidden)
    theirs = resnet.backbone(x, output_hidden_states=hidden)
    assert list(ours) == list(theirs)
    assert ours.attentions is None
    assert same(ours.feature_maps, theirs.feature_maps)
    if hidden:
        assert same(ours.hidden_states, theirs.hidden_states)
    assert same(head(x, return_dict=False)[0], theirs.feature_maps)
    for name in ("stage_names", "out_features", "channels", "num_features", "out_feature_channels"):
        assert getattr(head, name) == getattr(resnet.backbone, name), name
    assert head.out_indices == list(resnet.backbone.out_indices)
    assert [f.shape[1] for f in ours.feature_maps] == head.channels


@pytest.mark.parametrize(
    ("features", "indices", "chosen"),
    [
        (None, None, ["stage4"]),
        (("stem", "stage1"), None, ["stem", "stage1"]),
        (None, (-3, -1), ["stage2", "stage4"]),
        (None, [0], ["stem"]),
        (["stage1"], [1], ["stage1"]),
        (["stage3"], [-2], ["stage3"]),
    ],
)
def test_choices(features, indices, chosen) -> None:
    head = Backbone(create_model("resnet18", num_classes=0), features, indices)
    assert head.out_features == chosen
    assert [head.stage_names[i] for i in head.out_indices] == chosen


@pytest.mark.parametrize(
    ("features", "indices", "message"),
    [
        (["stage5"], None, r"out_features must be among .*'stage4'.*; got .'stage5'"),
        (["stage2", "stage1"], None, "in the network's order"),
        (["stage2", "stage2"], None, "each stage once"),
        (None, [5], r"from -5 to 4; got .5."),
        (None, (2, 1), "in the network's order"),
        (None, (4, -1), "each stage once"),
        (["stage1"], [2], "must name the same stages"),
        (["stage1"], [1, 2], "must name the same stages"),
    ],
)
def test_wrong_choices(features, indices, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(create_model("resnet18", num_classes=0), features, indices)


def test_other_mistakes() -> None:
    network = create_model("resnet18", num_classes=0)
    with pytest.raises(ValueError, match=r"problem_type must be one of regression, .*'ranking'"):
        ForImageClassification(network, "ranking")
    with pytest.raises(ValueError, match="a loss needs a classifier"):
        ForImageClassification(network)(images(), labels=torch.tensor([0, 1]))
    for head in (Model, ForImageClassification, Backbone):
        with pytest.raises(ValueError, match="takes images of shape"):
            head(network)(torch.randn(1, 4, 32, 32))


def test_output_is_mapping_and_tuple() -> None:
    output = Model(create_model("resnet18", num_classes=0).eval())(images())
    assert dict(output).keys() == {"last_hidden_state", "pooler_output"}
    assert output.to_tuple()[1] is output[1] is output["pooler_output"]
    assert "hidden_states" not in output
    with pytest.raises(KeyError):
        output["hidden_states"]


def test_heads_compile_export_and_copy() -> None:
    network = create_model("resnet18", num_classes=4).eval()
    x, labels = images(), torch.tensor([0, 3])
    for head, args in ((Model, (x,)), (ForImageClassification, (x, labels)), (Backbone, (x,))):
        module = head(network)
        expected = module(*args).to_tuple()
        compiled = torch.compile(module, fullgraph=True, backend="eager")(*args)
        exported = torch.export.export(module, args).module()(*args)
        for output in (compiled, exported, copy.deepcopy(module)(*args)):
            assert type(output) is type(module(*args))
            for a, b in zip(output.to_tuple(), expected, strict=True):
                assert same(a, b) if isinstance(a, tuple) else torch.equal(a, b)
