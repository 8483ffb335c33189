"""LayerNorm2d against timm's, torchvision's and transformers' modules, on both paths."""

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.nn import LayerNorm2d
from vertebra.testing.budget import assert_within_budget

PATHS = ["eager", "triton"]


def _timm(**kwargs) -> nn.Module:
    from timm.layers import LayerNorm2d as Theirs

    return Theirs(8, **kwargs)


def _torchvision() -> nn.Module:
    from torchvision.models.convnext import LayerNorm2d as Theirs

    return Theirs(8, eps=1e-6)


def _transformers(data_format: str) -> nn.Module:
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

    return ConvNextLayerNorm(8, eps=1e-6, data_format=data_format)


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module


# how a peer builds its module, and how we build ours
PEERS: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "timm": (_timm, {}),
    "timm plain": (lambda: _timm(affine=False), {"affine": False}),
    "timm without bias": (lambda: _timm(bias=False), {"bias": False}),
    "torchvision": (_torchvision, {}),
    "transformers channels_first": (lambda: _transformers("channels_first"), {}),
    "transformers channels_last": (
        lambda: _transformers("channels_last"),
        {"data_format": "channels_last"},
    ),
}


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()  # of the strides of x
    module.zero_grad()
    y = module(x)
    y.backward(dy.to(y))
    gradients = {"d" + name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients}


@pytest.mark.parity
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("peer", PEERS)
def test_as_the_peers(peer: str, path: str, dtype, format, device) -> None:
    """Outputs and gradients: bit for bit in eager, within the error budget on Triton."""
    build, kwargs = PEERS[peer]
    theirs = randomised(build()).to(device, dtype)
    ours = LayerNorm2d(8, **kwargs).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, dy = torch.randn(2, 3, 8, 5, 7, device=device).to(dtype).unbind()
    x = x.contiguous(memory_format=format)
    if kwargs.get("data_format") == "channels_last":
        x, dy = x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)
    with vertebra.backend(path):
        mine = _step(ours, x, dy)
    expected = _step(theirs, x, dy)
    exact = _step(copy.deepcopy(theirs).double(), x.double(), dy)
    assert mine["y"].stride() == x.stride()
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        if path == "eager" and value.dim() == 4:
            assert torch.equal(mine[name], value), name
        else:
            terms = 1 if value.dim() == 4 else 3 * 5 * 7
            assert_within_budget(name, mine[name], value, exact[name], terms)


@pytest.mark.parity
def test_signature_and_repr_are_timms() -> None:
    from timm.layers import LayerNorm2d as Theirs

    wanted = dict(inspect.signature(Theirs).parameters)
    found = inspect.signature(LayerNorm2d).parameters
    del wanted["kwargs"]
    assert list(found)[: len(wanted)] == list(wanted)
    for name, parameter in wanted.items():
        assert found[name].default == parameter.default
    assert repr(LayerNorm2d(8, 1e-5, False)) == repr(Theirs(8, 1e-5, False))


def test_norm_is_still_torchs() -> None:
    """Weight decay and initialisation dispatch on these."""
    norm = LayerNorm2d(8, data_format="channels_last", device="meta", dtype=torch.float16)
    assert isinstance(norm, nn.LayerNorm)
    assert (norm.normalized_shape, norm.eps) == ((8,), 1e-6)
    assert (norm.weight.device.type, norm.weight.dtype) == ("meta", torch.float16)
    assert "channels_last" in repr(norm)


def test_other_data_formats_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"Unsupported data format: NHWC.*channels_first"):
        LayerNorm2d(8, data_format="NHWC")


def test_bad_shapes(device) -> None:
    x = torch.randn(2, 8, device=device)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(2, 8\)"):
        LayerNorm2d(8, device=device)(x)
    with pytest.raises(ValueError, match=r"\(N, H, W, C\), got \(2, 8\).*torch\.nn\.LayerNorm"):
        LayerNorm2d(8, data_format="channels_last", device=device)(x)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_either_data_format_copies_nothing(format, device) -> None:
    """A permuted view is what is saved, whatever the memory format."""
    x = torch.randn(2, 8, 5, 4, device=device).contiguous(memory_format=format).requires_grad_()
    saved: list[Tensor] = []
    for module, view in (
        (LayerNorm2d(8, device=device), x),
        (LayerNorm2d(8, data_format="channels_last", device=device), x.permute(0, 2, 3, 1)),
    ):
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t) or t, lambda t: t
        )
        with vertebra.backend("triton"), hooks:
            module(view)
    large = [t.data_ptr() for t in saved if t.numel() == x.numel()]
    assert large == [x.data_ptr()] * 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_autocast_keeps_the_convolutions_dtype(path: str, data_format: str, device) -> None:
    norm = LayerNorm2d(8, data_format=data_format).to(device)
    x = torch.randn(2, 8, 8, 8, device=device).bfloat16()
    with vertebra.backend(path), torch.autocast(device.type, dtype=torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_copies_pickles_traces_and_compiles(data_format: str, device) -> None:
    torch._dynamo.reset()
    norm = randomised(LayerNorm2d(8, data_format=data_format)).to(device)
    x = torch.randn(2, 8, 5, 8, device=device)
    expected = norm(x)
    for other in (
        copy.deepcopy(norm),
        pickle.loads(pickle.dumps(norm)),
        torch.fx.symbolic_trace(norm),
        torch.compile(norm, fullgraph=True, backend="aot_eager"),
    ):
        assert torch.equal(other(x), expected)
