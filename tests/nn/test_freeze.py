"""Freezing batch norms: the numbers of eval mode, and back to what each norm was."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.models import RegNet, RegNetConfig, ResNet, ResNetConfig
from vertebra.nn import (
    BatchNormAct2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    freeze_batch_norm_2d,
    unfreeze_batch_norm_2d,
)

VALUES = ("weight", "bias", "running_mean", "running_var")


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    for name, t in module.state_dict().items():
        if not t.is_floating_point():
            t.fill_(7)
        elif t.dim() > 1:
            t.normal_(0, (2 / t[0].numel()) ** 0.5)
        else:
            t.copy_(torch.rand_like(t) + 0.5 if "var" in name else torch.randn_like(t))
    return module


def resnet(**options: Any) -> ResNet:
    return ResNet(ResNetConfig("basic", (1, 1), hidden_sizes=(16, 24), num_classes=5, **options))


def regnet() -> RegNet:
    return RegNet(
        RegNetConfig("y", hidden_sizes=(16, 24), depths=(1, 1), group_width=8, num_classes=5)
    )


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def timm_norm(**kwargs: Any) -> nn.Module:
    return pytest.importorskip("timm.layers").BatchNormAct2d(8, **kwargs)


def timm_sync_norm(**kwargs: Any) -> nn.Module:
    return pytest.importorskip("timm.layers").convert_sync_batchnorm(timm_norm(**kwargs))


NORMS = {
    "torch": lambda **k: nn.BatchNorm2d(8, **k),
    "torch sync": lambda **k: nn.SyncBatchNorm(8, **k),
    "ours": lambda **k: BatchNormAct2d(8, act_layer=nn.SiLU, **k),
    "ours sync": lambda **k: vertebra.nn.SyncBatchNormAct2d(8, act_layer=nn.SiLU, **k),
    "timm": timm_norm,
    "timm sync": timm_sync_norm,
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"momentum": None, "eps": 1e-2}, {"dtype": torch.bfloat16}],
    ids=str,
)
@torch.no_grad()
def test_norm_there_and_back(kind: str, options: dict[str, Any]) -> None:
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)  # timm's converter does not carry it over
    norm = randomised(NORMS[kind](**options)).to(dtype)
    before, kept = state(norm), dict(vars(norm))
    x = torch.randn(2, 8, 5, 4).to(norm.running_mean.dtype)
    expected = norm.eval()(x)
    frozen = freeze_batch_norm_2d(norm.train())
    is_bare = kind.startswith("torch")
    assert type(frozen) is (FrozenBatchNorm2d if is_bare else FrozenBatchNormAct2d)
    assert not list(frozen.parameters())
    del before["num_batches_tracked"]
    assert_same(frozen.state_dict(), before)
    torch.testing.assert_close(frozen(x), expected)
    frozen.running_mean += 1  # loaded, say
    back = unfreeze_batch_norm_2d(frozen)
    assert back is norm
    assert vars(back).keys() == kept.keys()
    assert back.momentum == options.get("momentum", 0.1)
    assert back.num_batches_tracked == 7
    assert back.training
    before["running_mean"] += 1
    assert_same({k: v for k, v in back.state_dict().items() if k in before}, before)


@pytest.mark.parametrize("build", [resnet, regnet])
def test_model_there_and_back(build: Callable[[], nn.Module]) -> None:
    model = randomised(build())
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    first.weight.requires_grad_(False)
    parameters, modules, before = list(model.parameters()), list(model.modules()), state(model)
    x = torch.randn(2, 3, 40, 40)
    with vertebra.backend("eager"):
        expected = model.eval()(x)
        assert freeze_batch_norm_2d(model.train()) is model
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert_same(
            state(model), {k: v for k, v in before.items() if "num_batches_tracked" not in k}
        )
        y = model(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()  # everything else learns
    assert all(p.grad is not None for p in model.parameters())
    assert unfreeze_batch_norm_2d(model) is model
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert not first.weight.requires_grad
    assert_same(state(model), before)


@pytest.mark.parity
def test_timm_model_freezes_as_with_timm() -> None:
    timm = pytest.importorskip("timm")
    theirs = randomised(timm.create_model("test_byobnet", num_classes=5))
    ours = copy.deepcopy(theirs)
    timm.utils.model.freeze_batch_norm_2d(theirs)
    freeze_batch_norm_2d(ours)
    assert_same(state(ours), state(theirs))
    x = torch.randn(1, 3, 40, 40)
    with vertebra.backend("eager"):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    unfreeze_batch_norm_2d(ours)
    norms = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {type(m) for m in norms} == {timm.layers.BatchNormAct2d}
    assert all(m.num_batches_tracked == 7 for m in norms)


def test_bare_norm_in_our_model_keeps_the_activation_behind_it() -> None:
    """A network runs the activation of a norm that has none, frozen or not."""
    model = randomised(resnet(norm_layer=nn.SyncBatchNorm))
    x = torch.randn(2, 3, 40, 40)
    with vertebra.backend("eager"):
        expected = model.eval()(x)
        torch.testing.assert_close(freeze_batch_norm_2d(model)(x), expected)


def test_hooks_stay_and_their_handles_work() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), BatchNormAct2d(8))
    seen: list[str] = []
    first = model[1].register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    x = torch.randn(2, 3, 4, 4)
    freeze_batch_norm_2d(model)(x)
    assert seen == ["FrozenBatchNormAct2d"]
    second = model[1].register_full_backward_hook(lambda m, *_: seen.append("backward"))
    first.remove()
    unfreeze_batch_norm_2d(model)(x).sum().backward()
    assert seen == ["FrozenBatchNormAct2d", "backward"]
    second.remove()
    model(x).sum().backward()
    assert seen == ["FrozenBatchNormAct2d", "backward"]


def test_shared_norm_stays_shared() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    freeze_batch_norm_2d(model)
    assert model[0] is model[2]
    unfreeze_batch_norm_2d(model)
    assert model[0] is norm is model[2]


def test_copy_remembers_too() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 1), BatchNormAct2d(8, momentum=0.03)))
    freeze_batch_norm_2d(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        back = unfreeze_batch_norm_2d(twin)[1]
        assert type(back) is BatchNormAct2d
        assert back.momentum == 0.03
        assert back.num_batches_tracked == 7
        assert back.weight is not vars(model[1])["_source"].weight
        with torch.no_grad():
            back.weight.zero_()
    assert all(getattr(model[1], name).any() for name in VALUES)


def test_checkpoint_loaded_while_frozen_is_what_trains_on() -> None:
    model = freeze_batch_norm_2d(randomised(resnet()))
    checkpoint = state(randomised(resnet()))
    model.load_state_dict(checkpoint)
    assert_same(state(unfreeze_batch_norm_2d(model)), checkpoint)


def test_dtype_changed_while_frozen() -> None:
    norm = randomised(BatchNormAct2d(8))
    norm.bias.requires_grad_(False)
    expected = {k: v.to(torch.bfloat16) if "num" not in k else v for k, v in state(norm).items()}
    back = unfreeze_batch_norm_2d(freeze_batch_norm_2d(norm).bfloat16())
    assert_same(state(back), expected)
    assert [p.requires_grad for p in back.parameters()] == [True, False]


@pytest.mark.parametrize("assign", [False, True])
def test_model_on_the_meta_device(assign: bool) -> None:
    checkpoint = state(randomised(resnet()))
    with torch.device("meta"):
        model = resnet()
    freeze_batch_norm_2d(model)
    assert all(t.is_meta for t in model.state_dict().values())
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(checkpoint, assign=assign)
    back = unfreeze_batch_norm_2d(model).state_dict()
    assert list(back) == list(checkpoint)
    for key, value in checkpoint.items():
        assert torch.equal(back[key], value) or key.endswith("num_batches_tracked"), key
    assert not any(t.is_meta for t in back.values())


def test_frozen_from_the_start_unfreezes_to_learning_norms() -> None:
    model = randomised(resnet(norm_layer=FrozenBatchNormAct2d))
    x = torch.randn(2, 3, 40, 40)
    with vertebra.backend("eager"):
        expected = model(x)
        torch.testing.assert_close(unfreeze_batch_norm_2d(model).eval()(x), expected)
    assert type(model.layer1[0].bn1) is BatchNormAct2d
    assert type(model.bn1) is nn.BatchNorm2d  # the stem's, whose activation follows it
    assert type(unfreeze_batch_norm_2d(FrozenBatchNorm2d(8))) is nn.BatchNorm2d


def test_refuses_a_norm_without_statistics_and_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(ValueError, match=r"'1' has none; build it with track_running_stats=True"):
        freeze_batch_norm_2d(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_other_modules_are_left_alone() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.Conv2d(8, 8, 1))
    modules = list(model.modules())
    assert list(unfreeze_batch_norm_2d(freeze_batch_norm_2d(model)).modules()) == modules
