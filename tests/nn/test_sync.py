"""Converting to synchronised batch norms: nothing changes but the statistics' reach."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

import vertebra
from vertebra.kernels import _op
from vertebra.models import ResNet, ResNetConfig
from vertebra.nn import BatchNormAct2d, SyncBatchNormAct2d, convert_sync_batchnorm


@pytest.fixture
def two_processes() -> Iterator[None]:
    """This process as one of two, the other of which need not exist."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=fake.FakeStore())
    yield
    torch.distributed.destroy_process_group()


def ops_of(model: nn.Module, x: Tensor) -> list[str]:
    seen: list[str] = []
    with _op.observe(lambda call: seen.append(call.op.name)):
        model(x)
    return seen


@pytest.mark.parametrize("training", [False, True])
def test_one_process_gives_the_same_bits(training: bool) -> None:
    model = ResNet(ResNetConfig("basic", (1, 1), hidden_sizes=(16, 24), num_classes=5)).train(
        training
    )
    twin = copy.deepcopy(model)
    keys, parameters = list(twin.state_dict()), list(twin.parameters())
    assert convert_sync_batchnorm(twin, process_group=None) is twin
    assert list(twin.state_dict()) == keys
    assert all(a is b for a, b in zip(twin.parameters(), parameters, strict=True))
    norms = [m for m in twin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    stem, *others = (type(m) for m in norms)
    assert stem is nn.SyncBatchNorm  # it was bare
    assert set(others) == {SyncBatchNormAct2d}
    assert all(isinstance(m, nn.SyncBatchNorm) and m.training == training for m in norms)
    x = torch.randn(2, 3, 40, 40)
    with vertebra.backend("eager"):
        assert torch.equal(twin(x), model(x))
        assert ops_of(twin, x) == ops_of(model, x)  # as fused as before
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


@pytest.mark.parity
def test_converts_timm_as_timm_does() -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("test_byobnet", num_classes=5).eval()
    ours = convert_sync_batchnorm(copy.deepcopy(theirs))
    theirs = timm.layers.convert_sync_batchnorm(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    places = [n for n, m in theirs.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    assert [n for n, m in ours.named_modules() if isinstance(m, nn.SyncBatchNorm)] == places
    x = torch.randn(1, 3, 40, 40)
    with vertebra.backend("eager"):
        torch.testing.assert_close(ours(x), theirs(x))


def test_bare_norms_and_options() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(8, momentum=0.03), BatchNormAct2d(8, 1e-2, None, affine=False)
    )
    seen: list[str] = []
    model[1].register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    convert_sync_batchnorm(model)
    assert type(model[0]) is nn.SyncBatchNorm
    assert model[0].momentum == 0.03
    assert (model[1].eps, model[1].momentum, model[1].weight) == (1e-2, None, None)
    model(torch.randn(2, 8, 4, 4))
    assert seen == ["SyncBatchNormAct2d"]
    assert type(convert_sync_batchnorm(BatchNormAct2d(8))) is SyncBatchNormAct2d


def test_two_processes_need_a_gpu_to_train_and_none_in_eval_mode(two_processes) -> None:
    norm = SyncBatchNormAct2d(8)
    x = torch.randn(2, 8, 4, 4)
    with pytest.raises(ValueError, match="on GPU"):
        norm(x)
    assert torch.equal(norm.eval()(x), F.relu(F.batch_norm(x, norm.running_mean, norm.running_var)))


def test_what_follows_the_synchronised_norm(two_processes, monkeypatch) -> None:
    """Drop, residual, activation and pool, behind a stand-in for torch's kernels."""
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: x - 0.5)
    norm = SyncBatchNormAct2d(8, drop_layer=lambda: nn.Softplus())
    x, residual = torch.randn(2, 2, 8, 6, 6)
    y = F.relu(F.softplus(x - 0.5) - residual)
    assert torch.equal(norm(x, -residual), y)
    assert torch.equal(norm(x, drop=nn.Tanh()), F.relu(torch.tanh(x - 0.5)))
    assert torch.equal(norm(x, -residual, nn.MaxPool2d(3, 2, 1)), F.max_pool2d(y, 3, 2, 1))
