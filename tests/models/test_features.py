"""Features, pooling and classifier: what `Network` gives every family, beside timm's."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vertebra
from vertebra.models._features import FeatureInfo, take_indices

NAMES = ["resnet18", "resnet50t"]


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def pair(name, timm, randomize):
    """Our model and timm's, in eval mode, with the same random weights."""
    ours = randomize(vertebra.create_model(name)).eval()
    peer = timm.create_model(name).eval()
    peer.load_state_dict(ours.state_dict())
    return ours, peer


def images() -> torch.Tensor:
    return torch.randn(1, 3, 49, 65)


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parity
@pytest.mark.parametrize("indices", [None, 2, (0, 3), (-1, 1), [4]], ids=str)
@pytest.mark.parametrize("stop_early", [False, True])
def test_intermediates(pair, indices, stop_early: bool) -> None:
    ours, peer = pair
    x = images()
    last, found = ours.forward_intermediates(x, indices, stop_early=stop_early)
    peers_last, peers = peer.forward_intermediates(x, indices, stop_early=stop_early)
    assert torch.equal(last, peers_last)
    assert same(found, peers)
    assert same(ours.forward_intermediates(x, indices, intermediates_only=True), peers)


@pytest.mark.parity
@pytest.mark.parametrize("out_indices", [None, (1, 2, 3), (0,), (-1,), 2], ids=str)
def test_features_only(name, timm, randomize, out_indices) -> None:
    ours = vertebra.create_model(name, features_only=True, out_indices=out_indices)
    ours = randomize(ours).eval()
    given = {} if out_indices is None else {"out_indices": out_indices}
    peer = timm.create_model(name, features_only=True, **given).eval()
    assert ours.state_dict().keys() == peer.state_dict().keys()
    peer.load_state_dict(ours.state_dict())
    x = images()
    features = ours(x)
    assert same(features, peer(x))
    info, theirs = ours.feature_info, peer.feature_info
    assert info.channels() == theirs.channels() == [f.shape[1] for f in features]
    assert info.reduction() == theirs.reduction()
    assert info.out_indices == tuple(i % 5 for i in theirs.out_indices)
    assert info.module_name(0) == "relu"
    assert len(info.get_dicts()) == len(features)
    assert info.get_dicts(["reduction"], 1) == theirs.get_dicts(["reduction"], 1)


@pytest.mark.parity
@pytest.mark.parametrize("indices", [(1,), (0, 2)], ids=str)
def test_pruned(pair, indices) -> None:
    ours, peer = pair
    assert ours.prune_intermediate_layers(indices) == peer.prune_intermediate_layers(list(indices))
    x = images()
    assert same(
        ours.forward_intermediates(x, indices, intermediates_only=True),
        peer.forward_intermediates(x, list(indices), intermediates_only=True),
    )
    assert ours(x).shape[1] == ours.num_features
    with pytest.raises(ValueError, match="its stage was pruned"):
        ours.forward_intermediates(x)


def test_features_survive_copies_and_keep_their_keys(name) -> None:
    whole = vertebra.create_model(name)
    model = vertebra.create_model(name, features_only=True, out_indices=(1, 2)).eval()
    assert model.state_dict().keys() <= whole.state_dict().keys()
    x = images()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(twin(x), model(x))


@pytest.mark.parity
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "fastavg", "fastcatavgmax"])
def test_global_pool(pool: str, timm, randomize) -> None:
    ours = randomize(vertebra.create_model("resnet18", global_pool=pool, num_classes=5)).eval()
    peer = timm.create_model("resnet18", global_pool=pool, num_classes=5).eval()
    peer.load_state_dict(ours.state_dict())
    assert ours.head_hidden_size == peer.fc.in_features
    x = images()
    assert torch.equal(ours(x), peer(x))
    features = ours.forward_features(x)
    pooled = peer.forward_head(features, pre_logits=True)
    assert torch.equal(ours.forward_head(features, pre_logits=True), pooled)


@pytest.mark.parity
def test_reset_classifier(pair) -> None:
    ours, peer = pair
    x = images()
    for classes, pool in ((0, ""), (3, "catavgmax"), (0, None), (4, "max")):
        ours.reset_classifier(classes, pool)
        peer.reset_classifier(classes, pool)
        if classes:
            peer.get_classifier().load_state_dict(ours.get_classifier().state_dict())
            assert isinstance(ours.get_classifier(), nn.Linear)
        assert torch.equal(ours(x), peer(x))
        assert not ours.get_classifier().training


def test_refusals() -> None:
    with pytest.raises(ValueError, match="out_indices=2 is for features_only=True"):
        vertebra.create_model("resnet18", out_indices=2)
    with pytest.raises(ValueError, match="from -5 to 4; got \\(5,\\)"):
        vertebra.create_model("resnet18", features_only=True, out_indices=(5,))
    with pytest.raises(ValueError, match="the last 6 features are wanted, and there are 5"):
        take_indices(5, 6)
    with pytest.raises(ValueError, match="a classifier reads pooled features"):
        vertebra.create_model("resnet18", global_pool="")
    with pytest.raises(ValueError, match="one of avg, max, avgmax, catavgmax; got 'mean'"):
        vertebra.create_model("resnet18", global_pool="mean")
    model = vertebra.create_model("resnet18", features_only=True, out_indices=(0,))
    with pytest.raises(ValueError, match="returns features \\(0,\\) already"):
        model.keep_features()
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW'"):
        model.forward_intermediates(images(), output_fmt="NHWC")


def test_feature_info_keeps_the_order_of_the_network() -> None:
    info = [{"num_chs": 2**i, "reduction": 2, "module": str(i)} for i in range(4)]
    chosen = FeatureInfo(info, (-1, 1))
    assert chosen.out_indices == (1, 3)
    assert chosen.channels() == [2, 8]
    assert chosen.channels(0) == 1
    assert chosen.channels([0, 2]) == [1, 4]
    assert (len(chosen), chosen[2]["index"]) == (4, 2)
