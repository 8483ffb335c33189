"""The norm modules against torch's and timm's, on both paths."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import vertebra
from vertebra.kernels import _op
from vertebra.nn import (
    BatchNormAct2d,
    ConvNormAct,
    DropBlock2d,
    FrozenBatchNormAct2d,
    create_norm_act,
    norm_act,
)
from vertebra.nn._act import fusible_act
from vertebra.testing.budget import assert_within_budget

PATHS = ["eager", "triton"]


def randomised(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic a random value: ones and zeros hide bugs."""
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.5 if "var" in name else torch.randn_like(t))
    return module


def reference(**kwargs) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(8, **kwargs), nn.ReLU())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"momentum": None},
        {"momentum": 0.0},
        {"track_running_stats": False},
        {"affine": False},
        {"eps": 1e-2, "momentum": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_steps_as_torch(path: str, kwargs: dict, dtype: torch.dtype, device) -> None:
    """Outputs, gradients, running statistics and the counter, in training and then in eval mode.

    Bit for bit in eager; within the error budget of torch's own double precision on Triton.
    """
    theirs = randomised(reference(**kwargs)).to(device)
    truth = copy.deepcopy(theirs).double()
    ours = BatchNormAct2d(8, **kwargs).to(device)
    ours.load_state_dict(theirs[0].state_dict())
    for step in range(4):
        if step == 3:
            for module in (ours, theirs, truth):
                module.eval()
        x = (torch.randn(3, 8, 5, 7, device=device) * 2 + 1).to(dtype)
        with vertebra.backend(path):
            mine = _step(ours, x)
        expected, exact = _step(theirs, x), _step(truth, x.double())
        assert mine.keys() == expected.keys()
        for name, value in expected.items():
            if path == "eager" or not value.is_floating_point():
                assert torch.equal(mine[name], value), name
            else:
                terms = 1 if value.dim() == 4 else 3 * 5 * 7
                assert_within_budget(name, mine[name], value, exact[name], terms)


def _step(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run forward and backward; return output, gradients and buffers, named without the prefix."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    y.backward(dy.to(y))
    named = {"y": y.detach(), "dx": x.grad}
    named |= {"d" + k.removeprefix("0."): p.grad for k, p in module.named_parameters()}
    return named | {k.removeprefix("0."): b.clone() for k, b in module.named_buffers()}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "act", [nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Tanh, None]
)
def test_activation_and_residual(path: str, act, device) -> None:
    """Every activation, the one no op knows included, with and without a residual."""
    norm = randomised(BatchNormAct2d(8, act_layer=act)).to(device).eval()
    x, residual = torch.randn(2, 2, 8, 5, 4, device=device)
    plain = nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )
    function = act() if act else nn.Identity()
    with vertebra.backend(path):
        torch.testing.assert_close(norm(x), function(plain))
        torch.testing.assert_close(norm(x, residual), function(plain + residual))


@pytest.mark.parametrize("path", PATHS)
def test_drop_layer_comes_between_norm_and_activation(path: str, device) -> None:
    class Negate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x

    norm = randomised(BatchNormAct2d(8, drop_layer=Negate)).to(device).eval()
    bare = randomised(BatchNormAct2d(8, apply_act=False)).to(device).eval()
    bare.load_state_dict(norm.state_dict())
    x, residual = torch.randn(2, 2, 8, 5, 4, device=device)
    with vertebra.backend(path):
        torch.testing.assert_close(norm(x, residual), torch.relu(residual - bare(x)))


@pytest.mark.parametrize("path", PATHS)
def test_frozen_equals_eval_mode_and_learns_nothing(path: str, device) -> None:
    norm = randomised(BatchNormAct2d(8)).to(device)
    frozen = FrozenBatchNormAct2d(8).to(device)
    frozen.load_state_dict(norm.state_dict())  # drops num_batches_tracked
    before = copy.deepcopy(frozen.state_dict())
    x, residual = (t.requires_grad_() for t in torch.randn(2, 2, 8, 5, 4, device=device).unbind())
    with vertebra.backend(path):
        y = frozen.train()(x, residual)
        expected = norm.eval()(x, residual)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, residual), g)
    for a, b in zip(found, torch.autograd.grad(expected, (x, residual), g), strict=True):
        torch.testing.assert_close(a, b)
    assert list(frozen.parameters()) == []
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, before[name])


def test_frozen_keeps_the_output_and_not_the_input(device) -> None:
    """What frozen BN saves for backward is what the next layer keeps anyway."""
    frozen = randomised(FrozenBatchNormAct2d(8)).to(device)
    x = torch.randn(2, 8, 5, 4, device=device, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = frozen(x)
    maps = [t for t in saved if t.dim() == 4]
    assert [t.data_ptr() for t in maps] == [y.data_ptr()]


def test_training_keeps_the_input_and_two_floats_a_channel(device) -> None:
    norm = randomised(BatchNormAct2d(8)).to(device)
    x = torch.randn(2, 8, 5, 4, device=device, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm(x)
    assert [t.data_ptr() for t in saved if t.dim() == 4] == [x.data_ptr()]
    ours = {p.data_ptr() for p in norm.parameters()}
    assert sorted(t.shape for t in saved if t.dim() == 1 and t.data_ptr() not in ours) == [(8,)] * 2


@pytest.mark.parametrize("path", PATHS)
def test_autocast_keeps_the_convolutions_dtype(path: str, device) -> None:
    unit = ConvNormAct(3, 8, 3).to(device)
    x = torch.randn(2, 3, 6, 6, device=device)
    with vertebra.backend(path), torch.autocast(device.type, dtype=torch.bfloat16):
        y = unit(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert unit.bn.weight.grad.dtype == torch.float32
    assert unit.bn.running_mean.dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_half_module(path: str, device) -> None:
    norm = randomised(BatchNormAct2d(8)).to(device, torch.bfloat16)
    x = torch.randn(4, 8, 5, 4, device=device, dtype=torch.bfloat16, requires_grad=True)
    with vertebra.backend(path):
        norm(x).float().sum().backward()
    assert norm.weight.grad.dtype == torch.bfloat16
    assert norm.running_var.dtype == torch.bfloat16
    assert x.grad.dtype == torch.bfloat16


def test_failed_call_changes_nothing(device) -> None:
    norm = randomised(BatchNormAct2d(8)).to(device)
    before = copy.deepcopy(norm.state_dict())
    for x, residual in (
        (torch.randn(2, 7, 4, 4, device=device), None),
        (torch.randn(2, 8, 4, device=device), None),
        (torch.randn(2, 8, 4, 4, device=device), torch.randn(2, 8, 4, 5, device=device)),
        (torch.randn(1, 8, 1, 1, device=device), None),
    ):
        with pytest.raises(ValueError, match="batch_norm_act: "):
            norm(x, residual)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_modules_copy_and_pickle(device) -> None:
    x = torch.randn(2, 8, 5, 4, device=device)
    for module in (BatchNormAct2d(8), FrozenBatchNormAct2d(8, act_layer="silu")):
        randomised(module).to(device).eval()
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), module(x))


def test_fx_traces_the_counter_too() -> None:
    norm = randomised(BatchNormAct2d(8))
    norm.num_batches_tracked.zero_()
    traced = torch.fx.symbolic_trace(norm)
    traced.graph.eliminate_dead_code()
    assert norm.num_batches_tracked == 0
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(traced(x), copy.deepcopy(norm)(x))
    assert traced.num_batches_tracked == 1


def test_norm_is_still_torchs() -> None:
    """Freezing, weight decay and SyncBN tools dispatch on these."""
    assert isinstance(BatchNormAct2d(8), nn.BatchNorm2d)
    assert "ReLU" in repr(BatchNormAct2d(8))


def test_an_activation_with_hooks_is_called() -> None:
    norm = BatchNormAct2d(8)
    assert fusible_act(norm.act) == "relu"
    calls: list[int] = []
    norm.act.register_forward_hook(lambda *_: calls.append(1))
    norm(torch.randn(2, 8, 4, 4))
    assert calls == [1]
    assert fusible_act(nn.GELU(approximate="tanh")) is None


def test_create_norm_act() -> None:
    assert type(create_norm_act(nn.BatchNorm2d, 8)) is BatchNormAct2d
    assert type(create_norm_act(None, 8)) is BatchNormAct2d
    assert type(create_norm_act("batchnorm2d", 8)) is BatchNormAct2d
    assert create_norm_act(partial(nn.BatchNorm2d, eps=0.5), 8).eps == 0.5
    assert type(create_norm_act(partial(FrozenBatchNormAct2d, eps=0.5), 8)) is FrozenBatchNormAct2d
    assert type(create_norm_act(nn.BatchNorm2d, 8, apply_act=False).act) is nn.Identity
    bare = create_norm_act(partial(nn.GroupNorm, 2), 8, act_kwargs={}, device=None)
    assert type(bare) is nn.GroupNorm
    x, residual = torch.randn(2, 2, 8, 3, 3).unbind()
    assert torch.equal(norm_act(bare, x, nn.ReLU(), residual), torch.relu(bare(x) + residual))
    with pytest.raises(ValueError, match=r"norm_layer must be one of batchnorm.*got 'layernorm'"):
        create_norm_act("layernorm", 8)
    with pytest.raises(ValueError, match=r"act_layer must be one of relu.*got 'mish'"):
        create_norm_act(None, 8, "mish")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["groupnorm", "GroupNorm1", "batch_norm", "layernorm2d"])
def test_norms_by_name_are_timms(name: str) -> None:
    from timm.layers import get_norm_layer

    theirs = randomised(get_norm_layer(name)(64))
    ours = create_norm_act(name, 64, apply_act=False)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 64, 5, 3)
    with vertebra.backend("eager"):
        torch.testing.assert_close(ours(x), theirs(x))
    assert type(create_norm_act("frozenbatchnorm2d", 8)) is FrozenBatchNormAct2d


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layer", [BatchNormAct2d, FrozenBatchNormAct2d])
def test_a_drop_of_the_call_takes_the_place_of_its_own(layer, path: str, device) -> None:
    """Also where a pool follows; one that is idle leaves everything in one op."""
    norm = randomised(layer(8)).to(device)
    bare = layer(8, apply_act=False).to(device)
    bare.load_state_dict(norm.state_dict())
    drop, pool, act = DropBlock2d(0.5, 3), nn.MaxPool2d(3, 2, 1), nn.ReLU()
    x = torch.randn(2, 8, 9, 7, device=device)
    with vertebra.backend(path):
        torch.manual_seed(1)
        y = norm_act(norm, x, act, pool=pool, drop=drop)
        torch.manual_seed(1)
        torch.testing.assert_close(y, pool(act(drop(bare(x)))))
        seen: list[_op.Call] = []
        with _op.observe(seen.append):
            norm_act(norm, x, act, pool=pool, drop=drop.eval())
    assert [call.op.name for call in seen] == ["batch_norm_act_pool"]


@pytest.mark.parity
@pytest.mark.parametrize("name", ["BatchNormAct2d", "FrozenBatchNormAct2d", "ConvNormAct"])
def test_signature_and_keys_are_timms(name: str) -> None:
    import timm.layers

    theirs, ours = getattr(timm.layers, name), getattr(vertebra.nn, name)
    wanted = inspect.signature(theirs).parameters
    found = inspect.signature(ours).parameters
    assert list(found) == list(wanted)
    for parameter in found:
        assert found[parameter].default == wanted[parameter].default, parameter
    arguments = (4, 8, 3) if name == "ConvNormAct" else (8,)
    a, b = theirs(*arguments), ours(*arguments)
    assert list(a.state_dict()) == list(b.state_dict())
    b.load_state_dict(randomised(a).state_dict())
    x = torch.randn(2, arguments[0], 6, 6)
    with vertebra.backend("eager"):
        torch.testing.assert_close(b(x), a(x))


@pytest.mark.parity
@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"stride": 2},
        {"stride": 2, "padding": "same"},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"padding": 2, "groups": 2, "bias": True},
        {"apply_norm": False},
        {"apply_act": False, "norm_kwargs": {"eps": 0.1}},
        {"act_layer": nn.SiLU, "conv_kwargs": {"padding_mode": "reflect"}},
    ],
    ids=str,
)
def test_conv_norm_act_as_timm(kwargs: dict, size: int) -> None:
    import timm.layers

    theirs = randomised(timm.layers.ConvNormAct(4, 8, 3, **kwargs))
    ours = ConvNormAct(4, 8, 3, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, size, size)
    with vertebra.backend("eager"):
        assert torch.equal(ours(x), theirs(x))
    assert (ours.in_channels, ours.out_channels) == (4, 8)


def test_conv_norm_act_rejects_unknown_padding() -> None:
    with pytest.raises(ValueError, match=r"padding must be '', 'same'.*got 'full'"):
        ConvNormAct(4, 8, 3, padding="full")


POOL = partial(nn.MaxPool2d, 3, 2, 1)


def ops_of(call) -> list[str]:
    """Return the names of the ops that a call runs."""
    seen: list[str] = []
    with _op.observe(lambda c: seen.append(c.op.name)):
        call()
    return seen


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("frozen", [False, True], ids=["norm", "frozen"])
def test_the_pool_of_a_stem_is_absorbed(path: str, training: bool, frozen: bool, device) -> None:
    norm = randomised((FrozenBatchNormAct2d if frozen else BatchNormAct2d)(4)).to(device)
    norm.train(training)
    alone, pool = copy.deepcopy(norm), POOL()
    x = torch.randn(2, 4, 6, 5, device=device)
    with vertebra.backend(path):
        assert ops_of(lambda: norm(x, None, pool)) == ["batch_norm_act_pool"]
        alone(x)
        torch.testing.assert_close(norm(x, pool=pool), pool(alone(x)))
    for (name, a), b in zip(norm.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize(
    "pool",
    [
        nn.Identity(),
        nn.MaxPool2d(2, 2),
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1),
        type("Mine", (nn.MaxPool2d,), {})(3, 2, 1),
    ],
    ids=str,
)
def test_another_pool_is_called(pool: nn.Module, device) -> None:
    x = torch.randn(2, 4, 6, 5, device=device)
    for norm in (BatchNormAct2d(4).to(device).eval(), FrozenBatchNormAct2d(4).to(device)):
        assert ops_of(lambda norm=norm: norm(x, pool=pool)) == ["scale_bias_act"]
        torch.testing.assert_close(norm(x, pool=pool), pool(norm(x)))


def test_what_keeps_a_pool_a_call_of_its_own(device) -> None:
    x = torch.randn(2, 4, 6, 5, device=device)
    fused = ["batch_norm_act_pool"]
    norm, pool = BatchNormAct2d(4).to(device), POOL()
    assert ops_of(lambda: norm_act(norm, x, nn.ReLU(), pool=pool)) == fused
    assert ops_of(lambda: norm(x, x, pool)) == ["batch_norm_act"]
    tanh = BatchNormAct2d(4, act_layer=nn.Tanh).to(device)
    assert ops_of(lambda: tanh(x, pool=pool)) == ["batch_norm_act"]
    seen: list[torch.Size] = []
    for module in (norm, pool):  # what a hook is shown is what the module returns
        hook = module.register_forward_hook(lambda *a: seen.append(a[2].shape))
        assert ops_of(lambda: norm_act(norm, x, nn.ReLU(), pool=pool)) == ["batch_norm_act"]
        hook.remove()
    assert seen == [(2, 4, 6, 5), (2, 4, 3, 3)]
    bare = nn.GroupNorm(2, 4).to(device)
    torch.testing.assert_close(norm_act(bare, x, nn.ReLU(), pool=pool), pool(bare(x).relu()))
