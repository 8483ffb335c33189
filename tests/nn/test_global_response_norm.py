"""GlobalResponseNorm against timm's and transformers' modules, on both paths."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import vertebra
from vertebra.nn import GlobalResponseNorm
from vertebra.testing.budget import assert_within_budget

PATHS = ["eager", "triton"]
C = 8


def randomised(module: nn.Module) -> nn.Module:
    """Give every parameter a random value: it starts at zero, where the module is the identity."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module


def peer(name: str, channels_last: bool = True) -> nn.Module:
    if name == "timm":
        from timm.layers.grn import GlobalResponseNorm as Theirs

        return randomised(Theirs(C, channels_last=channels_last))
    from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN

    return randomised(ConvNextV2GRN(C))


def step(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run forward and backward; return output and gradients."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y)
    y.backward(dy)
    named = {"y": y.detach(), "dx": x.grad}
    return named | {"d" + k: p.grad for k, p in module.named_parameters()}


@pytest.mark.parity
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_as_the_peers(name: str, channels_last: bool, path: str, device) -> None:
    """Output and gradients, from a checkpoint in the peer's shapes.

    In eager the output has the peer's bits.
    """
    if name == "transformers" and not channels_last:
        pytest.skip("transformers' GRN takes (N, H, W, C) only")
    theirs = peer(name, channels_last).to(device)
    truth = copy.deepcopy(theirs).double()
    shape = tuple(theirs.weight.shape)
    ours = GlobalResponseNorm(C, channels_last=channels_last, param_shape=shape).to(device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 7, C, device=device)
    x = x if channels_last else x.permute(0, 3, 1, 2).contiguous()
    with vertebra.backend(path):
        mine = step(ours, x)
    expected, exact = step(theirs, x), step(truth, x.double())
    assert mine.keys() == expected.keys()
    assert mine["y"].is_contiguous()
    if path == "eager" and name == "timm":
        assert torch.equal(mine["y"], expected["y"])
    for key, value in expected.items():
        terms = 3 * 5 * 7 if key in ("dweight", "dbias") else 1
        assert_within_budget(key, mine[key], value, exact[key], terms)


@pytest.mark.parity
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_fp16_stays_finite_where_the_peers_overflow(name: str, path: str, device) -> None:
    """Magnitude 800 at 96x96: a channel's norm is past the largest fp16 number."""
    theirs = peer(name).to(device)
    ours = GlobalResponseNorm(C).to(device)
    ours.load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()
    x = (800 * torch.randn(1, 96, 96, C, device=device).sign()).half()
    x[..., 0] /= 2
    with vertebra.backend(path):
        mine = step(ours, x)
    with torch.no_grad():
        assert not theirs.half()(x).isfinite().all()
    for key, value in step(truth, x.double()).items():
        found = mine[key]
        assert found.isfinite().all()
        value = value.reshape(found.shape)
        terms = 96 * 96 if key in ("dweight", "dbias") else 1
        assert_within_budget(key, found, value.to(found.dtype), value, terms)


def test_a_channel_of_zeros_has_torchs_gradient(device) -> None:
    grn = randomised(GlobalResponseNorm(C)).to(device)
    x = torch.randn(2, 4, 3, C, device=device)
    x[0, ..., 2] = 0
    x[1] = 0
    with vertebra.backend("eager"):
        expected = step(grn, x)
    with vertebra.backend("triton"):
        found = step(grn, x)
    for key, value in expected.items():
        assert value.isfinite().all()
        torch.testing.assert_close(found[key], value)


@pytest.mark.parametrize("own", [None, (1, 1, 1, C), (C, 1, 1)], ids=str)
@pytest.mark.parametrize("checkpoint", [(C,), (1, 1, 1, C)], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_either_shape_load(checkpoint, own, assign: bool) -> None:
    state = {name: torch.randn(checkpoint) for name in ("weight", "bias")}
    before = {name: value.shape for name, value in state.items()}
    grn = nn.Sequential(GlobalResponseNorm(C, param_shape=own))
    wanted = grn[0].weight.shape
    grn.load_state_dict({"0." + k: v for k, v in state.items()}, assign=assign)
    for name, value in state.items():
        assert grn.state_dict()["0." + name].shape == wanted
        assert torch.equal(grn.state_dict()["0." + name].flatten(), value.flatten())
        assert value.shape == before[name]


def test_a_checkpoint_of_another_width_does_not_load() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        GlobalResponseNorm(C).load_state_dict({"weight": torch.ones(1, 9), "bias": torch.ones(C)})
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        GlobalResponseNorm(C).load_state_dict({"weight": torch.ones(C)})


def test_param_shape_must_hold_dim_values() -> None:
    with pytest.raises(ValueError, match=r"dim = 8 values, got \(1, 9\); give \(1, 1, 1, 8\)"):
        GlobalResponseNorm(C, param_shape=(1, 9))


@pytest.mark.parametrize("path", PATHS)
def test_autocast_keeps_xs_dtype(path: str, device) -> None:
    grn = randomised(GlobalResponseNorm(C)).to(device)
    x = torch.randn(2, 3, 4, C, device=device, dtype=torch.bfloat16)
    with vertebra.backend(path), torch.autocast(device.type, dtype=torch.bfloat16):
        y = grn(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert grn.weight.grad.dtype == torch.float32


def test_channels_last_input_is_not_copied(device) -> None:
    grn = GlobalResponseNorm(C).to(device)
    x = torch.randn(2, 3, 4, C, device=device, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = grn(x)
    assert [t.data_ptr() for t in saved if t.dim() == 4] == [x.data_ptr()]
    assert y.stride() == x.stride()
    assert {t.shape for t in saved if t.dim() == 2} == {(2, C)}


@pytest.mark.parametrize("shape", [None, (1, 1, 1, C)], ids=str)
def test_copies_pickles_traces_and_compiles(shape, device) -> None:
    torch._dynamo.reset()
    grn = randomised(GlobalResponseNorm(C, param_shape=shape)).to(device)
    x = torch.randn(2, 3, 4, C, device=device)
    y = grn(x)
    compiled = torch.compile(grn, fullgraph=True, backend="aot_eager")
    others = (
        copy.deepcopy(grn),
        pickle.loads(pickle.dumps(grn)),
        torch.fx.symbolic_trace(grn),
        compiled,
    )
    for other in others:
        assert torch.equal(other(x), y)


@pytest.mark.parity
def test_signature_and_keys_are_timms() -> None:
    from timm.layers.grn import GlobalResponseNorm as Theirs

    wanted = inspect.signature(Theirs).parameters
    found = inspect.signature(GlobalResponseNorm).parameters
    positional = [n for n, p in found.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional == list(wanted)
    for name in positional:
        assert found[name].default == wanted[name].default, name
    theirs, ours = Theirs(C), GlobalResponseNorm(C)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_repr_and_meta() -> None:
    grn = GlobalResponseNorm(C, channels_last=False, device="meta", dtype=torch.float16)
    assert repr(grn) == "GlobalResponseNorm(8, eps=1e-06, channels_last=False)"
    assert grn(torch.empty(2, C, 4, 4, device="meta", dtype=torch.float16)).shape == (2, C, 4, 4)
