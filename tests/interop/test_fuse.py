"""Fused models: as near to the truth as the models they were made from, and modules like those."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.bench import peers
from vertebra.bench.oracle import Oracle
from vertebra.bench.small import MEMBERS, build
from vertebra.interop import _fold, fuse, unfused
from vertebra.interop import fuse as fuse_function
from vertebra.kernels import _onednn
from vertebra.kernels._op import observe
from vertebra.models import ConvNeXtConfig, RegNetConfig, ResNetConfig
from vertebra.models.convnext import ConvNeXt
from vertebra.models.regnet import RegNet
from vertebra.models.resnet import ResNet
from vertebra.nn import (
    BatchNormAct2d,
    DropBlock2d,
    FusedConv2d,
    FusedLinear,
    LayerNorm2d,
    conv_norm_act,
    convert_sync_batchnorm,
    create_conv2d,
    freeze_batch_norm_2d,
)
from vertebra.nn.fused import Folded
from vertebra.nn.norm_act import normalise
from vertebra.testing.parity import randomize

fuse_module: Any = sys.modules["vertebra.interop.fuse"]

PATHS = ("eager", "onednn")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "onednn":
        request.getfixturevalue("on_onednn")
    return request.param


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


# ---------------------------------------------------------------------------------- the answers


def answers(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        y = model(x)
    if isinstance(y, Tensor):
        return {"logits": y.double()}
    features = y.values() if isinstance(y, dict) else y
    return {f"feature {i}": feature.double() for i, feature in enumerate(features)}


@torch.no_grad()
def jittered(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy whose every value is moved by at most a rounding."""
    model = copy.deepcopy(model)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value *= 1 + torch.finfo(dtype).eps * (2 * torch.rand(value.shape) - 1).to(value.dtype)
    return model


def judge(model: nn.Module, x: Tensor, found: dict[str, Tensor]) -> str:
    """Return what is wrong with the answers of a fused model, by those of the model itself.

    The budget is what right answers that round differently come to: in the other layout, and from
    weights moved by a rounding, as folding moves them.
    """
    oracle = Oracle(answers(copy.deepcopy(model).double(), x.double()), x.dtype)
    with vertebra.backend("eager"):
        for net in (model, jittered(model, x.dtype), jittered(model, x.dtype)):
            oracle.calibrate(answers(net, x))
            oracle.calibrate(answers(net, x.contiguous(memory_format=torch.channels_last)))
    return oracle.judge(found).wrong


def assert_fused(model: nn.Module, *images: Tensor) -> nn.Module:
    """Require that the fused model's answers are right, and the model itself is left alone."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse(model)
    for x in images:
        for batch in (x, x.contiguous(memory_format=torch.channels_last)):
            kept = batch.clone()
            assert not judge(model, batch, answers(fused, batch))
            assert torch.equal(batch, kept)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(isinstance(module, (FusedConv2d, Folded)) for module in model.modules())
    return fused


# our own networks, every option that has a say in what is fused

RESNETS: dict[str, dict[str, Any]] = {
    "basic": {"block": "basic"},
    "grouped": {"groups": 4, "width_per_group": 16},
    "deep, averaged, excited": {
        **{"stem_type": "deep_tiered", "stem_width": 8, "avg_down": True, "attn_layer": "se"}
    },
    "attended": {"block": "basic", "attn_layer": "eca", "act_layer": "silu"},
    "blurred": {"aa_layer": "blur", "replace_stem_pool": True, "stem_type": "deep"},
    "pooled by a convolution": {"replace_stem_pool": True, "block": "basic"},
    "dropping": {"drop_block_rate": 0.1, "drop_path_rate": 0.2},
    "dilated": {"output_stride": 8},
    "frozen": {"norm_layer": "frozenbatchnorm2d"},
    "strange activation": {"act_layer": nn.LeakyReLU},
    "caffe's": {"downsample_in_bottleneck": True},
    "features": {"block": "basic"},
}
REGNETS: dict[str, dict[str, Any]] = {
    "x": {"layer_type": "x"},
    "y": {"layer_type": "y"},
    "y, silu, dropping": {"layer_type": "y", "act_layer": "silu", "drop_path_rate": 0.2},
    "averaged, linear": {"downsample": "avg", "linear_out": True, "num_features": 24},
    "before": {"preact": True},
    "before, excited": {"preact": True, "layer_type": "y", "act_layer": "silu"},
    "dilated": {"output_stride": 8},
}
CONVNEXTS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"use_grn": True, "ls_init_value": None},
    "convolutions": {"conv_mlp": True, "use_grn": True},
    "overlap": {"stem_type": "overlap_act", "drop_path_rate": 0.1},
    "dilated": {"output_stride": 8, "depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "norm first": {"head_norm_first": True, "conv_bias": False, "act_layer": "silu"},
}


def own(name: str) -> nn.Module:
    family, _, kind = name.partition(": ")
    classes = {"num_classes": 10}
    if family == "resnet":
        shape = {"layers": (1, 2), "hidden_sizes": (32, 64), **classes}
        model = ResNet(ResNetConfig(**{"block": "bottleneck", **shape, **RESNETS[kind]}))
        if kind == "features":
            model.keep_features((0, 1, 2))
    elif family == "regnet":
        shape = {"hidden_sizes": (16, 32), "depths": (1, 2), "group_width": 8, **classes}
        model = RegNet(RegNetConfig(**{"layer_type": "x", **shape, **REGNETS[kind]}))
    else:
        shape = {"depths": (1, 2), "dims": (8, 16), **classes}
        model = ConvNeXt(ConvNeXtConfig(**{**shape, **CONVNEXTS[kind]}))
    return randomize(model).eval()


OWN = [
    *(f"resnet: {kind}" for kind in RESNETS),
    *(f"regnet: {kind}" for kind in REGNETS),
    *(f"convnext: {kind}" for kind in CONVNEXTS),
]


@pytest.mark.parametrize("name", OWN)
def test_our_networks(name, path):
    assert_fused(own(name), image(1, 3, 33, 47), image(3, 3, 40, 32))


@pytest.mark.parametrize("name", ["resnet: grouped", "regnet: y", "convnext: v1"])
def test_bf16(name, path):
    assert_fused(own(name).bfloat16(), image(3, 3, 40, 33, dtype=torch.bfloat16))


def left(model: nn.Module) -> list[str]:
    return [site.name for site in unfused(model)]


def test_norms_before_convolutions():
    """Of a RegNetV's block those behind an add and behind an excitation stay, and no other."""
    fused = assert_fused(own("regnet: before, excited"), image(3, 3, 33, 40))
    blocks = [f"trunk_output.block{i}.block{i}-{j}" for i, j in ((1, 0), (2, 0), (2, 1))]
    assert left(fused) == [f"{block}.{norm}" for block in blocks for norm in ("norm", "f.c.0")]


def test_norms_without_an_activation_before_convolutions():
    """What torch puts in their place leaves the activation to the block."""
    model, x = own("regnet: before, excited"), image(1, 3, 33, 40)
    bare = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(module, BatchNormAct2d) for module in bare.modules())
    assert not judge(model, x, answers(bare, x))
    assert_fused(bare, x)


def test_who_watches_a_norm_before_a_convolution():
    """It sees what it is promised: the map in between, normalised by now."""
    model, x, seen = own("regnet: before, excited"), image(1, 3, 33, 40), []
    fused = fuse(model)
    layer = fused.get_submodule("trunk_output.block2.block2-1.f.b")
    layer.register_forward_hook(lambda module, args, y: seen.append(args[0].shape))
    assert not judge(model, x, answers(fused, x))
    assert len(seen) == 1


@pytest.mark.parity
def test_norms_before_convolutions_of_timm(timm):
    from timm.models.regnet import RegNet as TimmRegNet
    from timm.models.regnet import RegNetCfg

    shape = {"depth": 4, "w0": 8, "wa": 8, "wm": 1.7, "group_size": 4, "stem_width": 8}
    model = TimmRegNet(RegNetCfg(**shape, se_ratio=0.25, preact=True, act_layer="silu"))
    fused = assert_fused(randomize(model).eval(), image(3, 3, 33, 40))
    norms = ("norm1", "norm3")
    assert left(fused) == [f"s{i}.b1.{norm}" for i in (1, 2, 3, 4) for norm in norms]


@pytest.mark.parity
@pytest.mark.parametrize("member", MEMBERS)
def test_networks_of_peers(member, on_onednn, request):
    request.getfixturevalue(member.partition(":")[0])
    fused = assert_fused(randomize(build(member)).eval(), image(3, 3, 33, 40))
    assert not unfused(fused)


@pytest.mark.parity
def test_accelerated_before(timm):
    model = vertebra.accelerate(randomize(build("timm: BasicBlock"))).eval()
    assert_fused(model, image(2, 3, 33, 40))


@pytest.mark.parity
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_feature_extractors(library, request, path):
    peer = request.getfixturevalue(library)
    model = build(f"{library}: Bottleneck")
    if library == "timm":
        model = peer.models._features.FeatureListNet(model, out_indices=(0, 1, 3))
    else:
        from torchvision.models._utils import IntermediateLayerGetter

        model = IntermediateLayerGetter(model, {"relu": "0", "layer2": "1"})
    fused = assert_fused(randomize(model).eval(), image(2, 3, 33, 40))
    assert not unfused(fused)


@pytest.mark.parity
def test_a_detector_with_frozen_norms(torchvision):
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    model = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=0)
    fused = assert_fused(randomize(model).eval(), image(1, 3, 64, 64))
    assert not unfused(fused)
    assert not any("running_mean" in key for key in fused.state_dict())


@pytest.mark.parity
def test_a_deep_stem_of_timm(timm):
    from timm.models.resnet import BasicBlock
    from timm.models.resnet import ResNet as TimmResNet

    model = TimmResNet(BasicBlock, (1,) * 4, channels=(8,) * 4, stem_type="deep", stem_width=8)
    fused = assert_fused(randomize(model).eval(), image(2, 3, 33, 40))
    assert not unfused(fused)


# ----------------------------------------------------------------------------------- what runs how


def sites(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    with observe(lambda call: found.append((call.op.name, call.path))), torch.no_grad():
        model(x)
    return found


@pytest.mark.parametrize(
    ("name", "convolutions", "others"),
    [
        ("resnet: basic", 9, ["global_avg_pool"]),
        ("regnet: y", 12, ["global_avg_pool"]),
        ("convnext: v1", 11, ["layer_norm_2d"] * 5 + ["global_avg_pool"]),
        (
            "convnext: v2",
            11,
            ["layer_norm_2d"] * 5 + ["global_response_norm"] * 3 + ["global_avg_pool"],
        ),
    ],
)
def test_nothing_is_left_behind_a_convolution(name, convolutions, others, on_onednn):
    found = sites(fuse(own(name)), image(1, 3, 33, 47))
    assert found.count(("conv2d_act", "onednn")) == convolutions
    assert sorted(op for op, _ in found if op != "conv2d_act") == sorted(others)


def test_no_reorders_and_everything_in_the_epilogue(on_onednn, capfd):
    fused = fuse(own("resnet: grouped"))
    x = image(2, 3, 64, 64)
    with torch.no_grad():
        fused(x), fused(x)  # the weights are packed
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            fused(x)
    lines = [line for line in capfd.readouterr().out.splitlines() if ",exec,cpu," in line]
    assert len(lines) == 12
    assert not [line for line in lines if ",reorder," in line]
    assert sum(":sum" in line for line in lines) == 3  # residuals, which are overwritten
    assert not [line for line in lines if "binary_add" in line]
    assert sum("eltwise_relu" in line for line in lines) == 10  # all but the shortcuts


def test_the_pairs_are_those_that_blocks_run(monkeypatch, torchvision, timm, transformers):
    run: set[tuple[int, int]] = set()
    ended: set[int] = set()  # timm's, which run one op without a convolution if it is not fused

    def seen(conv, norm, x, *args, **kwargs):
        last = conv
        while isinstance(last, nn.Sequential):
            last = last[-1]
        run.add((id(last), id(norm)))
        return conv_norm_act(conv, norm, x, *args, **kwargs)

    def seen_without(norm, x, *args, **kwargs):
        ended.add(id(norm))
        return normalise(norm, x, *args, **kwargs)

    models = [own(name) for name in OWN if "feature" not in name]
    models += [vertebra.accelerate(build(member).eval()) for member in MEMBERS]
    for name, module in list(sys.modules.items()):
        if name.startswith("vertebra.") and getattr(module, "conv_norm_act", None) is conv_norm_act:
            monkeypatch.setattr(module, "conv_norm_act", seen)
    monkeypatch.setattr(sys.modules["vertebra.interop._timm"], "normalise", seen_without)
    for model in models:
        run.clear()
        with torch.no_grad():
            model(image(1, 3, 32, 32))
        declared = {
            (id(pair.conv), id(pair.norm))
            for pair in fuse_module._pairs(model)
            if type(pair.block) is not nn.Sequential
        }
        norms = {norm for _, norm in declared}
        assert {pair for pair in run if pair[1] in norms} | {
            (conv, norm) for conv, norm in declared if norm in ended
        } == declared
        others = {id(m) for m in model.modules() if fuse_module._is_batch_norm(m)} - norms
        assert not others & {norm for _, norm in run}


# ----------------------------------------------------------------------------------- modules alone


class Block(nn.Module):
    """What our blocks do with a convolution and a norm."""

    CONV_NORMS = (("conv", "norm"),)

    def __init__(self, conv: nn.Module, norm: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act
        self.drop = DropBlock2d(0.1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm_act(self.conv, self.norm, x, self.act, drop=self.drop)


CONVOLUTIONS: dict[str, Any] = {
    "3x3": lambda: nn.Conv2d(6, 8, 3, padding=1, bias=False),
    "with bias": lambda: nn.Conv2d(6, 8, 3),
    "grouped, dilated": lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2, groups=2),
    "strided": lambda: nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(0, 2)),
    "same": lambda: nn.Conv2d(6, 8, (4, 3), padding="same"),
    "valid": lambda: nn.Conv2d(6, 8, 3, padding="valid"),
    "reflected": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "TensorFlow's": lambda: create_conv2d(6, 8, 3, stride=2, padding="same"),
}
NORMS: dict[str, Any] = {
    "plain": lambda: nn.BatchNorm2d(8),
    "without affine": lambda: nn.BatchNorm2d(8, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(8, momentum=None),
    "wide eps": lambda: nn.BatchNorm2d(8, eps=0.3),
    "synchronised": lambda: nn.SyncBatchNorm(8),
    "synchronised, with act": lambda: convert_sync_batchnorm(BatchNormAct2d(8)),
    "with act": lambda: BatchNormAct2d(8, act_layer="silu"),
    "with drop": lambda: BatchNormAct2d(8, drop_layer=lambda: DropBlock2d(0.1, 3)),
    "frozen": lambda: freeze_batch_norm_2d(nn.BatchNorm2d(8)),
    "frozen, with act": lambda: freeze_batch_norm_2d(BatchNormAct2d(8)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_convolutions(conv, path):
    model = randomize(Block(CONVOLUTIONS[conv](), nn.BatchNorm2d(8), nn.ReLU())).eval()
    fused = assert_fused(model, image(3, 6, 9, 11))
    assert isinstance(fused.conv, FusedConv2d)
    assert not unfused(fused)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", [None, nn.ReLU(), nn.LeakyReLU(0.1, inplace=True)])
def test_norms(norm, act):
    conv = CONVOLUTIONS["with bias"]()
    model = randomize(Block(conv, NORMS[norm](), copy.deepcopy(act))).eval()
    fused = assert_fused(model, image(3, 6, 9, 11))
    assert isinstance(fused.norm, Folded)
    assert list(fused.state_dict()) == ["conv.weight", "conv.bias"]


def sequence(*layers: nn.Module) -> nn.Sequential:
    return randomize(nn.Sequential(*layers)).eval()


def test_sequences():
    model = sequence(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(8, 8, 1), BatchNormAct2d(8)),
        *(nn.Sequential(nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8), nn.LeakyReLU()),
        *(nn.Conv2d(8, 4, 1), nn.ReLU()),
    )
    fused = assert_fused(model, image(2, 3, 9, 9))
    assert [m.act for m in fused.modules() if isinstance(m, FusedConv2d)] == [
        *("relu", "relu", "none", "none")
    ]
    assert [m.training for m in fused.modules()] == [False] * len(list(fused.modules()))


def test_a_sequence_with_a_forward_of_its_own_is_no_sequence():
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    model = sequence(Residual(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))
    fused = assert_fused(model, image(2, 4, 5, 5))
    assert "Residual comes before it" in unfused(fused)[0].reason
    model = sequence(Residual(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    fused = assert_fused(model, image(2, 4, 5, 5))
    assert "no convolution that this version knows of" in unfused(fused)[0].reason


def twice(conv: nn.Module) -> nn.Module:
    return sequence(conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4))


def tied(conv: nn.Conv2d) -> nn.Module:
    other = nn.Conv2d(4, 4, 1)
    other.weight = conv.weight
    return sequence(conv, nn.BatchNorm2d(4), other)


def watched(conv: nn.Module, norm: nn.Module, on_conv: bool) -> nn.Module:
    (conv if on_conv else norm).register_forward_hook(lambda module, args, y: y * 2)
    return sequence(conv, norm)


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def shared_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    return sequence(nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 4, 1), norm)


def parametrised() -> nn.Module:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    return nn.Sequential(conv, nn.BatchNorm2d(4)).eval()


LEFT: dict[str, tuple[Any, str]] = {
    "convolution in two places": (lambda: twice(nn.Conv2d(4, 4, 1)), "stands in several places"),
    "tied weight": (lambda: tied(nn.Conv2d(4, 4, 1)), "weight that another module has too"),
    "norm in two places": (shared_norm, "it stands in several places"),
    "hook on the convolution": (
        lambda: watched(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), True),
        "the convolution before it is watched by hooks",
    ),
    "hook on the norm": (
        lambda: watched(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), False),
        "the norm is watched by hooks",
    ),
    "transposed": (
        lambda: sequence(nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4)),
        "ConvTranspose2d comes before it",
    ),
    "activation between": (
        lambda: sequence(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        "ReLU comes before it",
    ),
    "shared activation between": (
        lambda: sequence(nn.Conv2d(4, 4, 1), *[nn.ReLU()] * 2, nn.BatchNorm2d(4)),
        "ReLU comes before it",
    ),
    "norm first": (
        lambda: sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
        "no convolution that this version knows of comes right before it",
    ),
    "norm of another kind": (
        lambda: sequence(nn.Conv2d(4, 4, 1), Doubled(4)),
        "computes something else than a batch norm",
    ),
    "parametrised": (parametrised, "ParametrizedConv2d comes before it"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_alone(kind, path):
    make, reason = LEFT[kind]
    model = make()
    fused = assert_fused(model, image(2, 4, 5, 5))
    left = unfused(fused)
    assert len(left) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert all(reason in site.reason for site in left)
    if vertebra.interop.is_fused_model(fused):
        assert left == [
            site for site in vertebra.explain(fused, image(1, 4, 5, 5)).left if site in left
        ]


@pytest.mark.parametrize("norm", [lambda c: nn.GroupNorm(2, c), LayerNorm2d])
def test_norms_of_what_they_are_given(norm, path):
    config = ResNetConfig("basic", layers=(1,), hidden_sizes=(64,), norm_layer=norm)
    assert_fused(randomize(ResNet(config)).eval(), image(2, 3, 17, 15))


def test_a_block_in_two_places_is_fused_once():
    block = Block(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    fused = assert_fused(sequence(block, block), image(2, 4, 5, 5))
    assert fused[0] is fused[1]
    assert not unfused(fused)


def test_a_hook_put_on_later_sees_what_it_is_promised(path):
    fused = fuse(own("resnet: basic"))
    x, seen = image(1, 3, 32, 32), {}
    block = fused.layer1[0]
    plain = answers(fused, x)["logits"]
    for name in ("conv1", "bn1"):
        getattr(block, name).register_forward_hook(
            lambda module, args, y, name=name: seen.update({name: y.clone()})
        )
    torch.testing.assert_close(answers(fused, x)["logits"], plain)
    torch.testing.assert_close(seen["conv1"].relu(), seen["bn1"])
    assert seen["conv1"].min() < 0


# ------------------------------------------------------------------------------------- refusals


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"this one is in training mode; call model.eval\(\)"):
        fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model = own("resnet: basic")
    model.layer1.train()
    with pytest.raises(ValueError, match="'layer1' of this one is in training mode"):
        fuse(model)


def test_norms_without_statistics_are_refused():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match=r"running statistics.*track_running_stats=True"):
        fuse(sequence(nn.Conv2d(3, 4, 1), norm))


def test_models_without_weights_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match="meta device; load them first"):
        fuse(model)


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match=r"work of a GPU, and the model is on cpu; move it"):
        fuse(own("resnet: basic"), cuda_graph=True)


def test_fused_models_are_not_restored():
    with pytest.raises(ValueError, match="cannot be restored"):
        vertebra.restore(fuse(own("resnet: basic")))


# ----------------------------------------------------------------------- a module like any other


@pytest.fixture(params=["resnet: grouped", "regnet: y", "convnext: v1"])
def fused(request: pytest.FixtureRequest) -> nn.Module:
    return fuse(own(request.param))


X = (2, 3, 40, 33)


def test_copies(fused, path):
    x = image(*X)
    expected = answers(fused, x)["logits"]
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(answers(twin, x)["logits"], expected)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    assert torch.equal(answers(torch.load(buffer, weights_only=False), x)["logits"], expected)


@pytest.mark.parity
@pytest.mark.parametrize("member", MEMBERS)
def test_copies_of_peers_stay_fused(member, request):
    request.getfixturevalue(member.partition(":")[0])
    fused, x = fuse(randomize(build(member)).eval()), image(2, 3, 33, 40)
    expected, ops = answers(fused, x)["logits"], sites(fused, x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(answers(twin, x)["logits"], expected)
        assert sites(twin, x) == ops


def test_a_state_goes_from_one_to_another(fused, path):
    x, twin = image(*X), copy.deepcopy(fused)
    answers(twin, x)  # whose weights are packed
    randomize(fused)
    twin.load_state_dict(fused.state_dict())
    assert torch.equal(answers(twin, x)["logits"], answers(fused, x)["logits"])
    assert not any("pack" in key or "running" in key for key in fused.state_dict())


def test_weights_changed_in_place_are_seen(fused, on_onednn):
    x = image(*X)
    answers(fused, x)
    with torch.no_grad():
        for p in fused.parameters():
            p.mul_(1.1)
    found = answers(fused, x)["logits"]
    assert torch.equal(found, answers(copy.deepcopy(fused), x)["logits"])
    for p in fused.parameters():
        p.data = p.data * 1.1
    assert not torch.equal(answers(fused, x)["logits"], found)
    assert torch.equal(answers(fused, x)["logits"], answers(copy.deepcopy(fused), x)["logits"])


def test_conversions(fused, path):
    x = image(*X)
    single = answers(fused, x)["logits"]
    double = answers(fused.double(), x.double())["logits"]
    torch.testing.assert_close(double, single, rtol=1e-4, atol=1e-4)
    half = answers(fused.bfloat16(), x.bfloat16())["logits"]
    torch.testing.assert_close(half, single, rtol=0.1, atol=0.1)
    fused.float().to(memory_format=torch.contiguous_format)
    assert answers(fused, x)["logits"].isfinite().all()


def test_packed_weights_leave_with_their_module(fused, on_onednn):
    _onednn._packed.clear()
    answers(fused, image(*X))
    layers = [m for m in fused.modules() if isinstance(m, (FusedConv2d, FusedLinear))]
    packed = {id(m.weight) for m in layers} & _onednn._packed.keys()
    assert len(packed) == len(_onednn._packed) > 0
    fused.to(torch.bfloat16)
    assert not _onednn._packed
    answers(fused, image(*X, dtype=torch.bfloat16))
    assert _onednn._packed
    copied = copy.deepcopy(fused)
    answers(copied, image(*X, dtype=torch.bfloat16))
    packed_twice = len(_onednn._packed)
    del copied
    assert len(_onednn._packed) == packed_twice // 2
    fused.to(torch.float32)
    assert not _onednn._packed


def test_weights_need_not_be_packed(on_onednn):
    model, x = own("convnext: v1"), image(*X)
    _onednn._packed.clear()
    fused = fuse(model, pack_weights=False)
    assert not judge(model, x, answers(fused, x))
    assert not _onednn._packed
    answers(copy.deepcopy(fused), x)
    assert not _onednn._packed


def test_images_of_a_batch_go_through_an_mlp_a_few_at_a_time(on_onednn, monkeypatch):
    model, x = own("convnext: v2"), image(5, 3, 40, 33)
    fused = fuse(model)
    whole = sites(fused, x).count(("conv2d_act", "onednn"))
    two = 2 * 32 * 80 * 4 // torch.get_num_threads()
    monkeypatch.setattr(sys.modules["vertebra.nn.mlp"], "_MAX_HIDDEN_BYTES_PER_THREAD", two)
    # two layers each of the first stage's block, 2, 2 and 1 images, and of the second's, 3 and 2
    more = 1 * 2 * (3 - 1) + 2 * 2 * (2 - 1)
    assert sites(fused, x).count(("conv2d_act", "onednn")) == whole + more
    assert not judge(model, x, answers(fused, x))


def test_no_gradient_is_wanted_but_may_be(fused, path):
    assert not any(p.requires_grad for p in fused.parameters())
    x = image(*X).requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


def test_under_autocast(fused, path):
    x = image(*X)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = fused(x)
    torch.testing.assert_close(y.double(), answers(fused, x)["logits"], rtol=0.1, atol=0.1)


def test_compiled(fused, on_onednn):
    torch._dynamo.reset()
    x = image(*X)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), fused(x), rtol=1e-4, atol=1e-4)


def test_exported(fused, on_onednn):
    x = image(*X)
    batch = torch.export.Dim("batch")
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for size in (2, 3):
            x = image(size, *X[1:])
            torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-4, atol=1e-4)


def test_traced(fused):
    traced, x = torch.fx.symbolic_trace(fused), image(*X)
    torch.testing.assert_close(traced(x), fused(x))


def test_in_inference_mode():
    with torch.inference_mode():
        fused = fuse(own("resnet: basic"))
    x = image(*X)
    assert not any(p.is_inference() for p in fused.parameters())
    with torch.inference_mode():
        found = fused(x)
    assert torch.equal(found, fused(x))


# ------------------------------------------------------------------------------------- the image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalised(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.std)


@pytest.mark.parametrize("name", ["resnet: basic", "regnet: y", "convnext: v1", "resnet: blurred"])
def test_the_image_is_normalised(name, path):
    model = own(name)
    fused, x = fuse(model, mean=MEAN, std=STD), torch.rand(2, 3, 40, 33)
    assert not judge(Normalised(model), x, answers(fused, x))
    has_mean = any(key.endswith("mean") for key in fused.state_dict())
    assert has_mean == ("convnext" not in name)  # whose first convolution pads nothing
    assert torch.equal(
        answers(pickle.loads(pickle.dumps(fused)), x)["logits"], answers(fused, x)["logits"]
    )


def test_the_image_of_a_peer_is_normalised(torchvision):
    model = randomize(build("torchvision: regnet_y")).eval()
    x = torch.rand(2, 3, 40, 33)
    assert not judge(Normalised(model), x, answers(fuse(model, mean=MEAN, std=STD), x))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mean": MEAN}, "belong together"),
        ({"mean": MEAN, "std": (1.0, 1.0)}, "one value per channel"),
        ({"mean": MEAN, "std": (1.0, 1.0, 0.0)}, "positive"),
    ],
)
def test_what_does_not_normalise_an_image(options, match):
    with pytest.raises(ValueError, match=match):
        fuse(own("resnet: basic"), **options)


def test_an_image_that_two_read_is_not_normalised():
    model = Normalised(own("resnet: basic")).eval()
    with pytest.raises(ValueError, match=r"image is read by aten\.sub"):
        fuse(model, mean=MEAN, std=STD)


# -------------------------------------------------------------------------------------- mutations


def without_eps(norm: Any) -> tuple[Tensor, Tensor]:
    other = copy.deepcopy(norm)
    other.eps = 0.0
    return _fold.scale_of(other)


def of_the_wrong_channel(norm: Any) -> tuple[Tensor, Tensor]:
    scale, shift = _fold.scale_of(norm)
    return scale.roll(1), shift


def without_mean(norm: Any) -> tuple[Tensor, Tensor]:
    scale, shift = _fold.scale_of(norm)
    return scale, shift + norm.running_mean.double() * scale


def forgetting_bias(layer: Any, scale: Tensor, shift: Tensor | None = None) -> None:
    layer.bias = None
    _fold.fold(layer, scale, shift)


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("scale_of", without_eps),
        ("scale_of", of_the_wrong_channel),
        ("scale_of", without_mean),
        ("fold", forgetting_bias),
    ],
)
def test_a_planted_mistake_is_found(name, mutation, monkeypatch):
    model, x = randomize(Block(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))).eval(), image(3, 6, 9, 9)
    assert not judge(model, x, answers(fuse(model), x))
    monkeypatch.setattr(fuse_module, name, mutation)
    assert judge(model, x, answers(fuse(model), x))


def test_fuse_is_public():
    assert vertebra.fuse is fuse_function


# --------------------------------------------------------------------------- maps that hooks keep

KEEPERS = {
    "own": lambda: own("resnet: basic"),
    "torchvision": lambda: peers.torchvision_module("models.resnet").resnet18(num_classes=5),
    "timm": lambda: peers.timm().create_model("resnet18", num_classes=5),
    "timm's features": lambda: peers.timm().create_model("resnet18", features_only=True),
    "timm's excitation": lambda: peers.timm().create_model("seresnet18", num_classes=5),
}


def kept(model: nn.Module, kind: type) -> dict[str, tuple[bool, Tensor]]:
    """Return the maps that hooks on modules of a kind keep, each with whether it stays as it was.

    By the modules' names.
    """
    maps: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, kind):
            module.register_forward_hook(
                lambda m, i, y, name=name: maps.update({name: (y, y.clone())})
            )
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    return {name: (torch.equal(y, was), y) for name, (y, was) in maps.items()}


@pytest.mark.parity
@pytest.mark.parametrize("name", KEEPERS)
def test_what_a_hook_of_a_convolution_keeps_is_not_overwritten(name: str, path: str) -> None:
    """But where it is in the model itself: an excitation has no norm before its activation."""
    model = randomize(KEEPERS[name]()).eval()
    fused = fuse(model)
    with vertebra.backend("eager"):
        theirs = kept(model, nn.Conv2d)
    mine = kept(fused, FusedConv2d)
    assert {n for n, (stays, _) in mine.items() if not stays} == {
        n for n, (stays, _) in theirs.items() if not stays
    }
    assert all(stays for n, (stays, _) in mine.items() if "se." not in n)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["torchvision", "own"])
def test_what_a_hook_of_a_norm_keeps_is_as_in_the_model_itself(name: str, path: str) -> None:
    """An activation in place writes over it in both; an add does only in torchvision's."""
    model = randomize(KEEPERS[name]()).eval()
    fused = fuse(model)
    with vertebra.backend("eager"):
        theirs = kept(model, nn.BatchNorm2d)
    mine = kept(fused, Folded)
    assert mine.keys() == theirs.keys()
    assert not mine["bn1"][0]
    for n, (stays, y) in mine.items():
        assert stays >= theirs[n][0]
        if stays == theirs[n][0]:
            torch.testing.assert_close(y, theirs[n][1], rtol=1e-3, atol=1e-3)
