"""Fused bottlenecks in a row: one op between two where nobody watches, the same numbers always."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vertebra.bench import peers
from vertebra.bench.oracle import Oracle
from vertebra.interop import fuse
from vertebra.kernels import _choices, backend
from vertebra.kernels._b2b import Arguments
from vertebra.kernels._op import Call, observe
from vertebra.models import RegNetConfig, ResNetConfig
from vertebra.models.regnet import RegNet
from vertebra.models.resnet import ResNet
from vertebra.nn.back_to_back import BackToBack, end_of
from vertebra.nn.fused import Folded, FusedConv2d
from vertebra.testing.parity import randomize

SHAPE = (1, 3, 20, 17)
DEEP = {"layers": (1, 1, 4, 1), "hidden_sizes": (64,) * 4}
OURS = {
    "resnet": {},
    "resnext": {"groups": 4, "width_per_group": 16},
    "drop": {"drop_path_rate": 0.1},
    "silu": {"act_layer": "silu"},
}


def _regnet(**options: Any) -> nn.Module:
    shape = {"hidden_sizes": (16, 24, 32), "depths": (1, 3, 1), "group_width": 8, "num_classes": 5}
    return RegNet(RegNetConfig(**{"layer_type": "x", **shape, **options}))


def own(name: str, **options: Any) -> nn.Module:
    if name.startswith("regnet"):
        options |= {"layer_type": name[-1]} if name[-2] == " " else {"drop_path_rate": 0.1}
        return randomize(_regnet(**options)).eval()
    shape = {"layers": (2, 3, 1), "hidden_sizes": (64, 64, 64), "embedding_size": 8}
    options = shape | OURS[name] | {"num_classes": 5} | options
    return randomize(ResNet(ResNetConfig("bottleneck", **options))).eval()


def run(model: nn.Module, x: Tensor, path: str = "triton") -> tuple[dict[str, Tensor], Counter]:
    """Return the answers of a model, and how often it calls which op on Triton.

    Of the calls of `conv2d_b2b` also, as "3x3", how many have one in front.
    """
    found = Counter[str]()

    def note(call: Call) -> None:
        found[call.op.name] += 1
        if call.op.name == "conv2d_b2b":
            found["3x3"] += Arguments(*call.args).mid_weight is not None

    # the interpreter computes with numpy, which warns where exp(-x) of a SiLU is infinite
    with backend(path), observe(note), torch.no_grad(), np.errstate(over="ignore"):
        y = model(x)
    if isinstance(y, dict):
        y = [*y.values()]
    values = [y] if isinstance(y, Tensor) else y
    return {str(i): value.double() for i, value in enumerate(values)}, found


def judge(model: nn.Module, x: Tensor, found: dict[str, Tensor]) -> str:
    """Return what is wrong with the answers of a fused model, by those of the model itself."""
    oracle = Oracle(run(copy.deepcopy(model).double(), x.double(), "eager")[0], x.dtype)
    for seed in range(2):
        net = copy.deepcopy(model)
        torch.manual_seed(seed)
        for value in net.state_dict().values():  # moved by a rounding, as folding moves them
            if value.is_floating_point():
                noise = (2 * torch.rand(value.shape) - 1).to(value.dtype)
                value.mul_(1 + torch.finfo(x.dtype).eps * noise)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            oracle.calibrate(run(net, given, "eager")[0])
    return oracle.judge(found).wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", [*OURS, "regnet x", "regnet y", "regnet drop"])
def test_our_networks(name: str, dtype: torch.dtype) -> None:
    model = own(name).to(dtype)
    fused = fuse(model)
    x = torch.randn(SHAPE).to(dtype)
    y, ops = run(fused, x)
    assert not judge(model, x, y)
    assert ops["conv2d_b2b"] == {"regnet x": 2, "regnet drop": 2, "regnet y": 0}.get(name, 3)
    # the first block of stage 1, the second of stage 2: before that there is a stride
    assert ops["3x3"] == (2 if name in ("resnet", "drop", "silu") else 0)
    together = ops["conv2d_act"] + 2 * ops["conv2d_b2b"] + ops["3x3"] + ops["conv2d_act_pool"]
    assert together == run(fused, x, "eager")[1]["conv2d_act"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"aa_layer": "blur"}, 2),  # which has the stride of a 3x3 that has none
        (DEEP, 2),
        (DEEP | {"output_stride": 8}, 1),  # the others of the third stage are dilated
        ({"drop_block_rate": 0.1}, 2),
    ],
    ids=str,
)
def test_what_is_not_just_a_3x3_stays_apart(options: dict[str, Any], expected: int) -> None:
    model, x = own("resnet", **options), torch.randn(SHAPE)
    y, ops = run(fuse(model), x)
    assert not judge(model, x, y)
    assert ops["3x3"] == expected


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({}, True),
        ({"stride": 2}, False),
        ({"padding": 0}, False),
        ({"dilation": 2}, False),
        ({"padding": 2, "dilation": 2}, False),
        ({"padding_mode": "reflect"}, False),
        ({"groups": 2}, False),
        ({"kernel_size": 5, "padding": 2}, False),
    ],
    ids=str,
)
def test_which_convolution_is_a_3x3(options: dict[str, Any], fits: bool) -> None:
    conv = FusedConv2d(4, 4, **{"kernel_size": 3, "padding": 1, **options})
    assert (end_of(conv, Folded(4), nn.ReLU(), side=3) is not None) is fits
    assert end_of(conv, Folded(4), nn.ReLU()) is None


def test_a_3x3_is_left_apart_until_that_is_measured(tmp_path, monkeypatch) -> None:
    model, x = own("resnet").half(), torch.randn(SHAPE).half()
    fused = fuse(model)
    monkeypatch.setattr(_choices, "user_folder", lambda: tmp_path)
    _choices.forget()
    assert run(fused, x, "auto")[1]["3x3"] == 0
    site, device = "16x3x3 > 16 3x3 > 64 > 16 float16 residual", _choices.device_name(x.device)
    _choices.write("conv2d_b2b", device, {site: {1: "triton"}}, {})
    y, ops = run(fused, x, "auto")
    assert ops["3x3"] == 1
    assert not judge(model, x, y)
    monkeypatch.undo()
    _choices.forget()


@pytest.mark.parity
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_features_of_peers(library: str, request) -> None:
    peer = request.getfixturevalue(library)
    if library == "timm":
        resnet = peer.models.resnet
        model = resnet.ResNet(resnet.Bottleneck, (2, 3, 1, 1), channels=(16,) * 4, num_classes=5)
        model = peer.models.FeatureListNet(model, out_indices=(1, 2, 3))
    else:
        resnet = peers.torchvision_module("models.resnet")
        model = resnet.ResNet(resnet.Bottleneck, (2, 3, 1, 1), num_classes=5)
        utils = peers.torchvision_module("models._utils")
        model = utils.IntermediateLayerGetter(model, {"layer1": "a", "layer2": "b"})
    model = randomize(model).eval()
    x = torch.randn(SHAPE)
    y, ops = run(fuse(model), x)
    assert not judge(model, x, y)
    assert (ops["conv2d_b2b"], ops["3x3"]) == (3, 2)


@pytest.mark.parametrize(
    ("watched", "expected", "whole"),
    [
        ("layer2.1", 1, 1),  # the first block of a pair, and the second one of another
        ("layer2.1.conv3", 2, 1),
        ("layer2.1.bn1", 2, 2),
        ("layer2.1.conv2", 3, 1),
        ("layer2.1.bn2", 3, 1),
        ("layer1.0.downsample", 3, 2),
        ("layer2", 3, 2),
    ],
)
def test_who_watches_sees_what_is_promised(watched: str, expected: int, whole: int) -> None:
    model, x = own("resnet"), torch.randn(SHAPE)
    fused = fuse(model)
    plain, seen = run(fused, x)[0], []
    hook = fused.get_submodule(watched).register_forward_hook(lambda *args: seen.append(args[-1]))
    y, ops = run(fused, x)
    assert (ops["conv2d_b2b"], ops["3x3"]) == (expected, whole)
    assert seen
    assert not judge(model, x, y)
    hook.remove()
    assert torch.equal(run(fused, x)[0]["0"], plain["0"])


@pytest.mark.parametrize("watched", ["f", "f.a", "f.c", "f.c.1", "f.a.0"])
def test_who_watches_a_transform(watched: str) -> None:
    fused, seen = fuse(own("regnet x")), []
    block = fused.get_submodule("trunk_output.block2.block2-1")
    block.get_submodule(watched).register_forward_hook(lambda *args: seen.append(args[-1]))
    _, ops = run(fused, torch.randn(SHAPE))
    assert seen
    assert ops["conv2d_b2b"] == (0 if watched == "f" else 1)


def test_what_is_not_two_convolutions_stays_apart() -> None:
    for options in ({"attn_layer": "se"}, {"act_layer": nn.Hardtanh}, {"layers": (1, 1)}):
        shape = {"layers": (1, 2), "hidden_sizes": (32, 64), "num_classes": 5, **options}
        model = randomize(ResNet(ResNetConfig("bottleneck", **shape))).eval()
        ops = run(fuse(model), torch.randn(SHAPE), "auto")[1]
        assert ops["conv2d_b2b"] == 0
    basic = ResNet(ResNetConfig("basic", layers=(2,), hidden_sizes=(8,))).eval()
    assert not any(isinstance(m, BackToBack) for m in fuse(basic).modules())


@pytest.mark.parametrize("name", ["resnet", "regnet y"])
def test_a_fused_network_is_a_module_like_any_other(name: str) -> None:
    model = own(name)
    fused, x = fuse(model), torch.randn(SHAPE)
    y, ops = run(fused, x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        found, again = run(twin, x)
        assert torch.equal(found["0"], y["0"])
        assert again == ops
    kept = {key for key in model.state_dict() if "bn" not in key and ".1." not in key}
    assert kept & fused.state_dict().keys()
    with backend("triton"), torch.no_grad():
        features = fused.forward_features(x)
        last, every = fused.forward_intermediates(x)
        assert torch.equal(features, last)
        assert torch.equal(every[-1], fused.list_stages()[-1](every[-2]))
        torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), fused(x))
    loaded = fuse(own(name))
    loaded.load_state_dict(fused.state_dict())
    assert torch.equal(run(loaded, x)[0]["0"], y["0"])


def test_features_of_ours() -> None:
    model = own("resnet")
    model.keep_features((1, 2))
    x = torch.randn(SHAPE)
    y, ops = run(fuse(model), x)
    assert not judge(model, x, y)
    assert ops["conv2d_b2b"] == 3


@pytest.mark.parametrize("name", ["resnet", pytest.param("regnet x", marks=pytest.mark.thorough)])
def test_compiled_and_exported(name: str) -> None:
    """The op is in the graph, and chooses when it runs."""
    fused, image = fuse(own(name)).half(), torch.randn(3, *SHAPE[1:]).half()
    with torch.no_grad(), backend("auto"):
        _, (*_, x, _, _) = fused.forward_intermediates(image)
        stage = fused.list_stages()[1]
        expected = stage(x)
        torch._dynamo.reset()
        compiled = torch.compile(stage, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        batch = torch.export.Dim("batch", max=64)
        program = torch.export.export(stage, (x,), dynamic_shapes=({0: batch},))
        targets = [str(node.target) for node in program.graph.nodes]
        assert targets.count("vertebra.conv2d_b2b.default") == 2
        assert torch.equal(program.module()(x), expected)
        assert torch.equal(program.module()(x[:2]), stage(x[:2]))


def test_nothing_changes_where_kernels_do_not_run(monkeypatch) -> None:
    """On a CPU a fused network calls what it called before: blocks, one by one."""
    monkeypatch.setattr("vertebra.nn.back_to_back.has_kernels", lambda x: False)
    fused, x, seen = fuse(own("resnet")), torch.randn(SHAPE), []
    monkeypatch.setattr("vertebra.nn.back_to_back.as_one", lambda *args: seen.append(args))
    assert run(fused, x, "auto")[1]["conv2d_b2b"] == 0
    assert not seen
