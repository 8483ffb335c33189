"""ResNet: the same keys, bits, gradients and statistics as torchvision, timm and transformers."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vertebra
from vertebra.models import ResNet, ResNetConfig, create_model, list_models, resnet18
from vertebra.models._resnet_config import CONFIGS
from vertebra.nn import BatchNormAct2d, FrozenBatchNormAct2d
from vertebra.testing.parity import (
    assert_frozen,
    assert_same_output,
    assert_same_state,
    build_on_meta,
    copies,
    relative_error,
    share_weights,
)

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
SMALL_TIMM = [
    "resnet10t",
    "resnet14t",
    "resnet18d",
    "resnet26",
    "resnet26d",
    "resnet26t",
    "resnet34d",
    "resnet50_gn",
    "resnet50c",
    "resnet50d",
    "resnet50s",
    "resnet50t",
    "resnext50d_32x4d",
]


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 33, 45))


def small(block: str = "basic", **options: Any) -> ResNet:
    """A ResNet of one block per stage."""
    return ResNet(ResNetConfig(block, (1, 1, 1, 1), **{"num_classes": 10, **options}))


# torchvision


QUICK = ["resnet18", "resnet50", "resnext50_32x4d"]  # the wide ones' width is an option below


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.thorough) for n in TORCHVISION],
)
def test_matches_torchvision(name, torchvision, randomize):
    peer = randomize(build_on_meta(getattr(torchvision, name)))
    ours = build_on_meta(getattr(vertebra.models, name)).to_empty(device="cpu")
    share_weights(ours, peer)
    x = images()
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), peer.eval()(x))

    target = torch.tensor([3, 999])
    optimizers = [torch.optim.SGD(m.train().parameters(), 1e-3, 0.9) for m in (ours, peer)]
    for step in range(3):
        logits = ours(x), peer(x)
        assert torch.equal(*logits) or step > 0
        for output, optimizer in zip(logits, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(output, target).backward()
            optimizer.step()
        gradients = {key: parameter.grad for key, parameter in peer.named_parameters()}
        for key, parameter in ours.named_parameters():
            assert relative_error(parameter.grad, gradients[key]) <= 1e-5, key
    torch.testing.assert_close(
        dict(ours.named_buffers()), dict(peer.named_buffers()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parity
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_matches_torchvision_at_full_size(name, torchvision, randomize):
    peer = randomize(build_on_meta(getattr(torchvision, name)))
    ours = create_model(name, weights=peer.state_dict())
    with torch.no_grad():
        assert_same_output(ours, peer, images(2, 3, 224, 224))


@pytest.mark.parity
def test_autocast_matches_torchvision(torchvision, randomize):
    peer = randomize(torchvision.resnet18())
    ours = create_model("resnet18", weights=peer.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_output(ours, peer, images())
    assert_same_state(ours, peer)


class GroupNorm8(nn.GroupNorm):
    """A norm that is built from the number of channels alone."""

    def __init__(self, channels: int) -> None:
        super().__init__(8, channels)


TORCHVISION_OPTIONS = [
    {},
    {"zero_init_residual": True},
    {"num_classes": 7},
    {"replace_stride_with_dilation": [False, True, True]},
    {"replace_stride_with_dilation": (True, False, True)},
    {"groups": 4, "width_per_group": 24},
    {"width_per_group": 128},
    {"norm_layer": nn.BatchNorm2d},
    {"norm_layer": partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)},
    {"norm_layer": partial(nn.BatchNorm2d, momentum=None)},
    {"norm_layer": nn.SyncBatchNorm},
    {"norm_layer": partial(nn.GroupNorm, 8)},
    {"norm_layer": GroupNorm8, "zero_init_residual": True},
]


@pytest.mark.parity
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("options", TORCHVISION_OPTIONS, ids=str)
def test_options_match_torchvision(block, options, torchvision, randomize):
    if block == "basic":  # torchvision's BasicBlock knows neither
        options = {k: v for k, v in options.items() if "group" not in k and "dilation" not in k}
    peer_block = torchvision.BasicBlock if block == "basic" else torchvision.Bottleneck
    torch.manual_seed(3)
    peer = torchvision.ResNet(peer_block, [2, 1, 2, 1], **options)
    torch.manual_seed(3)
    ours = ResNet(ResNetConfig(block, (2, 1, 2, 1), **options))
    assert_same_state(ours, peer)  # the seed gives the same initial weights
    share_weights(ours, randomize(peer))
    assert_same_output(ours, peer, images())
    assert_same_state(ours, peer)


@pytest.mark.parity
def test_frozen_batch_norm_matches_torchvision(torchvision, randomize):
    frozen = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d
    peer = randomize(torchvision.resnet18(norm_layer=frozen))
    theirs = create_model("resnet18", norm_layer=frozen, weights=peer.state_dict())
    assert_same_output(theirs, peer, images())
    ours = create_model("resnet18", norm_layer=FrozenBatchNormAct2d, weights=peer.state_dict())
    x = images()
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parity
def test_torchvision_users_can_take_the_model_apart(torchvision, randomize):
    peer = randomize(torchvision.resnet18()).eval()
    ours = create_model("resnet18", weights=peer.state_dict()).eval()
    assert [name for name, _ in ours.named_children()] == [
        name for name, _ in peer.named_children()
    ]
    x = images()
    headless = [nn.Sequential(*list(model.children())[:-1]) for model in (ours, peer)]
    assert torch.equal(headless[0](x), headless[1](x))
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    layers = ["maxpool", "layer1", "layer4"]
    actual, expected = (
        extraction.create_feature_extractor(m, layers, suppress_diff_warning=True).eval()(x)
        for m in (ours, peer)
    )
    assert all(torch.equal(actual[layer], expected[layer]) for layer in layers)


# timm


@pytest.mark.parity
@pytest.mark.parametrize("name", SMALL_TIMM)
def test_matches_timm(name, timm, randomize):
    peer = randomize(build_on_meta(timm.create_model, name))
    ours = build_on_meta(create_model, name).to_empty(device="cpu")
    share_weights(ours, peer)
    with torch.no_grad():
        assert_same_output(ours, peer, images())
    assert_same_state(ours, peer)


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("no_initialisation")
def test_has_the_keys_and_shapes_of_timm(name, timm):
    ours, peer = (build_on_meta(create, name) for create in (create_model, timm.create_model))
    shapes = [[(k, v.shape) for k, v in m.state_dict().items()] for m in (ours, peer)]
    assert shapes[0] == shapes[1]
    assert ours.num_features == peer.num_features


TIMM_OPTIONS = [
    ("resnet10t", {"output_stride": 8}),
    ("resnet10t", {"output_stride": 16}),
    ("resnet18", {"output_stride": 8}),
    ("resnet26", {"output_stride": 16}),
    ("resnet26", {"output_stride": 8, "down_kernel_size": 3}),
    ("resnet26d", {"output_stride": 8}),
    ("resnet14t", {"block_reduce_first": 2, "cardinality": 4, "base_width": 8}),
    ("resnet18", {"block_reduce_first": 2, "down_kernel_size": 3}),
    ("resnet18", {"replace_stem_pool": True}),
    ("resnet10t", {"replace_stem_pool": True, "act_layer": "silu"}),
    ("resnet18", {"act_layer": "gelu"}),
    ("resnet18", {"act_layer": nn.LeakyReLU}),
    ("resnet10t", {"act_layer": nn.Hardswish, "norm_layer": nn.SyncBatchNorm}),
    ("resnet18", {"stem_type": "deep", "stem_width": 24}),
    ("resnet18", {"stem_type": "deep_tiered", "stem_width": 30}),
    ("resnet18", {"stem_width": 32}),
    ("resnet18", {"in_chans": 1}),
    ("resnet10t", {"in_chans": 5, "num_classes": 0}),
    ("resnet18", {"drop_rate": 0.4}),
    ("resnet18", {"zero_init_last": True}),
    ("resnet18", {"zero_init_last": False}),
]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "options"), TIMM_OPTIONS, ids=str)
def test_options_match_timm(name, options, timm, randomize):
    peer, ours = timm.create_model(name, **options), create_model(name, **options)
    if "zero_init_last" in options:
        ours_last, peer_last = (m.layer1[0].bn2.weight for m in (ours, peer))
        assert torch.equal(ours_last, peer_last)
    share_weights(ours, randomize(peer))
    x = images(2, options.get("in_chans", 3), 65, 49)
    assert_same_output(ours, peer, x)
    assert_same_state(ours, peer)
    with torch.no_grad():
        features = ours.eval().forward_features(x)
        assert torch.equal(features, peer.eval().forward_features(x))
        assert torch.equal(
            ours.forward_head(features, pre_logits=True),
            peer.forward_head(features, pre_logits=True),
        )


# transformers


def key_of_transformers(key: str) -> str:
    """Return the transformers name of one of our keys."""
    module, _, leaf = key.rpartition(".")
    if module == "fc":
        return f"classifier.1.{leaf}"
    kinds = {"conv": "convolution", "bn": "normalization"}
    if module in ("conv1", "bn1"):
        return f"resnet.embedder.embedder.{kinds[module[:-1]]}.{leaf}"
    stage, block, *rest = module.removeprefix("layer").split(".")
    prefix = f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}"
    if rest[0] == "downsample":
        return f"{prefix}.shortcut.{('convolution', 'normalization')[int(rest[1])]}.{leaf}"
    return f"{prefix}.layer.{int(rest[0][-1]) - 1}.{kinds[rest[0][:-1]]}.{leaf}"


TRANSFORMERS_OPTIONS = [
    {"layer_type": "basic", "hidden_sizes": [24, 48, 96], "depths": [2, 1, 1]},
    {"layer_type": "basic", "hidden_sizes": [24, 48], "depths": [1, 2], "embedding_size": 24},
    {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 2, 1, 1]},
    {"hidden_sizes": [32, 64], "depths": [2, 2], "embedding_size": 20},
    {"hidden_sizes": [34, 70], "depths": [2, 1]},  # not multiples of the expansion
    {"hidden_sizes": [16, 32, 48, 64, 80], "depths": [1, 1, 1, 1, 1]},
]


@pytest.mark.parity
@pytest.mark.parametrize("options", TRANSFORMERS_OPTIONS, ids=str)
@pytest.mark.parametrize("first_stage", [False, True])
@pytest.mark.parametrize("in_bottleneck", [False, True])
def test_matches_transformers(options, first_stage, in_bottleneck, transformers, randomize):
    options = {
        **options,
        "downsample_in_first_stage": first_stage,
        "downsample_in_bottleneck": in_bottleneck,
    }
    config = transformers.ResNetConfig(num_channels=4, num_labels=5, **options)
    peer = randomize(transformers.ResNetForImageClassification(config))
    ours = create_model("resnet50", in_chans=4, num_classes=5, **options)
    theirs = peer.state_dict()
    ours.load_state_dict({key: theirs.pop(key_of_transformers(key)) for key in ours.state_dict()})
    assert not theirs
    x = images(2, 4, 97, 83)
    for training in (False, True):
        assert torch.equal(ours.train(training)(x), peer.train(training)(x).logits)
    base, ours = peer.resnet.eval(), ours.eval()
    assert torch.equal(ours.forward_features(x), base(x).last_hidden_state)
    assert torch.equal(
        ours.forward_head(ours.forward_features(x), pre_logits=True),
        base(x).pooler_output.flatten(1),
    )


# ours


@pytest.mark.usefixtures("no_initialisation")
def test_builds_on_the_meta_device_without_a_tensor_in_memory():
    for name in list_models()[::9]:  # the comparisons of keys build all of them there
        model = build_on_meta(create_model, name)
        assert all(value.is_meta for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "basic", "groups": 2}, "block='basic', groups=2"),
        ({"block": "basic", "width_per_group": 128}, "block='basic'"),
        ({"block": "pyramid"}, "block='pyramid'"),
        ({"groups": 4, "hidden_sizes": (8, 16, 32, 64), "block_reduce_first": 8}, "groups=4"),
        ({"groups": 0}, "groups=0"),
        ({"width_per_group": 0}, "width_per_group=0"),
        ({"hidden_sizes": (2, 4, 8, 16)}, r"hidden_sizes=\(2, 4, 8, 16\)"),
        ({"hidden_sizes": (64, 128)}, "one entry per stage"),
        ({"layers": ()}, "layers"),
        ({"layers": (2, 0, 2, 2)}, r"layers=\(2, 0, 2, 2\)"),
        ({"output_stride": 4}, "output_stride=4"),
        ({"replace_stride_with_dilation": (True, True)}, "one bool per stage after the first"),
        (
            {"replace_stride_with_dilation": (False, True, True), "output_stride": 8},
            "give one of them",
        ),
        ({"stem_type": "tiered"}, "stem_type='tiered'"),
        ({"stem_type": "deep_tiered", "stem_width": 3}, "stem_width=3"),
        ({"embedding_size": 0}, "embedding_size=0"),
        ({"in_chans": 0}, "in_chans=0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"drop_rate": 1.5}, "drop_rate=1.5"),
        ({"down_kernel_size": 2}, "down_kernel_size=2"),
        ({"block_reduce_first": 0}, "block_reduce_first=0"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**options)


def test_a_config_is_a_value():
    assert ResNetConfig(layers=[3, 4, 6, 3]) == ResNetConfig()
    assert hash(ResNetConfig(layers=[3, 4, 6, 3])) == hash(ResNetConfig())


def test_the_width_of_a_group_is_whole():
    config = ResNetConfig(groups=3, width_per_group=20, block_reduce_first=2)
    assert config.widths(160) == (18, 36)  # 40 planes: 12.5 channels per group


def test_an_unknown_activation_or_norm_is_refused():
    with pytest.raises(ValueError, match="'tanhh'"):
        small(act_layer="tanhh")
    with pytest.raises(ValueError, match="'layernorm3d'"):
        small(norm_layer="layernorm3d")


@pytest.mark.parametrize("stem_type", ["", "deep"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 4, 32, 32), (2, 3, 4, 32, 32)])
def test_refuses_what_is_not_a_batch_of_images(shape, stem_type):
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), got \(\d"):
        small(stem_type=stem_type)(images(*shape))


def test_a_replaced_stem_sets_the_channels():
    model = small().eval()
    model.conv1 = nn.Conv2d(5, 64, 7, 2, 3, bias=False)
    assert model(images(1, 5, 32, 32)).shape == (1, 10)
    model.conv1 = nn.Sequential(nn.Conv2d(2, 5, 1), nn.Conv2d(5, 64, 7, 2, 3))
    assert model(images(1, 2, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("shape", [(0, 3, 40, 40), (1, 3, 1, 1), (1, 3, 33, 250)])
def test_takes_images_of_any_size(shape, randomize):
    assert randomize(small()).eval()(images(*shape)).shape == (shape[0], 10)


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, 3), ({"output_stride": 16}, 5), ({"output_stride": 8}, 9)],
    ids=str,
)
def test_output_stride_is_that_of_the_features(options, size):
    model = small(**options).eval()
    assert model.forward_features(images(1, 3, 65, 65)).shape == (1, 512, size, size)


def test_output_stride_counts_the_first_stage():
    config = ResNetConfig(downsample_in_first_stage=True, output_stride=16)
    assert [stage.stride for stage in config.stages()] == [2, 2, 1, 1]
    assert [stage.dilation for stage in config.stages()] == [1, 1, 2, 4]
    assert [stage.first_dilation for stage in config.stages()] == [1, 1, 1, 2]
    config = ResNetConfig(downsample_in_first_stage=True)
    assert [stage.stride for stage in config.stages()] == [2, 2, 2, 2]


def test_classifier_can_be_read_and_reset(randomize):
    model = randomize(small("bottleneck")).to(torch.float64).eval()
    assert model.num_features == 2048
    assert isinstance(model.get_classifier(), nn.Linear)
    x = images(2, 3, 40, 40).double()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(model(x), model.get_classifier()(pooled))

    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    assert model(x).dtype == torch.float64
    assert not model.get_classifier().training
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert model.num_classes == model.config.num_classes == 0


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_zero_init_residual_starts_from_the_shortcuts(block):
    model = small(block, zero_init_residual=True).train()
    blocks = [m for m in model.modules() if hasattr(m, "downsample")]
    for module in blocks:
        x = images(2, module.conv1.in_channels, 9, 9).relu()
        shortcut = x if module.downsample is None else module.downsample(x)
        assert torch.equal(module(x), shortcut.relu())
    assert len(blocks) == 4


def test_zero_init_residual_accepts_norms_without_weights():
    small(zero_init_residual=True, norm_layer=partial(nn.BatchNorm2d, affine=False))
    small(zero_init_residual=True, norm_layer=nn.Identity)


@pytest.mark.parametrize("stem_type", ["", "deep"])
@pytest.mark.parametrize("act_layer", ["relu", "silu"])
def test_sync_batch_norm_conversion_keeps_the_function(act_layer, stem_type, randomize):
    options = {"stem_type": stem_type, "stem_width": 8, "replace_stem_pool": True}
    model = randomize(small("bottleneck", act_layer=act_layer, **options))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(module, BatchNormAct2d) for module in converted.modules())
    assert list(converted.state_dict()) == list(model.state_dict())
    assert_same_output(converted, model, images())
    assert_same_state(converted, model)


def test_frozen_batch_norm_stays_as_it_is(randomize):
    model = randomize(small(norm_layer=FrozenBatchNormAct2d))
    assert_frozen(model, images())
    assert not any("bn" in name for name, _ in model.named_parameters())


def test_keeps_channels_last(randomize):
    model = randomize(small("bottleneck")).eval().to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    features = model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        features, model.forward_features(x.contiguous()), rtol=1e-4, atol=1e-4
    )


def test_copies_and_pickles(randomize):
    model = randomize(small("bottleneck", stem_type="deep_tiered", avg_down=True)).eval()
    x = images()
    for other in copies(model):
        assert other.config == model.config
        assert torch.equal(other(x), model(x))
        other.conv1[0].weight.data.zero_()
        assert not torch.equal(other(x), model(x))


def test_symbolic_trace_keeps_the_function(randomize):
    model = randomize(small("bottleneck", stem_type="deep")).eval()
    traced = torch.fx.symbolic_trace(model)
    x = images()
    assert torch.equal(traced(x), model(x))
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        traced(images(2, 4, 32, 32))


@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(training, randomize):
    model = randomize(small()).train(training)
    reference = copy.deepcopy(model)
    x = images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x), reference(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    if training:
        actual.square().sum().backward()
        expected.square().sum().backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert relative_error(p.grad, q.grad) <= 1e-3
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": (1,)},
        pytest.param(
            {"layers": (1, 1, 1), "drop_block_rate": 0.3, "attn_layer": "eca"},
            marks=pytest.mark.thorough,
        ),
    ],
    ids=str,
)
def test_compiles_with_dynamic_sizes(options, randomize):
    """One graph for all sizes, and for the image's channels, which are checked in it."""
    model = randomize(ResNet(ResNetConfig("basic", num_classes=5, **options))).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend="eager")
    for shape in [(2, 3, 65, 49), (5, 3, 80, 100)]:
        x = images(*shape)
        torch.manual_seed(1)
        actual = compiled(x)
        torch.manual_seed(1)
        torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-4)


def test_exports_with_dynamic_sizes(randomize):
    model = randomize(resnet18()).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    height, width = (torch.export.Dim(name, min=33, max=1024) for name in ("height", "width"))
    shapes = ({0: batch, 2: height, 3: width},)
    program = torch.export.export(model, (images(),), dynamic_shapes=shapes)
    for shape in [(2, 3, 65, 49), (5, 3, 33, 100)]:
        x = images(*shape)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_trains_alike_on_kernels_and_eager(device, randomize):
    """One network through the Triton kernels: in the interpreter, where there is no GPU."""
    options = {"hidden_sizes": (16, 32), "embedding_size": 8, "num_classes": 3}
    model = randomize(ResNet(ResNetConfig("bottleneck", (1, 1), **options))).double().to(device)
    x = images(2, 3, 33, 29).double().to(device)
    results: list[Any] = []
    for name in ("eager", "triton"):
        with vertebra.backend(name):
            trained = copy.deepcopy(model).train()
            trained(x).square().sum().backward()
            evaluated = trained.eval()(x)
        gradients = [parameter.grad for parameter in trained.parameters()]
        results.append((evaluated, gradients, trained.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)
