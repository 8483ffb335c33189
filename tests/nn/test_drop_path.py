"""Stochastic depth and layer scale against timm's, torchvision's and their own definition."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import vertebra
from vertebra.kernels import backend, drop_path_add
from vertebra.nn import DropPath, DropPathAdd, LayerScale, LayerScale2d
from vertebra.testing.budget import assert_within_budget

PATHS = ["eager", "triton"]
SHAPE = (6, 8, 5, 4)


@pytest.fixture(params=PATHS, autouse=True)
def path(request):
    with backend(request.param):
        yield request.param


def maps(device, *shape: int, count: int = 2, dtype: torch.dtype = torch.float32):
    return torch.randn(count, *(shape or SHAPE), device=device).to(dtype).unbind()


def kept(y: torch.Tensor) -> torch.Tensor:
    return y.flatten(1).ne(0).any(1)


@pytest.mark.parametrize("path", ["eager"], indirect=True)  # which one draws the same noise
@pytest.mark.parametrize("drop_prob", [0.01, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_keep_rate(drop_prob: float, dtype: torch.dtype, device) -> None:
    """Within what a binomial distribution leaves but once in 10^9 runs.

    In bf16 floor(rand + 0.99) drops 1.2 % of the samples, which that bound tells from 1 %.
    """
    N = 2**19
    x = torch.ones(N, 1, 1, 1, device=device, dtype=dtype)
    dropped = N - int(kept(DropPath(drop_prob)(x)).sum())
    bound = 6.1 * math.sqrt(N * drop_prob * (1 - drop_prob))
    assert abs(dropped - N * drop_prob) < bound
    floor = torch.floor(torch.rand(N, dtype=torch.bfloat16) + (1 - drop_prob))
    if drop_prob == 0.01:
        assert abs(N - int(floor.sum()) - N * drop_prob) > bound


def test_what_is_kept_is_scaled_and_the_rest_is_zero(device) -> None:
    (x,) = maps(device, 64, 3, 2, 2, count=1)
    for scale_by_keep, factor in ((True, 1 / 0.6), (False, 1.0)):
        y = DropPath(0.4, scale_by_keep)(x)
        keep = kept(y)
        assert keep.any()
        assert not keep.all()
        torch.testing.assert_close(y[keep], x[keep] * factor)


def test_follows_manual_seed(device) -> None:
    (x,) = maps(device, 64, 1, 1, 1, count=1)
    drop = DropPath(0.5)
    torch.manual_seed(3)
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    assert torch.equal(drop(x), first)
    assert not torch.equal(second, first)


def test_idle_draws_nothing(device) -> None:
    """In eval mode and at 0; timm then returns x itself, and so do we."""
    x, residual = maps(device)
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None
    assert DropPath(0.0)(x) is x
    assert DropPath(0.5).eval()(x) is x
    for end in (DropPathAdd(drop_prob=0.5).eval(), DropPathAdd()):
        assert torch.equal(end(x, residual), x + residual)
        alone = end(x)
        assert torch.equal(alone, x)
        assert alone is not x
    assert torch.equal(state[0], torch.get_rng_state())
    if state[1] is not None:
        assert torch.equal(state[1], torch.cuda.get_rng_state())


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_one_drops_everything(scale_by_keep: bool, device) -> None:
    x, residual = maps(device)
    end = DropPathAdd(8, 2.0, 1.0, scale_by_keep).to(device)
    leaves = [x.requires_grad_(), residual.requires_grad_(), end.gamma]
    y = end(x, residual)
    assert torch.equal(y, residual)
    dy = torch.randn_like(y)
    dx, dresidual, dgamma = torch.autograd.grad(y, leaves, dy)
    assert not dx.any()
    assert not dgamma.any()
    assert torch.equal(dresidual, dy)
    assert not DropPath(1.0, scale_by_keep)(x).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_dropped_sample_is_not_read(value: float, device) -> None:
    x, residual = maps(device)
    noise = torch.tensor([0.9, 0.1, 0.9, 0.9, 0.1, 0.9], device=device)
    dropped = noise > 0.5
    poisoned = x.clone()
    poisoned[dropped] = value
    gamma = torch.randn(8, device=device).requires_grad_()
    found = []
    for t in (x, poisoned):
        t = t.clone().requires_grad_()
        y = drop_path_add(t, residual, gamma, drop_prob=0.5, noise=noise)
        found.append((y, *torch.autograd.grad(y.square().sum(), (t, gamma))))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found[1][0][dropped], residual[dropped])


def test_forward_and_backward_drop_the_same(device) -> None:
    (x,) = maps(device, 32, 3, 2, 2, count=1)
    x.requires_grad_()
    y = DropPath(0.5)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(kept(dx), kept(y))


def test_nothing_but_noise_and_vectors_is_saved(device) -> None:
    """And x if gamma wants a gradient."""
    for gamma, count in ((None, 0), (torch.rand(8), 0), (torch.rand(8).requires_grad_(), 1)):
        x, residual = (t.requires_grad_() for t in maps(device))
        saved: list[torch.Tensor] = []
        with (
            backend("triton"),
            torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, id),
        ):
            gamma = None if gamma is None else gamma.to(device)
            drop_path_add(x, residual, gamma, drop_prob=0.5)
        assert [t.data_ptr() for t in saved if t.dim() == 4] == [x.data_ptr()] * count


def test_checkpointing_recomputes_the_same(device) -> None:
    end = DropPathAdd(8, 1.0, 0.5).to(device)
    leaves = [*(t.requires_grad_() for t in maps(device, 32, 8, 2, 2)), end.gamma]

    def gradients(call) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        y = call(lambda x, r: torch.sin(end(x * 2, r)), *leaves[:2])
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    plain = gradients(lambda f, *args: f(*args))
    recomputed = gradients(lambda f, *args: checkpoint(f, *args, use_reentrant=False))
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_code_draws_anew(compiler: str, device) -> None:
    torch._dynamo.reset()
    end = DropPathAdd(8, 1.0, 0.5).to(device)
    compiled = torch.compile(end, fullgraph=True, backend=compiler)
    x, residual = (t.requires_grad_() for t in maps(device, 64, 8, 2, 2))
    masks = []
    for _ in range(2):
        y = compiled(x, residual)
        keep = kept(y - residual)
        torch.testing.assert_close(y[keep], (residual + 2 * x)[keep])
        dx, dgamma = torch.autograd.grad(y.sum(), (x, end.gamma))
        assert torch.equal(kept(dx), keep)
        torch.testing.assert_close(dgamma, 2 * x[keep].sum((0, 2, 3)))
        masks.append(keep)
    assert not torch.equal(*masks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_draws_anew(device) -> None:
    x, residual = maps(device, 64, 8, 2, 2)
    end = DropPathAdd(drop_prob=0.5)
    end(x, residual)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = end(x, residual)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(kept(y - residual))
    assert not torch.equal(*masks)


def test_one_sample(device) -> None:
    x, residual = maps(device, 1, 8, 3, 3)
    seen = {bool(kept(DropPath(0.5)(x)).item()) for _ in range(32)}
    assert seen == {True, False}
    one = torch.tensor([0.3], device=device)
    assert torch.equal(drop_path_add(x, residual, drop_prob=0.75, noise=one), residual)


def test_one_number_for_the_whole_batch(device) -> None:
    """As torchvision's mode "batch": noise without a stride."""
    (x,) = maps(device, count=1)
    for value, expected in ((0.2, 2 * x), (0.7, 0 * x)):
        noise = torch.tensor([value], device=device).expand(len(x))
        torch.testing.assert_close(drop_path_add(x, drop_prob=0.5, noise=noise), expected)


def test_noise_may_be_strided(device) -> None:
    x, residual = maps(device)
    gamma, noise = torch.rand(8, device=device), torch.rand(12, device=device)[1::2]
    found = drop_path_add(x, residual, gamma, drop_prob=0.5, noise=noise)
    row = (noise < 0.5).float() * 2
    torch.testing.assert_close(
        found, residual + row[:, None, None, None] * gamma[:, None, None] * x
    )


@pytest.mark.parametrize("shape", [(9,), (9, 5), (9, 5, 6), (9, 5, 6, 2), (9, 2, 3, 2, 2)], ids=str)
def test_any_rank(shape: tuple[int, ...], device) -> None:
    (x,) = maps(device, *shape, count=1)
    torch.manual_seed(5)
    y = DropPath(0.5)(x)
    torch.manual_seed(5)
    noise = torch.rand(len(x), device=device)
    torch.testing.assert_close(
        y, torch.where((noise < 0.5)[(..., *[None] * (x.dim() - 1))], 2 * x, 0)
    )
    gamma = torch.randn(shape[-1], device=device)
    scale = LayerScale(shape[-1]).to(device)
    scale.gamma.data.copy_(gamma)
    if x.dim() > 1:
        torch.testing.assert_close(scale(x), x * gamma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["LayerScale", "LayerScale2d", "DropPathAdd"])
def test_gradients_within_the_budget(name: str, dtype, format, device) -> None:
    """Of timm's modules in double precision: layer scale, and all that ends a ConvNeXt block."""
    timm = pytest.importorskip("timm.layers")
    x, residual, dy = (
        t.contiguous(memory_format=format) for t in maps(device, 6, 8, 5, 8, count=3, dtype=dtype)
    )
    joined = name == "DropPathAdd"
    ours = (DropPathAdd(8, 1.0, 0.3) if joined else getattr(vertebra.nn, name)(8)).to(device)
    theirs = getattr(timm, "LayerScale2d" if joined else name)(8).to(device)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["gamma"]
    theirs.gamma.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    noise = torch.rand(6, device=device)
    row = (noise < 0.7).double()[:, None, None, None] / 0.7

    def run(module: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        if not joined:
            y = module(leaves[0])
        elif module is ours:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(torch, "rand", lambda *_, **__: noise)
                y = module(*leaves)
        else:
            y = leaves[1] + module(leaves[0]) * row.to(x.dtype)
        wanted = [*leaves[: 1 + joined], module.gamma]
        return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]

    mine = run(ours, x, residual)
    plain = run(copy.deepcopy(theirs).to(dtype), x, residual)
    truth = run(copy.deepcopy(theirs).double(), x.double(), residual.double())
    assert mine[-1].dtype == torch.float32
    plain[-1] = plain[-1].float()
    for i, (found, eager, exact) in enumerate(zip(mine, plain, truth, strict=True)):
        terms = 1 if found.dim() == 4 else 6 * 5 * 8
        assert_within_budget(f"{name} {i}", found.detach(), eager.detach(), exact.detach(), terms)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept(format, device) -> None:
    x, residual = (t.contiguous(memory_format=format) for t in maps(device))
    for y in (DropPath(0.5)(x), DropPathAdd(8, 1.0, 0.5).to(device)(x, residual)):
        assert y.is_contiguous(memory_format=format)
    tokens = x.movedim(1, 3)  # as ConvNeXt's linear layers leave them
    assert DropPathAdd(8, 1.0).to(device)(tokens.movedim(3, 1), residual).stride() == x.stride()
    assert LayerScale(8).to(device)(tokens).stride() == tokens.stride()


@pytest.mark.parametrize("inplace", [False, True])
def test_layer_scale_in_place(inplace: bool, device) -> None:
    (x,) = maps(device, count=1)
    for scale, gamma in ((LayerScale(4, 3.0, inplace), 3.0), (LayerScale2d(8, 3.0, inplace), 3.0)):
        given = x.clone()
        y = scale.to(device)(given)
        torch.testing.assert_close(y, x * gamma)
        assert torch.equal(given, y if inplace else x)


def test_autocast(device) -> None:
    """In x's dtype where gamma is fp32; in fp32 where the residual is, as by the add."""
    end = DropPathAdd(8, 1.0, 0.5).to(device)
    x, residual = maps(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert end(x.bfloat16(), residual.bfloat16()).dtype == torch.bfloat16
        assert end(x.bfloat16(), residual).dtype == torch.float32
        y = end(x.bfloat16().requires_grad_(), residual.bfloat16())
    y.float().sum().backward()
    assert end.gamma.grad.dtype == torch.float32


def test_modules_copy_pickle_and_live_on_meta(device) -> None:
    x, residual = maps(device)
    modules = (DropPathAdd(8, 0.5, 0.3), DropPathAdd(drop_prob=0.3), LayerScale2d(8), DropPath(0.3))
    for module in modules:
        module.to(device)
        args = (x, residual) if isinstance(module, DropPathAdd) else (x,)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            torch.manual_seed(1)
            expected = module(*args)
            torch.manual_seed(1)
            assert torch.equal(other(*args), expected)
    with torch.device("meta"):
        empty = DropPathAdd(8, 0.5, 0.3)
    assert empty.gamma.is_meta
    built = empty.to_empty(device=device)
    built.reset_parameters()
    assert torch.equal(built.gamma, torch.full((8,), 0.5, device=device))


def test_fx_traces_and_keeps_drawing(device) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.drop, self.end = LayerScale(4), DropPath(0.5), DropPathAdd(8, 1.0, 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.end(self.drop(self.scale(x)), x)

    block = Block().to(device)
    traced = torch.fx.symbolic_trace(block)
    (x,) = maps(device, count=1)
    torch.manual_seed(2)
    expected = block(x)
    torch.manual_seed(2)
    assert torch.equal(traced(x), expected)
    assert not torch.equal(traced(x), expected)


def test_repr_and_keys() -> None:
    assert repr(DropPath(0.1)) == "DropPath(drop_prob=0.100)"
    end = DropPathAdd(8, 1e-6, 0.1)
    assert repr(end) == "DropPathAdd(8, init_values=1e-06, drop_prob=0.100)"
    assert repr(DropPathAdd()) == "DropPathAdd(drop_prob=0.000)"
    assert list(end.state_dict()) == ["gamma"]
    assert list(DropPathAdd(8).state_dict()) == []
    assert isinstance(end, DropPath)
    with pytest.raises(ValueError, match=r"init_values needs dim"):
        DropPathAdd(init_values=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["DropPath", "LayerScale", "LayerScale2d"])
def test_signature_and_repr_are_timms(name: str) -> None:
    import timm.layers

    theirs, ours = getattr(timm.layers, name), getattr(vertebra.nn, name)
    wanted, found = (inspect.signature(t).parameters for t in (theirs, ours))
    assert [(p.name, p.default) for p in found.values()] == [
        (p.name, p.default) for p in wanted.values()
    ]
    a, b = (t(0.25) if name == "DropPath" else t(8) for t in (theirs, ours))
    assert repr(a) == repr(b)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert vars(a).keys() - {"_forward_hooks"} <= vars(b).keys()


@pytest.mark.parity
@pytest.mark.parametrize("drop_prob", [0.25, 1.0])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_timms_drop_path_given_its_mask(drop_prob: float, scale_by_keep: bool, device) -> None:
    import timm.layers

    (x,) = maps(device, count=1)
    theirs = timm.layers.DropPath(drop_prob, scale_by_keep)(x)
    noise = torch.where(kept(theirs), 0.0, 0.999)
    ours = drop_path_add(x, drop_prob=drop_prob, scale_by_keep=scale_by_keep, noise=noise)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_torchvisions_stochastic_depth_given_its_mask(mode: str, device) -> None:
    from torchvision.ops import StochasticDepth

    (x,) = maps(device, count=1)
    for _ in range(4):
        theirs = StochasticDepth(0.4, mode)(x)
        noise = torch.where(kept(theirs), 0.0, 0.999)
        torch.testing.assert_close(drop_path_add(x, drop_prob=0.4, noise=noise), theirs)


def test_takes_the_gamma_of_its_block(device) -> None:
    x, residual = maps(device)
    gamma = torch.randn(8, device=device)
    own = DropPathAdd(8, 1.0).to(device)
    own.gamma.data.copy_(gamma)
    assert torch.equal(DropPathAdd()(x, residual, gamma), own(x, residual))
