"""SqueezeExcite against timm's, torchvision's and transformers' modules, on both paths."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import vertebra
from vertebra.kernels import _op
from vertebra.nn import SqueezeExcite
from vertebra.testing.budget import assert_within_budget

PATHS = ["eager", "triton"]
C, R = 12, 5


def randomised(module: nn.Module) -> nn.Module:
    """Give every parameter a random value: ones and zeros hide bugs."""
    with torch.no_grad():
        for t in module.state_dict().values():
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.5 if t.dim() == 1 else torch.randn_like(t))
    return module


def calls(run) -> int:
    """Return how many op calls `run` makes."""
    seen: list[_op.Call] = []
    with _op.observe(seen.append):
        run()
    return len(seen)


def step(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run forward and backward; return the output and the gradients, the parameters' in order."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    generator = torch.Generator().manual_seed(1)
    y.backward((torch.randn(y.shape, generator=generator).bfloat16() + 0.5).to(y))
    gradients = {f"d{i}": p.grad for i, p in enumerate(module.parameters())}
    return {"y": y.detach(), "dx": x.grad} | gradients


def timms(**kwargs) -> nn.Module:
    from timm.layers import SEModule

    return SEModule(C, rd_channels=R, **kwargs)


def torchvisions() -> nn.Module:
    from torchvision.ops import SqueezeExcitation

    return SqueezeExcitation(C, R)


def transformers() -> nn.Module:
    from transformers.models.regnet.modeling_regnet import RegNetSELayer

    return RegNetSELayer(C, R)


@pytest.mark.parity
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peer", [timms, torchvisions, transformers])
def test_as_the_peers(peer, dtype: torch.dtype, layout, path: str, device) -> None:
    """Same weights, same outputs and gradients, within the error budget of their own fp64."""
    theirs = randomised(peer())
    ours = SqueezeExcite(C, rd_channels=R)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    exact = copy.deepcopy(theirs).to(device).double()
    ours, theirs = ours.to(device, dtype), theirs.to(device, dtype)
    exact.load_state_dict(theirs.state_dict())
    x = (torch.randn(3, C, 5, 7, device=device) + 1).to(dtype).contiguous(memory_format=layout)
    with vertebra.backend(path):
        assert calls(lambda: ours(x)) == 1
        mine = step(ours, x)
    expected, truth = step(theirs, x), step(exact, x.double())
    assert mine["y"].stride() == x.stride()
    for name, value in expected.items():
        terms = 1 if name in ("y", "dx") else 3 * 5 * 7
        assert_within_budget(name, mine[name], value, truth[name], terms)


@pytest.mark.parity
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bias": False},
        {"act_layer": nn.SiLU},
        {"act_layer": nn.GELU, "gate_layer": "hard_sigmoid"},
        {"act_layer": "hard_swish", "gate_layer": nn.Hardsigmoid},
        {"act_layer": nn.Tanh},
        {"gate_layer": nn.Tanh},
        {"add_maxpool": True},
        {"norm_layer": nn.BatchNorm2d},
    ],
    ids=str,
)
def test_options_as_in_timm(kwargs: dict) -> None:
    """Bit for bit in eager; the op runs unless it does not know an option."""
    theirs, ours = randomised(timms(**kwargs)), SqueezeExcite(C, rd_channels=R, **kwargs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, C, 5, 7)
    unknown = {"add_maxpool", "norm_layer"} & kwargs.keys() or nn.Tanh in kwargs.values()
    with vertebra.backend("eager"):
        assert calls(lambda: ours(x)) == (0 if unknown else 1)
        found, expected = step(ours, x), step(theirs, x)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parity
def test_signature_is_timms() -> None:
    from timm.layers import SqueezeExcite as Theirs

    found = list(inspect.signature(SqueezeExcite).parameters.values())
    for theirs, ours in zip(inspect.signature(Theirs).parameters.values(), found, strict=False):
        assert (ours.name, ours.default) == (theirs.name, theirs.default)
    assert [p.name for p in found[len(inspect.signature(Theirs).parameters) :]] == ["rd_round_fn"]


@pytest.mark.parity
def test_hidden_channels() -> None:
    """By each of the peers' rules; theirs of a RegNet counts the channels that enter the block."""
    from timm.layers import SqueezeExcite as Theirs
    from timm.models._efficientnet_blocks import SqueezeExcite as EfficientNets
    from transformers.models.regnet.configuration_regnet import RegNetConfig
    from transformers.models.regnet.modeling_regnet import RegNetYLayer

    for channels in (16, 30, 54, 58, 96, 200, 1512):
        for ratio in (1 / 16, 0.25, 0.3):
            kwargs = {"rd_ratio": ratio}
            found = SqueezeExcite(channels, **kwargs).fc1.out_channels
            assert found == Theirs(channels, **kwargs).fc1.out_channels
            found = SqueezeExcite(channels, **kwargs, rd_round_fn=round).fc1.out_channels
            assert found == EfficientNets(channels, **kwargs).conv_reduce.out_channels
    assert SqueezeExcite(54, rd_ratio=0.25, rd_round_fn=round).fc1.out_channels == 14  # not 13
    layer = RegNetYLayer(RegNetConfig(groups_width=8), 54, 16).layer[2]
    ours = SqueezeExcite(16, rd_channels=round(54 / 4))
    assert layer.attention[0].weight.shape == ours.fc1.weight.shape


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("out_act", [None, nn.ReLU, nn.SiLU, nn.Tanh])
def test_residual_and_last_activation(path: str, out_act, device) -> None:
    """Also with an activation the op does not know, and where the whole runs in plain PyTorch."""
    function = None if out_act is None else out_act()
    x, residual = torch.randn(2, 2, C, 5, 4, device=device)
    for kwargs in ({}, {"add_maxpool": True}):
        se = randomised(SqueezeExcite(C, rd_channels=R, **kwargs)).to(device)
        with vertebra.backend("eager"):
            bare = se(x)
        with vertebra.backend(path):
            for r in (None, residual):
                expected = bare if r is None else bare + r
                expected = expected if function is None else function(expected)
                torch.testing.assert_close(se(x, r, function), expected)


@pytest.mark.parametrize("path", PATHS)
def test_autocast_keeps_the_convolutions_dtype(path: str, device) -> None:
    se = randomised(SqueezeExcite(C, rd_channels=R)).to(device)
    conv = nn.Conv2d(3, C, 3).to(device)
    x = torch.randn(2, 3, 6, 6, device=device)
    with vertebra.backend(path), torch.autocast(device.type, dtype=torch.bfloat16):
        inner = conv(x)
        y = se(inner)
        also = se(inner, torch.randn(2, C, 4, 4, device=device))  # an fp32 residual promotes
    assert (y.dtype, also.dtype) == (torch.bfloat16, torch.float32)
    y.float().sum().backward()
    assert {p.grad.dtype for p in se.parameters()} == {torch.float32}


def test_saves_the_input_and_three_small_vectors(device) -> None:
    se = randomised(SqueezeExcite(C, rd_channels=R)).to(device)
    x = torch.randn(2, C, 5, 4, device=device, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        se(x)
    parameters = {p.data_ptr() for p in se.parameters()}
    kept = [t for t in saved if t.data_ptr() not in parameters]
    assert [t.data_ptr() for t in kept if t.dim() == 4] == [x.data_ptr()]
    assert sorted(tuple(t.shape) for t in kept if t.dim() == 2) == [(2, R), (2, C), (2, C)]


def test_copies_pickles_and_traces(device) -> None:
    se = randomised(SqueezeExcite(C, rd_channels=R)).to(device)
    x = torch.randn(2, C, 5, 4, device=device)
    for other in (
        copy.deepcopy(se),
        pickle.loads(pickle.dumps(se)),
        torch.fx.symbolic_trace(se),
        torch.compile(se, fullgraph=True, backend="aot_eager"),
    ):
        assert torch.equal(other(x), se(x))
    with torch.device("meta"):
        assert SqueezeExcite(C, rd_channels=R)(torch.empty(2, C, 5, 4)).shape == (2, C, 5, 4)


def test_what_the_op_would_bypass_is_called() -> None:
    """Hooks, and modules put in the place of those that the op computes."""
    x = torch.randn(2, C, 5, 4)
    for name in ("fc1", "act", "fc2", "gate"):
        se = SqueezeExcite(C, rd_channels=R)
        fired: list[str] = []
        se.get_submodule(name).register_forward_hook(lambda *_, to=fired, n=name: to.append(n))
        assert calls(lambda se=se: se(x)) == 0
        assert fired == [name]
    se = SqueezeExcite(C, rd_channels=R)
    se.fc1 = nn.Sequential(se.fc1)
    assert calls(lambda: se(x)) == 0
