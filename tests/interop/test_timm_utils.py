"""What timm's train.py, validate.py and benchmark.py do to a model, done to accelerated and ours.

Every model is small, and has a peer: timm's, as it is, with the same weights. Either timm's is
accelerated, or ours comes from timm's registry; after what timm does to both, they agree.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.interop import report
from vertebra.interop._swap import Swapped
from vertebra.interop.timm import register
from vertebra.models import load_weights
from vertebra.models._layouts import LAYOUTS
from vertebra.testing.parity import assert_same_state, randomize

pytestmark = pytest.mark.parity

# one layer per stage; what timm's class is called with, and what our model of that name is
STAGES = (1, 1, 1, 1)
WIDTHS = (8, 8, 16, 16)
REGNET = {"depth": 4, "w0": 8, "wa": 8, "wm": 1.7, "group_size": 4, "stem_width": 8}
OURS = {
    "resnet": ("seresnet18", {"layers": STAGES, "hidden_sizes": WIDTHS}),
    "regnet": ("regnety_002", {**REGNET, "se_ratio": 0.25}),
    "convnext": (
        *("convnextv2_atto",),
        {"depths": STAGES, "dims": WIDTHS, "conv_mlp": False, "ls_init_value": 1e-6},
    ),
}


def build(timm, family: str) -> nn.Module:
    """Build timm's."""
    from timm.models import convnext, regnet, resnet

    if family == "resnet":
        options = {"channels": WIDTHS, "block_args": {"attn_layer": "se"}}
        return resnet.ResNet(resnet.BasicBlock, STAGES, num_classes=5, **options)
    if family == "regnet":
        return regnet.RegNet(regnet.RegNetCfg(**REGNET, se_ratio=0.25), num_classes=5)
    return convnext.ConvNeXt(depths=STAGES, dims=WIDTHS, use_grn=True, num_classes=5)


@dataclass
class Pair:
    model: nn.Module
    peer: nn.Module
    names: dict[str, str]  # of the peer's weights, by the model's

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self.model, self.peer))

    def map(self, change: Callable[[nn.Module], nn.Module]) -> Pair:
        return Pair(change(self.model), change(self.peer), self.names)

    def assert_same_state(self) -> None:
        state, expected = self.model.state_dict(), self.peer.state_dict()
        assert sorted(self.names[key] for key in state) == sorted(expected)
        for key, value in state.items():
            assert_close(value, expected[self.names[key]], key)


def assert_close(found: object, expected: object, name: str = "") -> None:
    torch.testing.assert_close(found, expected, msg=lambda text: f"{name} {text}")


@pytest.fixture(params=[f"{kind} {name}" for kind in ("accelerated", "our") for name in OURS])
def pair(request, timm) -> Pair:
    kind, _, family = request.param.partition(" ")
    peer = randomize(build(timm, family)).double()
    if kind == "accelerated":
        model = vertebra.accelerate(copy.deepcopy(peer))
        assert any(isinstance(module, Swapped) for module in model.modules())
        return Pair(model, peer, {key: key for key in model.state_dict()})
    register()
    name, options = OURS[family]
    model = timm.create_model(f"vertebra_{name}", num_classes=5, dtype=torch.double, **options)
    load_weights(model, peer.state_dict())
    return Pair(model, peer, LAYOUTS[family]["timm"].names(list(model.state_dict())))


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 32, 32, dtype=torch.double)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> list[Tensor]:
    """Train; return the losses."""
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model.train()(images()), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_averages(pair, version, timm):
    averages = []
    for net in pair:
        average = getattr(timm.utils, version)(net, decay=0.5)
        trained(net, torch.optim.SGD(net.parameters(), lr=0.01))
        average.update(net)
        averages.append(average)
    assert not averages[0].module.training
    assert list(map(type, averages[0].module.modules())) == list(map(type, pair.model.modules()))
    Pair(averages[0].module, averages[1].module, pair.names).assert_same_state()
    x = images()
    assert_close(*(average.module(x) for average in averages))


def test_freezes_and_thaws_a_part(pair, timm):
    from timm.utils import freeze, unfreeze

    for net in pair:
        parts = [name for name, part in net.named_children() if list(part.parameters())][:2]
        parts = ["stem", "trunk_output.block1"] if parts[1] == "trunk_output" else parts
        freeze(net, parts)
    frozen = {name for name, p in pair.model.named_parameters() if not p.requires_grad}
    expected = {name for name, p in pair.peer.named_parameters() if not p.requires_grad}
    assert {pair.names[name] for name in frozen} == expected
    assert expected
    state = {key: value.clone() for key, value in pair.model.state_dict().items()}
    pair.model.train()(images()).sum().backward()
    trained = {key for key, value in pair.model.state_dict().items() if not value.equal(state[key])}
    still = {name.rpartition(".")[0] for name in frozen}
    assert not {key for key in trained if key.rpartition(".")[0] in still}
    assert all((p.grad is None) == (n in frozen) for n, p in pair.model.named_parameters())
    for net in pair:
        unfreeze(net)
    pair.model.load_state_dict(state)
    assert all(p.requires_grad for p in pair.model.parameters())
    x = images()
    assert_close(*(net.train()(x) for net in pair))
    pair.assert_same_state()


def test_freezes_and_thaws_batch_norms(pair, timm):
    from timm.layers import freeze_batch_norm_2d, unfreeze_batch_norm_2d

    pair = pair.map(freeze_batch_norm_2d)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in pair.model.modules())
    x = images()
    assert_close(*(net.train()(x) for net in pair))
    pair = pair.map(unfreeze_batch_norm_2d)
    assert_close(*(net.train()(x) for net in pair))
    pair.assert_same_state()


def test_reparameterizes(pair, timm):
    """Nothing of these has another form for inference: a copy that is accelerated too."""
    model = pair.model.eval()
    twin = timm.utils.reparameterize_model(model)
    assert twin is not model
    assert list(map(type, twin.modules())) == list(map(type, model.modules()))
    x = images()
    assert torch.equal(twin(x), model(x))
    assert timm.utils.reparameterize_model(model, inplace=True) is model


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_optimizers_with_layer_decay(pair, opt, timm):
    from timm.optim import create_optimizer_v2

    settings, losses = [], []
    for net, names in zip(pair, (pair.names, None), strict=True):
        optimizer = create_optimizer_v2(net, opt=opt, lr=1e-3, weight_decay=0.05, layer_decay=0.7)
        by_id = {id(p): name for name, p in net.named_parameters()}
        keys = {id(p): names[by_id[id(p)]] if names else by_id[id(p)] for p in net.parameters()}
        settings.append(
            {
                keys[id(p)]: (group["lr_scale"], group["weight_decay"])
                for group in optimizer.param_groups
                for p in group["params"]
            }
        )
        losses.append(trained(net, optimizer))
    assert settings[0] == settings[1]
    assert len({scale for scale, _ in settings[0].values()}) > 2
    assert {decay for _, decay in settings[0].values()} == {0.0, 0.05}
    assert_close(*losses)


def test_statistics_of_activations(pair):
    """Hooks on every convolution, linear layer and LayerNorm see the same, from the input on."""
    from timm.utils import model as tools

    found = []
    for net in pair:
        kinds = nn.Conv2d | nn.Linear | nn.LayerNorm
        watched = [name for name, module in net.named_modules() if isinstance(module, kinds)]

        def average(module: nn.Module, args: object, y: Tensor) -> float:
            return y.mean().item()

        def size(module: nn.Module, args: object, y: Tensor) -> float:
            return y.square().mean().item()

        torch.manual_seed(2)
        with torch.no_grad():
            stats = tools.extract_spp_stats(
                net.eval().float(),
                ["*" if name in watched else name for name in watched[:1]] + ["*"],
                [average, size],
                input_shape=[2, 3, 32, 32],
            )
        found.append(stats)
        assert len(stats["size"]) > len(watched)
    if any(isinstance(module, Swapped) for module in pair.model.modules()):
        for key in ("average", "size"):
            torch.testing.assert_close(
                sorted(found[0][key]), sorted(found[1][key]), rtol=1e-4, atol=1e-4
            )


def test_saves_resumes_and_loads(pair, timm, tmp_path):
    """Timm's saver, its resuming and loading, and our loading of its file."""
    from timm.models import load_checkpoint, resume_checkpoint

    model = pair.model
    sgd = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    optimizer = sgd(model.parameters())
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    trained(model, optimizer)
    average.update(model)
    saver = timm.utils.CheckpointSaver(
        model=model,
        optimizer=optimizer,
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(epoch=3, metric=0.5)
    path = str(tmp_path / "last.pth.tar")
    twin = randomize(copy.deepcopy(model))
    again = sgd(twin.parameters())
    assert resume_checkpoint(twin, path, again) == 4
    assert_same_state(twin, model)
    if isinstance(model, vertebra.models._network.Network):
        load_weights(randomize(twin), path)
        assert_same_state(twin, model)
    assert torch.equal(*(torch.stack(trained(*run)) for run in ((twin, again), (model, optimizer))))
    load_checkpoint(twin, path, use_ema=True)
    assert_same_state(twin, average.module)


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_runs_as_benchmark_does(pair, layout):
    """Its calls: `to`, inference, training, autocast; and train.py's checkpointing."""
    from timm.optim import create_optimizer_v2

    found = []
    for net in pair:
        net.to(device="cpu", dtype=torch.double, memory_format=layout)
        assert net.num_classes == 5
        torch.manual_seed(3)
        x = images().contiguous(memory_format=layout)
        with torch.no_grad():
            found.append([net.eval()(x)])
        found[-1] += trained(net, create_optimizer_v2(net, opt="sgd", lr=1e-4))
        net.set_grad_checkpointing()
        found[-1] += trained(net, create_optimizer_v2(net, opt="sgd", lr=1e-4))
        net.float().set_grad_checkpointing(False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x.float()), torch.arange(4))
        net.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
    assert_close(*found)


def test_fast_norm_and_flags_for_scripting(timm):
    """A norm that timm made fast stays timm's, and keeps what it computes."""
    from timm.layers import set_fast_norm

    x = images()
    model = randomize(build(timm, "convnext")).double().eval()
    expected = model(x)
    set_fast_norm()
    try:
        fast = build(timm, "convnext").double().eval()
        fast.load_state_dict(model.state_dict())
        sites = [site for site in report(vertebra.accelerate(fast)) if "LayerNorm2d" in site.cls]
        assert sites
        assert all("fast norm" in (site.reason or "") for site in sites)
        assert_close(fast(x), expected)
        assert_close(vertebra.accelerate(model)(x), expected)
    finally:
        set_fast_norm(False)
    options = {"scriptable": True, "exportable": True, "no_jit": True, "num_classes": 5}
    flagged = timm.create_model("resnet18", **options).double().eval()
    assert_close(vertebra.accelerate(copy.deepcopy(flagged))(x), flagged(x))


@pytest.mark.parametrize("kind", ["list", "dict", "hook", "fx", "getter"])
@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "convnextv2_atto"])
def test_wrappers_of_features(name, kind, timm):
    """Accelerated inside the wrapper, and accelerated before it is wrapped."""
    options = {"features_only": True, "out_indices": (1, 2), "feature_cls": kind}
    wrapper = randomize(timm.create_model(name, **options)).double().eval()
    x = images(1)
    expected = wrapper(x)
    inside = vertebra.accelerate(wrapper)  # no copy: a copied graph is in training mode
    assert any(isinstance(module, Swapped) for module in inside.modules()) or kind == "fx"
    assert_close(inside(x), expected)

    whole = vertebra.accelerate(randomize(timm.create_model(name))).double().eval()
    plain = vertebra.restore(copy.deepcopy(whole))
    flat = {"flatten_sequential": True} if kind in ("list", "dict") and "conv" in name else {}
    wrap = functools.partial(type(wrapper), out_indices=(1, 2), **flat)
    assert_close(wrap(whole)(x), wrap(plain)(x))
