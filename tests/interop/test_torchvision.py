"""torchvision's models, accelerated: what they are stays, what they compute stays, ops run."""

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

import vertebra
from vertebra.interop import _swap, report
from vertebra.interop._swap import Swapped
from vertebra.kernels._op import observe
from vertebra.testing.parity import randomize, relative_error


def swapped(model: nn.Module) -> int:
    return sum(isinstance(module, Swapped) for module in model.modules())


def ops(call) -> list[str]:
    seen: list[str] = []
    with observe(lambda c: seen.append(c.op.name)):
        call()
    return seen


def images(size: int = 33) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


@pytest.fixture(scope="session")
def models(torchvision):
    from torchvision import models

    return models


def basic(models):
    return models.resnet._resnet(models.resnet.BasicBlock, [1, 1, 1, 1], None, False)


def bottleneck(models):
    return models.resnet._resnet(
        models.resnet.Bottleneck, [1, 1, 1, 1], None, False, groups=4, width_per_group=16
    )


def frozen(models):
    from torchvision.ops import FrozenBatchNorm2d

    return models.resnet._resnet(
        models.resnet.BasicBlock, [1, 1, 1, 1], None, False, norm_layer=FrozenBatchNorm2d
    )


def regnet(models, **options):
    params = models.regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], **options)
    return models.regnet.RegNet(params)


def regnet_y(models):
    return regnet(models, se_ratio=0.25)


def convnext(models):
    setting = [models.convnext.CNBlockConfig(16, 24, 1), models.convnext.CNBlockConfig(24, None, 2)]
    return models.convnext.ConvNeXt(setting, stochastic_depth_prob=0.0)


# how many modules are swapped: the network, its blocks, and what stands alone
BUILDERS = {basic: 5, bottleneck: 5, frozen: 5 + 12, regnet: 15, regnet_y: 18, convnext: 10}
EXACT = {basic, bottleneck, regnet, regnet_y}


@pytest.fixture(params=BUILDERS, ids=lambda build: build.__name__)
def build(request):
    return request.param


@pytest.fixture
def model(build, models) -> nn.Module:
    torch.manual_seed(0)
    return randomize(build(models))


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    torch.manual_seed(1)
    for _ in range(steps):
        loss = model(images()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parity
def test_the_numbers_stay(model, build) -> None:
    """Outputs in both modes, gradients, and all state after three steps; and again restored."""
    allowed = 0.0 if build in EXACT else 2e-5
    plain = copy.deepcopy(model)
    for module in (vertebra.accelerate(model), vertebra.restore(copy.deepcopy(model))):
        peer = copy.deepcopy(plain)
        x = images()
        assert relative_error(module.eval()(x), peer.eval()(x)) <= allowed
        train(module.train(), 3)
        train(peer.train(), 3)
        for key, value in peer.state_dict().items():
            assert relative_error(module.state_dict()[key].double(), value.double()) <= allowed, key
        for (name, p), q in zip(module.named_parameters(), peer.parameters(), strict=True):
            assert relative_error(p.grad, q.grad) <= 10 * allowed, name


@pytest.mark.parity
def test_what_it_is_stays(model, build) -> None:
    keys, parameters = list(model.state_dict()), list(model.parameters())
    classes = [type(module) for module in model.modules()]
    assert vertebra.accelerate(vertebra.accelerate(model)) is model
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    assert [type(m).__name__ for m in model.modules()] == [cls.__name__ for cls in classes]
    assert swapped(model) == swapped(copy.deepcopy(model)) == BUILDERS[build]
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert [type(module) for module in loaded.modules()] == classes
    assert vertebra.restore(model) is model
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parity
def test_ops_run(models) -> None:
    """Nine norms: one with the pool, the others with their ReLU; shortcuts stay torch's."""
    x = images()
    model = vertebra.accelerate(basic(models))
    assert Counter(ops(lambda: model(x))) == {"batch_norm_act_pool": 1, "batch_norm_act": 8}
    assert Counter(ops(lambda: model.eval()(x))) == {"batch_norm_act_pool": 1, "scale_bias_act": 8}
    assert not ops(lambda: vertebra.restore(model)(x))
    model = vertebra.accelerate(regnet_y(models)).eval()
    assert Counter(ops(lambda: model(x))) == {"scale_bias_act": 12, "squeeze_excite": 3}
    model = vertebra.accelerate(convnext(models)).eval()
    seen = Counter(ops(lambda: model(images(32))))
    assert seen == {"layer_norm_2d": 3, "drop_path_add": 3}


@pytest.mark.parity
def test_hooks_see_what_they_saw(models) -> None:
    model = randomize(bottleneck(models)).eval()
    block = model.layer2[0]
    watched = [model.bn1, block.bn3, block.relu, block.downsample[1], block]
    seen: list[torch.Tensor] = []
    for module in watched:
        module.register_forward_hook(lambda m, args, y: seen.append(y.clone()))
    x = images()
    model(x)
    expected, seen[:] = list(seen), []
    vertebra.accelerate(model)(x)
    assert sorted(t.sum().item() for t in seen) == sorted(t.sum().item() for t in expected)


@pytest.mark.parity
def test_what_is_not_recognised_is_left_and_said(models, monkeypatch) -> None:
    class Mine(models.resnet.BasicBlock):
        pass

    from torchvision.ops import StochasticDepth

    model = models.resnet._resnet(Mine, [1, 1, 1, 1], None, False)
    depth = nn.Sequential(StochasticDepth(0.5, "batch"), StochasticDepth(0.5, "row"))
    vertebra.accelerate(depth)
    assert swapped(depth) == 1
    assert [site.reason for site in report(depth)] == ["mode 'batch' drops whole batches", None]
    replaced = bottleneck(models)
    replaced.layer1[0].forward = lambda x: x
    vertebra.accelerate(replaced)
    sites = {site.name: site.reason for site in report(replaced)}
    assert sites["layer1.0"] == "its forward is replaced on the instance"
    assert sites["layer2.0"] is None
    assert type(vertebra.accelerate(model).layer1[0]) is Mine


@pytest.mark.parity
def test_another_forward_is_left_with_a_warning(models, monkeypatch) -> None:
    block = models.resnet.BasicBlock(8, 8)

    def forward(self, x):
        return x

    monkeypatch.setattr(models.resnet.BasicBlock, "forward", forward)
    _swap._swapped.cache_clear()
    with pytest.warns(UserWarning, match=r"BasicBlock.forward is not the one this version"):
        vertebra.accelerate(block)
    assert swapped(block) == 0
    _swap._swapped.cache_clear()


@pytest.mark.parity
@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph_and_traces(models, build, training: bool) -> None:
    model = vertebra.accelerate(randomize(build(models))).train(training)
    x = images(32)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(compiled(x), plain(x)) <= 1e-6
    traced = torch.fx.symbolic_trace(copy.deepcopy(plain))
    assert relative_error(traced(x), plain(x)) <= 1e-6


@pytest.mark.parity
def test_inside_larger_models(models) -> None:
    """A feature extractor, and a detector on a pyramid over a frozen backbone."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.feature_extraction import create_feature_extractor

    x = images(64)
    model = vertebra.accelerate(randomize(basic(models))).eval()
    extractor = create_feature_extractor(model, ["layer1", "layer3"])
    assert torch.equal(extractor(x)["layer3"], model.layer3(model.layer2(extractor(x)["layer1"])))
    detector = FasterRCNN(_resnet_fpn_extractor(randomize(frozen(models)), 5), num_classes=3)
    features = detector.eval().backbone(x)
    vertebra.accelerate(detector)
    assert swapped(detector) > 10
    for name, found in detector.backbone(x).items():
        assert relative_error(found, features[name]) <= 2e-5


@pytest.mark.parity
def test_on_meta_in_channels_last_and_in_half(models) -> None:
    with torch.device("meta"):
        assert vertebra.accelerate(basic(models))(images().to("meta")).shape == (2, 1000)
    x = images().contiguous(memory_format=torch.channels_last)
    model = randomize(bottleneck(models)).eval().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    vertebra.accelerate(model)
    assert torch.equal(model(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(x).float(), plain(x).float()) <= 0.05


def loose() -> dict[str, tuple[nn.Module, str]]:
    """Modules by themselves, and the op that each is."""
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.ops import (
        Conv2dNormActivation,
        FrozenBatchNorm2d,
        SqueezeExcitation,
        StochasticDepth,
    )

    return {
        "conv": (Conv2dNormActivation(8, 8, activation_layer=nn.SiLU), "batch_norm_act"),
        "conv without norm": (Conv2dNormActivation(8, 8, norm_layer=None), ""),
        "excitation": (SqueezeExcitation(8, 4), "squeeze_excite"),
        "hard excitation": (
            SqueezeExcitation(8, 4, scale_activation=nn.Hardsigmoid),
            "squeeze_excite",
        ),
        "depth": (StochasticDepth(1.0, "row"), "drop_path_add"),
        "norm": (LayerNorm2d(8), "layer_norm_2d"),
        "frozen": (FrozenBatchNorm2d(8), "scale_bias_act"),
    }


LOOSE = ("conv", "conv without norm", "excitation", "hard excitation", "depth", "norm", "frozen")


@pytest.mark.parity
@pytest.mark.parametrize("name", LOOSE)
def test_loose_modules(name, torchvision) -> None:
    module, op = loose()[name]
    module = module.double().train()
    twin = vertebra.accelerate(copy.deepcopy(module))
    x = torch.randn(2, 8, 6, 6, dtype=torch.double)
    assert set(ops(lambda: twin(x))) == ({op} if op else set())
    module(x)  # as often as its twin
    for training in (True, False):
        results = []
        for one in (twin.train(training), module.train(training)):
            z = x.clone().requires_grad_()
            y = one(z.clone())
            y.square().sum().backward()
            results.append([y, z.grad, *(p.grad for p in one.parameters()), *one.buffers()])
        torch.testing.assert_close(*results)
