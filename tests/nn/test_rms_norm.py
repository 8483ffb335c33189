"""RmsNorm2d and SimpleNorm2d against timm's modules."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from vertebra.nn import RmsNorm2d, SimpleNorm2d

NORMS = [RmsNorm2d, SimpleNorm2d]


def timm_norm(norm: type[nn.Module], data_format: str = "channels_first") -> type[nn.Module]:
    layers = pytest.importorskip("timm.layers")
    name = norm.__name__
    return getattr(layers, name if data_format == "channels_first" else name.removesuffix("2d"))


@pytest.mark.parity
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("affine", [True, False])
def test_matches_timm(norm, data_format, affine):
    theirs = timm_norm(norm, data_format)(8, eps=1e-3, affine=affine)
    ours = norm(8, 1e-3, affine, data_format=data_format)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    shape = (2, 8, 5, 7) if data_format == "channels_first" else (2, 5, 7, 8)
    x, dy = torch.randn(2, *shape) + 0.5
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, *module.parameters()), dy)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("norm", NORMS)
def test_has_timms_signature(norm):
    ours, theirs = (inspect.signature(c).parameters for c in (norm, timm_norm(norm)))
    assert [p.default for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        p.default for p in list(theirs.values())[:3]
    ]
    assert list(ours)[1:] == ["eps", "affine", "data_format", "device", "dtype"]
    assert list(theirs)[1:] == ["eps", "affine", "device", "dtype"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(norm, dtype):
    x = (300 * torch.randn(2, 8, 5, 7)).to(dtype)  # fp16 squares of this are infinite
    assert torch.equal(norm(8).to(dtype)(x), norm(8)(x.float()).to(dtype))


@pytest.mark.parametrize("norm", NORMS)
def test_keeps_the_memory_format(norm):
    x = torch.randn(2, 8, 5, 7).contiguous(memory_format=torch.channels_last)
    assert norm(8)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", NORMS)
def test_refuses_what_it_cannot_take(norm):
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(8, 5\)"):
        norm(8)(torch.randn(8, 5))
    with pytest.raises(ValueError, match=r"\(N, H, W, C\), got \(5, 8\)"):
        norm(8, data_format="channels_last")(torch.randn(5, 8))
    with pytest.raises(NotImplementedError, match="Unsupported data format: nchw"):
        norm(8, data_format="nchw")


@pytest.mark.parametrize("norm", NORMS)
def test_copies_traces_and_compiles(norm):
    module, x = norm(8), torch.randn(2, 8, 5, 7)
    nn.init.normal_(module.weight)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    traced = torch.fx.symbolic_trace(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), compiled, traced):
        assert torch.equal(other(x), module(x))
    assert "channels_last" in repr(norm(8, data_format="channels_last"))
