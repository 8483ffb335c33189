"""Fused bottlenecks in a row: one op between two where nobody watches, the same numbers always."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vertebra.bench import peers
from vertebra.bench.oracle import Oracle
from vertebra.interop import fuse
from vertebra.kernels import backend
from vertebra.kernels._op import observe
from vertebra.models import RegNetConfig, ResNetConfig
from vertebra.models.regnet import RegNet
from vertebra.models.resnet import ResNet
from vertebra.nn.back_to_back import BackToBack
from vertebra.testing.parity import randomize

SHAPE = (1, 3, 20, 17)
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
    shape = {"layers": (2, 3, 1), "hidden_sizes": (32, 64, 64), "embedding_size": 8}
    options |= OURS[name] | {"num_classes": 5}
    return randomize(ResNet(ResNetConfig("bottleneck", **shape, **options))).eval()


def run(model: nn.Module, x: Tensor, path: str = "triton") -> tuple[dict[str, Tensor], Counter]:
    """Return the answers of a model, and how often it calls which op on Triton."""
    found = Counter[str]()
    with backend(path), observe(lambda call: found.update([call.op.name])), torch.no_grad():  # pyright: ignore
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
    together = ops["conv2d_act"] + 2 * ops["conv2d_b2b"] + ops["conv2d_act_pool"]
    assert together == run(fused, x, "eager")[1]["conv2d_act"]


@pytest.mark.parity
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_features_of_peers(library: str, request) -> None:
    peer = request.getfixturevalue(library)
    if library == "timm":
        resnet = peer.models.resnet
        model = resnet.ResNet(resnet.Bottleneck, (2, 3, 1, 1), channels=(8,) * 4, num_classes=5)
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
    assert ops["conv2d_b2b"] == 3


@pytest.mark.parametrize(
    ("watched", "expected"),
    [
        ("layer2.1", 1),  # the first block of a pair, and the second one of another
        ("layer2.1.conv3", 2),
        ("layer2.1.bn1", 2),
        ("layer2.1.conv2", 3),
        ("layer2", 3),
    ],
)
def test_who_watches_sees_what_is_promised(watched: str, expected: int) -> None:
    model, x = own("resnet"), torch.randn(SHAPE)
    fused = fuse(model)
    plain, seen = run(fused, x)[0], []
    hook = fused.get_submodule(watched).register_forward_hook(lambda *args: seen.append(args[-1]))
    y, ops = run(fused, x)
    assert ops["conv2d_b2b"] == expected
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
