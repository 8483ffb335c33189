"""ResNets beyond torchvision's: attention, anti-aliased strides, dropping; the same bits as timm's.

The keys and shapes of every name are held in test_resnet.py.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.kernels import _op
from vertebra.models import ResNet, ResNetConfig, create_model
from vertebra.nn import (
    EcaModule,
    create_aa_max_pool,
)


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 65, 49))


def small(block: str = "basic", layers: tuple[int, ...] = (1, 1, 1, 1), **options: Any) -> ResNet:
    """A narrow ResNet."""
    widths = {"hidden_sizes": (16, 24, 32, 40)[: len(layers)], "embedding_size": 16}
    return ResNet(ResNetConfig(block, layers, **{**widths, "num_classes": 5, **options}))


def blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "downsample")]


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output of a forward pass, all gradients of it, and the statistics behind it."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
    assert x.grad is not None
    named = {"y": y.detach(), "dx": x.grad}
    named |= {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return named | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_steps(ours: nn.Module, peer: nn.Module, x: Tensor) -> None:
    for training in (False, True):
        torch.manual_seed(1)
        expected = step(peer.train(training), x)
        torch.manual_seed(1)
        actual = step(ours.train(training), x)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name


def ops(run: Callable[[], Any]) -> list[str]:
    """Return the ops that `run` calls, in order."""
    seen: list[_op.Call] = []
    with _op.observe(seen.append):
        run()
    return [call.op.name for call in seen]


# timm


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [
        "seresnet18",
        "ecaresnet26t",
        "resnetblur18",
        pytest.param("seresnext26d_32x4d", marks=pytest.mark.thorough),
        pytest.param("resnetaa34d", marks=pytest.mark.thorough),
        pytest.param("resnetrs50", marks=pytest.mark.thorough),
    ],
)
def test_named_as_timm(name, timm, randomize):
    with torch.device("meta"):
        peer, ours = timm.create_model(name), create_model(name)
    state = randomize(peer).state_dict()
    for module in peer.modules():
        if isinstance(module, timm.layers.BlurPool2d):
            module.reset_parameters()  # no part of the state
    ours.to_empty(device="cpu").load_state_dict(state)
    x = images(2, 3, 64, 96) if "aa" in name else images()
    assert_same_steps(ours, peer, x)


SE = {"attn_layer": "se"}
OPTIONS = {  # model, options of ours, and those of timm where it wants others
    "se": ("resnet10t", SE, {"block_args": SE}),
    "se, silu": (
        "resnet14t",
        {"attn_layer": "SE", "act_layer": "silu"},
        {"block_args": SE, "act_layer": "silu"},
    ),
    "block_args": ("resnet10t", {"block_args": SE}, {"block_args": SE}),
    "senet": (
        "resnet10t",
        {"block_reduce_first": 2, "down_kernel_size": 3, "avg_down": False, **SE},
        {"block_reduce_first": 2, "down_kernel_size": 3, "avg_down": False, "block_args": SE},
    ),
    "eca": ("resnet10t", {"attn_layer": EcaModule}, {"block_args": {"attn_layer": "eca"}}),
    "avg": ("resnet10t", {"aa_layer": "avg"}, {"aa_layer": nn.AvgPool2d}),
    "avg, 16": (
        "resnet14t",
        {"aa_layer": "avg", "output_stride": 16},
        {"aa_layer": nn.AvgPool2d, "output_stride": 16},
    ),
    "blur": ("resnet14t", {"aa_layer": "blur"}, {"aa_layer": "BlurPool2d"}),
    "blur, 8": (
        "resnet10t",
        {"aa_layer": "blur", "output_stride": 8},
        {"aa_layer": "BlurPool2d", "output_stride": 8},
    ),
    "blur, conv pool": (
        "resnet10t",
        {"aa_layer": "blur", "replace_stem_pool": True, "act_layer": "silu"},
        {"aa_layer": "BlurPool2d", "replace_stem_pool": True, "act_layer": "silu"},
    ),
    "drop block": ("resnet10t", {"drop_block_rate": 0.3}, {"drop_block_rate": 0.3}),
    "drop block, group norm": (
        "resnet14t",
        {"drop_block_rate": 0.5, "norm_layer": "groupnorm1", **SE},
        {"drop_block_rate": 0.5, "norm_layer": "groupnorm1", "block_args": SE},
    ),
    "group norm": ("resnet18", {"norm_layer": "groupnorm"}, {"norm_layer": "groupnorm"}),
}


@pytest.mark.parity
@pytest.mark.parametrize("case", OPTIONS)
def test_options_as_timm(case, timm, randomize):
    """The initial weights of a seed, then outputs, gradients and statistics, bit for bit."""
    name, options, of_timm = OPTIONS[case]
    if of_timm.get("aa_layer") == "BlurPool2d":  # its stem takes no name
        of_timm = {**of_timm, "aa_layer": timm.layers.BlurPool2d}
    torch.manual_seed(3)
    ours = create_model(name, num_classes=5, zero_init_last=True, **options)
    torch.manual_seed(3)
    peer = timm.create_model(name, num_classes=5, **of_timm)
    assert list(ours.state_dict()) == list(peer.state_dict())
    for key, value in peer.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    ours.load_state_dict(randomize(peer).state_dict())
    assert_same_steps(ours, peer, images(2, 3, 64, 96) if case == "avg" else images())


@pytest.mark.parity
@pytest.mark.parametrize("attn_layer", ["se", "eca", None])
def test_drop_path_rates_as_timm(attn_layer, timm):
    options = {"drop_path_rate": 0.3, "drop_block_rate": 0.1}
    with torch.device("meta"):
        ours = create_model("resnet26d", attn_layer=attn_layer, **options)
        peer = timm.create_model("resnet26d", block_args={"attn_layer": attn_layer}, **options)
    for block, other in zip(blocks(ours), blocks(peer), strict=True):
        rates = [getattr(b.drop_path, "drop_prob", None) for b in (block, other)]
        assert rates[0] == rates[1]
        squares = [
            (b.drop_block.drop_prob, b.drop_block.block_size, b.drop_block.gamma_scale)
            if hasattr(b.drop_block, "block_size")
            else None
            for b in (block, other)
        ]
        assert squares[0] == squares[1]
    assert blocks(ours)[0].drop_path is None
    assert create_model("resnet18").layer4[1].drop_path is None


# ours


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, ["norm"]),
        (SE, ["norm", "squeeze_excite"]),
        ({"attn_layer": "eca"}, ["norm", "global_avg_pool"]),
        ({"drop_block_rate": 0.1}, ["norm"]),
        ({"drop_path_rate": 0.1}, ["norm", "drop_path_add"]),
        ({"drop_path_rate": 0.1, **SE}, ["norm", "squeeze_excite", "drop_path_add"]),
    ],
    ids=str,
)
def test_ends_of_blocks_are_fused(options, end, training):
    """The shortcut and the activation are part of the last op, except behind one that drops."""
    model = small(**options).train(training)
    if not training:
        end = [op for op in end if op != "drop_path_add"]
    block = model.layer4[0]
    norm = "batch_norm_act" if training else "scale_bias_act"
    found = ops(lambda: block(images(2, 32, 9, 9)))
    expected = [norm, norm, *(norm if op == "norm" else op for op in end)]  # first, shortcut, last
    assert found == expected


@pytest.mark.parametrize("norm_layer", ["batchnorm2d", "groupnorm1"])
@pytest.mark.parametrize("attn_layer", [None, "se", "eca"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_dropped_sample_is_its_shortcut(block, attn_layer, norm_layer, randomize):
    options = {"attn_layer": attn_layer, "norm_layer": norm_layer}
    model = randomize(small(block, (1, 1), drop_path_rate=0.75, **options)).train()
    x = images(64, 16, 9, 9).relu()
    last = model.layer2[0]
    assert last.drop_path.drop_prob == 0.75
    last.drop_path.drop_prob = 1.0
    assert torch.equal(last(x), last.downsample(x).relu())
    last.drop_path.drop_prob = 0.75
    seen: list[tuple[Tensor, Tensor]] = []
    hook = last.drop_path.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    torch.manual_seed(2)
    watched = last(x)
    hook.remove()
    torch.manual_seed(2)
    y = last(x)
    ((branch, dropped),) = seen
    kept = dropped.flatten(1).any(1)
    assert 4 < int(kept.sum()) < 32  # of 64; 16 expected
    torch.testing.assert_close(dropped[kept], branch[kept] / 0.25)
    torch.testing.assert_close(y, (dropped + last.downsample(x)).relu())
    torch.testing.assert_close(watched, y)


def test_dropping_follows_the_seed_and_ends_in_eval_mode(randomize):
    model = randomize(small(drop_path_rate=0.5, drop_block_rate=0.5)).train()
    plain = small()
    plain.load_state_dict(model.state_dict())
    x = images(8, 3, 65, 49)
    with torch.no_grad():
        outputs: list[Tensor] = []
        for seed in (5, 5, 6):
            torch.manual_seed(seed)
            outputs.append(model(x))
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("hooked", ["se", "drop_path", "drop_block", "relu"])
def test_hooks_fire(hooked, randomize):
    """A module that somebody watches is called by itself, and the function stays the same."""
    model = randomize(small(drop_path_rate=0.1, drop_block_rate=0.1, attn_layer="se")).eval()
    x = images()
    expected = model(x)
    seen: list[Tensor] = []
    module = getattr(model.layer4[0], hooked)
    module.register_forward_hook(lambda module, args, y: seen.append(y))
    torch.testing.assert_close(model(x), expected)
    assert len(seen) == 1


@pytest.mark.parametrize("training", [False, True])
def test_sync_batch_norm_conversion_keeps_the_function(training, randomize):
    options = {"drop_path_rate": 0.5, "drop_block_rate": 0.5, "attn_layer": "se"}
    model = randomize(small("bottleneck", **options)).train(training)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    x = images()
    results: list[Tensor] = []
    for module in (converted, model):
        torch.manual_seed(1)
        results.append(module(x))
    assert torch.equal(*results)


def test_a_shortcut_of_another_size_is_refused(randomize):
    """Averaging rounds an odd size down where the shortcut rounds it up; timm adds them not."""
    for options in ({}, {"attn_layer": "se"}, {"attn_layer": "eca"}, {"norm_layer": "groupnorm1"}):
        block = randomize(small(aa_layer="avg", **options)).eval().layer2[0]
        with pytest.raises((ValueError, RuntimeError), match=r"residual|size"):
            block(images(1, 16, 3, 8))


def test_stems_with_anti_aliasing():
    assert isinstance(create_aa_max_pool(None, 8), nn.MaxPool2d)
    assert isinstance(create_aa_max_pool("avg", 8), nn.AvgPool2d)
    pool, blur = create_aa_max_pool("blur", 8)
    assert (pool.stride, blur.stride) == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path_rate": 1.5}, "drop_path_rate=1.5"),
        ({"drop_block_rate": -0.1}, "drop_block_rate=-0.1"),
        ({"aa_layer": "avg", "downsample_in_bottleneck": True}, "give one of them"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**options)


@pytest.mark.parametrize("option", ["attn_layer", "aa_layer"])
def test_an_unknown_layer_is_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*; got 'cube'"):
        small(**{option: "cube"})


def test_a_single_block_has_no_drop_path():
    assert small(layers=(1,), drop_path_rate=0.5).layer1[0].drop_path is None


def test_copies_and_pickles(randomize):
    with torch.device("meta"):
        named = create_model("resnetrs50")
    assert pickle.loads(pickle.dumps(named.config)) == named.config
    options = {"attn_layer": "se", "aa_layer": "blur", "drop_block_rate": 0.1}
    model = randomize(small(drop_path_rate=0.1, **options)).eval()
    x = images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config == model.config
        assert torch.equal(other(x), model(x))


EXTRAS = [
    {"attn_layer": "se"},
    {"attn_layer": "eca", "aa_layer": "blur"},
    {"drop_path_rate": 0.3, "drop_block_rate": 0.3, "attn_layer": "se"},
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", EXTRAS, ids=str)
def test_symbolic_trace_keeps_the_function(options, training, randomize):
    model = randomize(small("bottleneck", **options)).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    x = images()
    results: list[Tensor] = []
    for module in (traced, model):
        torch.manual_seed(1)
        results.append(module(x))
    assert torch.equal(*results)


@pytest.mark.parametrize("options", EXTRAS, ids=str)
def test_compiles_to_one_graph(options, randomize):
    model = randomize(small(layers=(1, 1, 1), **options)).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    x = images()
    results: list[Tensor] = []
    for module in (compiled, model):
        torch.manual_seed(1)
        results.append(module(x))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_exports_with_dynamic_sizes(randomize):
    model = randomize(small(attn_layer="se", layers=(1, 1))).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    height, width = (torch.export.Dim(name, min=33, max=1024) for name in ("height", "width"))
    shapes = ({0: batch, 2: height, 3: width},)
    program = torch.export.export(model, (images(),), dynamic_shapes=shapes)
    for shape in [(1, 3, 65, 49), (5, 3, 33, 100)]:
        x = images(*shape)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


def test_trains_alike_on_kernels_and_eager(device, randomize):
    """Attention and stochastic depth on Triton kernels: in the interpreter without a GPU.

    The first block does not drop and ends in one op, the second ends in two.
    """
    options = {"hidden_sizes": (8, 8), "embedding_size": 4, "attn_layer": "se"}
    model = randomize(small(layers=(1, 1), drop_path_rate=0.5, **options)).double().to(device)
    x = images(3, 3, 17, 13).double().to(device)
    results: list[Any] = []
    for name in ("eager", "triton"):
        with vertebra.backend(name):
            trained = copy.deepcopy(model).train()
            torch.manual_seed(2)
            trained(x).square().sum().backward()
            evaluated = trained.eval()(x)
        gradients = [parameter.grad for parameter in trained.parameters()]
        results.append((evaluated, gradients, trained.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-8)
