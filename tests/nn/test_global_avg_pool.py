"""GlobalAvgPool2d against the pooling and the heads of torch, timm, torchvision, transformers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vertebra
from vertebra.kernels import _op
from vertebra.kernels._watch import Watch
from vertebra.kernels.global_avg_pool import means
from vertebra.nn import GlobalAvgPool2d
from vertebra.testing.budget import assert_within_budget

PATHS = ["eager", "triton"]
C = 12


class Head(nn.Module):
    """A pool and a norm, called as one."""

    def __init__(self, norm: nn.Module | None, flatten: bool = True) -> None:
        super().__init__()
        self.pool, self.norm = GlobalAvgPool2d(flatten), norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x, self.norm)


class Mean(nn.Module):
    """As transformers' ConvNext pools."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([-2, -1])


class Copies(Watch):
    """Notes maps in another type."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x, self.found = x, []

    def saw(self, func, args, kwargs, result) -> None:
        if result.dtype != self.x.dtype and result.numel() == self.x.numel():
            self.found.append(func)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_means_on_cpus_are_rounded_once_and_copy_no_map(dtype, layout) -> None:
    """Sums of fp16 would be infinite, and those of bf16 stand still."""
    x = (50_000 + 10_000 * torch.rand(3, C, 17, 19)).to(dtype, memory_format=layout)
    with Copies(x) as copies:
        y = means(x)
    exact = x.double().mean((2, 3))
    rounding, sums = torch.finfo(dtype).eps / 2, 8 * torch.finfo(_op.sums_dtype(x)).eps
    assert ((y.double() - exact).abs() <= (rounding + sums) * exact.abs()).all()
    assert y.dtype == dtype
    assert not copies.found
    assert means(x.requires_grad_()).grad_fn.name().startswith("Mean")


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))
    return module


def head_of(peer: str) -> nn.Sequential:
    """Build a peer's pooling, norm, and flattening."""
    if peer == "timm":
        from timm.layers import LayerNorm2d, SelectAdaptivePool2d

        parts = [SelectAdaptivePool2d(pool_type="avg"), LayerNorm2d(C), nn.Flatten(1)]
    elif peer == "torchvision":
        from torchvision.models.convnext import LayerNorm2d

        parts = [nn.AdaptiveAvgPool2d(1), LayerNorm2d(C, eps=1e-6), nn.Flatten(1)]
    else:
        parts = [Mean(), nn.LayerNorm(C, eps=1e-12), nn.Identity()]
    return randomised(nn.Sequential(*parts))


def step(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run forward and backward; return output and gradients."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    y.backward(dy.to(y))
    named = {"y": y.detach(), "dx": x.grad}
    return named | {"d" + k.rpartition(".")[2]: p.grad for k, p in module.named_parameters()}


@pytest.mark.parity
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("peer", ["timm", "torchvision", "transformers"])
def test_heads_of_the_peers(peer: str, layout, path: str, device) -> None:
    """The peer's own norm module, fused: same output and gradients."""
    theirs = head_of(peer).to(device)
    truth = copy.deepcopy(theirs).double()
    ours = Head(copy.deepcopy(theirs[1]))
    x = torch.randn(3, C, 5, 7, device=device).contiguous(memory_format=layout)
    with vertebra.backend(path):
        mine = step(ours, x)
    expected, exact = step(theirs, x), step(truth, x.double())
    assert mine.keys() == expected.keys()
    assert mine["dx"].stride() == x.stride()
    for name, value in expected.items():
        assert_within_budget(name, mine[name], value, exact[name], 3 * 5 * 7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_torchs_pooling(flatten: bool, dtype: torch.dtype, path: str, device) -> None:
    theirs = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1) if flatten else nn.Identity())
    x = torch.randn(3, C, 5, 7, device=device).to(dtype)
    with vertebra.backend(path):
        mine = step(GlobalAvgPool2d(flatten), x)
    expected, exact = step(theirs, x), step(theirs, x.double())
    for name, value in expected.items():
        assert_within_budget(name, mine[name], value, exact[name], 5 * 7)


@pytest.mark.parametrize("flatten", [False, True])
def test_which_norms_are_fused(flatten: bool, device) -> None:
    """A LayerNorm over C is; any other norm, or one with a hook, is called on what it expects."""
    x = torch.randn(2, C, 4, 3, device=device)
    rows = x.mean((2, 3))
    fused = randomised(nn.LayerNorm(C)).to(device)
    hooked = copy.deepcopy(fused)
    calls: list[int] = []
    hooked.register_forward_hook(lambda *_: calls.append(1))
    plain = nn.LayerNorm(C, elementwise_affine=False).to(device)
    batch = randomised(nn.BatchNorm2d(C)).to(device).eval()
    group = randomised(nn.GroupNorm(3, C)).to(device)
    for norm, by_op, expected in (
        (fused, True, fused(rows)),
        (nn.LayerNorm(C, bias=False).to(device), True, plain(rows)),
        (hooked, False, fused(rows)),
        (plain, False, plain(rows)),
        (batch, False, batch(rows[:, :, None, None])[:, :, 0, 0]),
        (group, False, group(rows[:, :, None, None])[:, :, 0, 0]),
    ):
        seen: list[bool] = []
        with _op.observe(lambda call, seen=seen: seen.append(call.args[3] is not None)):
            y = Head(norm, flatten)(x)
        assert seen == [by_op]
        torch.testing.assert_close(y, expected if flatten else expected[:, :, None, None])
    assert calls == [1]


def test_training_keeps_no_map(device) -> None:
    x = torch.randn(2, C, 4, 3, device=device, requires_grad=True)
    for norm in (None, nn.LayerNorm(C).to(device)):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t) or t, lambda t: t
        ):
            Head(norm)(x)
        assert all(t.dim() < 4 for t in saved)


@pytest.mark.parametrize("path", PATHS)
def test_autocast_keeps_xs_dtype(path: str, device) -> None:
    head = Head(nn.LayerNorm(C)).to(device)
    x = torch.randn(2, C, 4, 3, device=device, dtype=torch.bfloat16, requires_grad=True)
    with vertebra.backend(path), torch.autocast(device.type, dtype=torch.bfloat16):
        y = head(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # whose gradient is expanded: strides of zero
    assert head.norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(C)], ids=["bare", "norm"])
def test_copies_pickles_traces_and_compiles(norm, device) -> None:
    torch._dynamo.reset()
    head = Head(None if norm is None else randomised(norm)).to(device)
    x = torch.randn(2, C, 4, 3, device=device)
    y = head(x)
    for other in (
        copy.deepcopy(head),
        pickle.loads(pickle.dumps(head)),
        torch.fx.symbolic_trace(head),
        torch.compile(head, fullgraph=True, backend="aot_eager"),
    ):
        assert torch.equal(other(x), y)


def test_repr_and_keys() -> None:
    pool = GlobalAvgPool2d()
    assert repr(pool) == "GlobalAvgPool2d(flatten=False)"
    assert pool.state_dict() == {}
    assert pool(torch.empty(2, C, 4, 3, device="meta")).shape == (2, C, 1, 1)
