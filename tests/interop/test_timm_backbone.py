"""TimmBackbone against transformers' own, and where that fails against timm."""

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

from vertebra.interop import TimmBackbone

pytestmark = pytest.mark.parity


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.normal_(0, 0.1) if "var" not in key else value.uniform_(0.5, 1.5)
            else:
                value.fill_(7)
    return model


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
@pytest.mark.parametrize(
    "options",
    [{}, {"out_indices": (1, 3)}, {"out_indices": (-2,), "output_stride": 16}],
    ids=str,
)
def test_matches_transformers(name, options, timm, transformers):
    config = transformers.TimmBackboneConfig(backbone=name, **options)
    peer = randomised(transformers.TimmBackbone(config)).eval()
    ours = TimmBackbone(name, **options).eval()
    for attribute in ("stage_names", "num_features", "out_indices", "out_features", "channels"):
        assert getattr(ours, attribute) == getattr(peer, attribute), attribute
    assert ours.out_feature_channels == peer.out_feature_channels
    assert list(ours.state_dict()) == list(peer.state_dict())
    ours.load_state_dict(peer.state_dict())
    x = images()
    with torch.no_grad():
        expected, found = peer(x), ours(x)
        assert len(found.feature_maps) == len(expected.feature_maps)
        assert all(map(torch.equal, found.feature_maps, expected.feature_maps))
        assert found.hidden_states is None
        (maps,) = ours(x, return_dict=False)
        assert all(map(torch.equal, maps, expected.feature_maps))
        if name == "test_convnext":  # hidden states of which transformers does not find
            return
        expected = peer(x, output_hidden_states=True)
        maps, states = ours(x, output_hidden_states=True, return_dict=False)
        assert all(map(torch.equal, maps, found.feature_maps))  # theirs count from the wrong end
        assert len(states) == len(expected.hidden_states)
        assert all(map(torch.equal, states, expected.hidden_states))


@pytest.mark.parametrize("features_only", [True, False])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_convnext", 64),
        ("test_resnet", 64),
        pytest.param("vit_tiny_patch16_224", 224, marks=pytest.mark.thorough),
    ],
)
def test_hidden_states_are_all_features_up_to_the_last(name, size, features_only, timm):
    torch.manual_seed(1)
    ours = TimmBackbone(name, out_indices=(1, 3), features_only=features_only).eval()
    torch.manual_seed(1)
    peer = timm.create_model(name).eval()
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = peer.forward_intermediates(x, indices=[0, 1, 2, 3], intermediates_only=True)
        output = ours(x, output_hidden_states=True)
        assert len(output.hidden_states) == 4
        assert all(map(torch.equal, output.hidden_states, expected))
        for found in (output, ours(x)):
            assert len(found.feature_maps) == 2
            assert all(map(torch.equal, found.feature_maps, (expected[1], expected[3])))


def test_the_whole_model_keeps_timms_keys(timm):
    whole = TimmBackbone("test_convnext", features_only=False).state_dict()
    assert [key.removeprefix("_backbone.") for key in whole] == list(
        timm.create_model("test_convnext").state_dict()
    )


def test_a_model_of_its_own_kind(timm):
    """An EfficientNet extracts features itself, in a class of its own."""
    ours = TimmBackbone("efficientnet_lite0", out_indices=(0, 2), num_channels=4).eval()
    x = torch.randn(1, 4, 64, 64)
    assert [f.shape[1] for f in ours(x).feature_maps] == ours.channels
    with pytest.raises(ValueError, match=r"build with out_indices=\(0, 1, 2\)"):
        ours(x, output_hidden_states=True)
    whole = TimmBackbone("efficientnet_lite0", out_indices=(0, 1, 2)).eval()
    output = whole(images(), output_hidden_states=True)
    assert all(map(torch.equal, output.hidden_states, output.feature_maps))


@pytest.mark.parametrize("at_once", [False, True])
def test_freezes_as_transformers_and_thaws_whole(at_once, timm, transformers):
    config = transformers.TimmBackboneConfig(backbone="test_resnet", freeze_batch_norm_2d=True)
    peer = randomised(transformers.TimmBackbone(config)).train()
    ours = TimmBackbone("test_resnet", freeze_batch_norm_2d=at_once).train()
    if not at_once:
        ours.freeze_batch_norm_2d()
    assert list(ours.state_dict()) == list(peer.state_dict())
    ours.load_state_dict(peer.state_dict())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    x = images()
    torch.testing.assert_close(ours(x).feature_maps, peer(x).feature_maps, rtol=1e-4, atol=1e-4)
    ours.unfreeze_batch_norm_2d()
    norms = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    built = TimmBackbone("test_resnet").modules()
    assert [m.momentum for m in norms] == [
        m.momentum for m in built if isinstance(m, nn.BatchNorm2d)
    ]
    expected = peer.eval()(x).feature_maps
    torch.testing.assert_close(ours.eval()(x).feature_maps, expected, rtol=1e-4, atol=1e-4)


def test_copies_and_compiles(timm):
    model = randomised(TimmBackbone("test_resnet", out_indices=(1, 3), freeze_batch_norm_2d=True))
    x = images()
    expected = model(x).feature_maps
    assert all(map(torch.equal, copy.deepcopy(model)(x).feature_maps, expected))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).feature_maps, expected)


@pytest.mark.parametrize("indices", [(3, 1), (1, 1), (1, -4), (5,), (-6,), ()])
def test_features_exist_and_stand_in_order(indices, timm):
    with pytest.raises(ValueError, match="out_indices"):
        TimmBackbone("test_resnet", out_indices=indices)


def test_refuses(timm):
    with pytest.raises(ValueError, match="cannot return attentions"):
        TimmBackbone("test_resnet")(images(), output_attentions=True)
    with pytest.raises(ValueError, match="timm has no model 'resnet11'"):
        TimmBackbone("resnet11")


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        TimmBackbone("test_resnet")
