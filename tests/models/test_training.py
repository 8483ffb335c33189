"""What a training loop asks of a model: checkpointing, parameter groups, averages, copies."""

import copy
import io
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import vertebra
from vertebra.kernels import _op
from vertebra.models import (
    ConvNeXt,
    ConvNeXtConfig,
    RegNet,
    RegNetConfig,
    ResNet,
    ResNetConfig,
    create_model,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from vertebra.models._layouts import LAYOUTS
from vertebra.models._network import Network
from vertebra.models._param_groups import number_layers


def resnet(**options: Any) -> ResNet:
    widths = {"hidden_sizes": (32, 64), "num_classes": 5}
    return ResNet(ResNetConfig("bottleneck", (2, 1), **widths, **options))


def seresnet() -> ResNet:
    widths = {"hidden_sizes": (16, 16, 32, 32), "num_classes": 5}
    rates = {"drop_path_rate": 0.5, "drop_block_rate": 0.2}
    return ResNet(ResNetConfig("basic", (1, 1, 2, 1), attn_layer="se", **widths, **rates))


def regnet() -> RegNet:
    return RegNet(
        RegNetConfig(
            "y",
            hidden_sizes=(16, 24),
            depths=(2, 1),
            group_width=8,
            num_classes=5,
            drop_path_rate=0.5,
        )
    )


def convnext(use_grn: bool = True) -> ConvNeXt:
    options = {"ls_init_value": None, "use_grn": True} if use_grn else {}
    return ConvNeXt(
        ConvNeXtConfig(depths=(2, 1), dims=(8, 16), num_classes=5, drop_path_rate=0.5, **options)
    )


FAMILIES = [resnet, seresnet, regnet, convnext]


def step(
    model: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Run forward and backward from one seed; return output, gradients and buffers."""
    model.zero_grad()
    torch.manual_seed(3)
    y = model(x) if call is None else call(x)
    y.square().sum().backward()
    found = {"y": y.detach()}
    found |= {f"d{key}": p.grad for key, p in model.named_parameters()}
    return found | {key: b.clone() for key, b in model.named_buffers()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


# gradient checkpointing


@pytest.fixture(params=FAMILIES)
def pair(request, randomize) -> tuple[Network, Network]:
    """A model that drops paths, and a copy that checkpoints."""
    model = randomize(request.param()).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    return model, twin


def saved_by_stages(model: Network, x: Tensor) -> int:
    """Return how many values of feature maps the stages keep for the backward pass."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.dim() == 4 and not isinstance(t, nn.Parameter):
            kept[t.data_ptr()] = t.numel()
        return t

    y = model.forward_stem(x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for stage in model.list_stages():
            y = stage(y)
    return sum(kept.values())


def test_checkpointing_changes_no_bit_and_counts_once(pair):
    model, twin = pair
    x = torch.randn(4, 3, 33, 45, requires_grad=True)
    for _ in range(2):
        expected = step(model, x)
        dx, x.grad = x.grad, None
        assert_same(step(twin, x), expected)
        assert torch.equal(x.grad, dx)
        x.grad = None
    counters = [b for key, b in twin.named_buffers() if key.endswith("num_batches_tracked")]
    assert all(counter == 7 + 2 for counter in counters)
    twin.set_grad_checkpointing(False)
    assert_same(step(twin, x), step(model, x))


def test_checkpointing_keeps_less(pair):
    model, twin = pair
    x = torch.randn(4, 3, 32, 32)
    assert saved_by_stages(twin, x) < 0.5 * saved_by_stages(model, x)
    twin.set_grad_checkpointing(False)
    assert saved_by_stages(twin, x) == saved_by_stages(model, x)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(resnet, marks=pytest.mark.thorough),
        regnet,
        pytest.param(convnext, marks=pytest.mark.thorough),
    ],
    indirect=True,
)
def test_checkpointing_under_compile(pair):
    model, twin = pair
    x = torch.randn(4, 3, 33, 45)
    expected = step(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    assert_same(step(twin, x, compiled), expected)


@pytest.mark.parametrize("training", [False, True])
def test_checkpointing_under_autocast_and_in_eval_mode(pair, training):
    model, twin = pair
    x = torch.randn(4, 3, 33, 45)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model.train(training), x)
        assert_same(step(twin.train(training), x), expected)
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), model.eval()(x))


def test_checkpointing_spares_every_norm_and_every_mode(randomize):
    """Norms of others, a cumulative mean, a norm in eval mode inside a model that trains."""
    model = randomize(resnet(norm_layer=nn.SyncBatchNorm)).train()
    for norm in (m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)):
        norm.momentum = None
    model.layer1[0].bn2.eval()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = torch.randn(4, 3, 33, 45)
    assert_same(step(twin, x), step(model, x))


def test_checkpointing_computes_again_on_the_same_backend(pair):
    """The backward pass may run outside the block that chose the backend."""
    model, twin = pair
    x = torch.randn(4, 3, 33, 45)
    expected = step(model, x)
    paths: list[str] = []

    def run(x: Tensor) -> Tensor:
        with vertebra.backend("eager"):
            return twin(x)

    with vertebra.backend("auto"), _op.observe(lambda call: paths.append(call.path)):
        assert_same(step(twin, x, run), expected)
    assert set(paths) == {"eager"}


def test_hooks_see_stages_and_blocks_when_checkpointing(pair):
    x = torch.randn(4, 3, 33, 45)
    seen: list[list[str]] = []
    for network in pair:
        names: list[str] = []
        seen.append(names)
        for name in network.stage_names:
            stage = network.get_submodule(name)
            for place, module in [(name, stage), *stage.named_children()]:
                module.register_forward_hook(lambda *_, names=names, n=place: names.append(n))
        network(x)
    assert seen[0] == seen[1] != []


def test_feature_extractors_checkpoint_too(pair):
    x = torch.randn(4, 3, 33, 45)
    results: list[dict[str, Tensor]] = []
    for network in pair:
        network.keep_features()
        results.append(step(network, x, lambda x, n=network: sum(f.mean() for f in n(x))))
    assert_same(*results)


@pytest.mark.thorough
def test_checkpointing_on_kernels(randomize, device):
    model = randomize(ResNet(ResNetConfig("basic", (1,), hidden_sizes=(8,), num_classes=5)))
    model.to(device).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = torch.randn(2, 3, 9, 9, device=device)
    with vertebra.backend("triton"):
        expected = step(model, x)
        assert_same(step(twin, x), expected)


# parameter groups


@pytest.fixture(scope="session")
def timm_optim(timm) -> ModuleType:
    return pytest.importorskip("timm.optim")


TIMM = {
    "resnet18": "resnet",
    "resnet50d": "resnet",
    "regnety_002": "regnet",
    "convnextv2_atto": "convnext",
    "convnext_tiny_hnf": "convnext",
}


def settings(groups: list[dict[str, Any]], model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return `lr_scale` and `weight_decay` of each parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group.get("lr_scale"), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.fixture(params=TIMM, scope="module")
def with_peer(request, timm) -> Iterator[tuple[Network, nn.Module, dict[str, str]]]:
    """A model of ours, timm's of the same name, and the names that timm gives our parameters."""
    with torch.device("meta"):
        ours, peer = create_model(request.param), timm.create_model(request.param)
    for model in (ours, peer):
        next(model.parameters()).requires_grad_(False)  # which takes no part
    layout = LAYOUTS[TIMM[request.param]]["timm"]
    return ours, peer, layout.names(list(ours.state_dict()))


@pytest.mark.parity
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("exempt", [(), ("*conv1.weight", "fc.weight", "head.fc.weight")])
def test_weight_decay_groups_are_those_of_timm(with_peer, weight_decay, exempt, timm_optim):
    ours, peer, names = with_peer
    groups = param_groups_weight_decay(ours, weight_decay, exempt)
    wanted = {key for key in names if key.endswith("conv1.weight")} if exempt else set()
    theirs = [names[key] for key in wanted] + list(exempt)
    expected = timm_optim.param_groups_weight_decay(peer, weight_decay, no_weight_decay_list=theirs)
    ours_by_their_names = {names[key]: value for key, value in settings(groups, ours).items()}
    assert ours_by_their_names == settings(expected, peer)
    assert [g["weight_decay"] for g in groups] == [g["weight_decay"] for g in expected]


@pytest.mark.parity
@pytest.mark.parametrize("layer_decay", [0.75, 0.6])
def test_layer_decay_groups_are_those_of_timm(with_peer, layer_decay, timm_optim):
    ours, peer, names = with_peer
    groups = param_groups_layer_decay(ours, 0.05, layer_decay, min_scale=0.05)
    expected = timm_optim.param_groups_layer_decay(
        peer, 0.05, layer_decay=layer_decay, min_scale=0.05
    )
    found = settings(groups, ours)
    assert {names[key]: value for key, value in found.items()} == settings(expected, peer)
    assert len({scale for scale, _ in found.values()}) > 3
    assert ours.no_weight_decay() == set()
    again = timm_optim.param_groups_layer_decay(ours, 0.05, layer_decay=layer_decay, min_scale=0.05)
    assert settings(again, ours) == found  # timm's function reads our group_matcher


@pytest.mark.parity
@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_those_of_timm(with_peer, coarse, timm):
    ours, peer, names = with_peer
    layers = number_layers((key for key, _ in ours.named_parameters()), ours.group_matcher(coarse))
    expected = timm.models.group_parameters(peer, peer.group_matcher(coarse), reverse=True)
    assert {names[key]: layer for key, layer in layers.items()} == expected


def test_layer_scales_do_not_decay():
    """As in timm, where they are vectors; torchvision's (C, 1, 1) would."""
    model = convnext(use_grn=False)
    decays = settings(param_groups_weight_decay(model, 0.05), model)
    assert {decays[key][1] for key in decays if key.endswith("gamma")} == {0.0}


def test_an_optimizer_takes_the_groups():
    model = regnet()
    groups = param_groups_layer_decay(model)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert [g["lr_scale"] for g in optimizer.param_groups] == [g["lr_scale"] for g in groups]
    step(model, torch.randn(2, 3, 33, 45))
    optimizer.step()


def test_layer_decay_needs_to_know_the_layers():
    with pytest.raises(ValueError, match="a model with a group_matcher, and Linear has none"):
        param_groups_layer_decay(nn.Linear(2, 3))


def test_norms_are_recognised_by_their_class():
    """As torchvision's reference training sets the decay of norms: by `isinstance`."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    for model in (resnet(), regnet(), convnext(use_grn=False)):
        of_norms = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
        keys = {key for key, p in model.named_parameters() if id(p) in of_norms}
        no_decay = settings(param_groups_weight_decay(model, 0.05), model)
        assert keys
        assert all(no_decay[key][1] == 0.0 for key in keys)
        others = {key for key in no_decay if no_decay[key][1] == 0.0} - keys
        assert all(key.endswith(("bias", "gamma")) for key in others)


# averages and copies


@pytest.mark.parametrize("build", FAMILIES)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(build, use_buffers, randomize):
    model = randomize(build()).train()
    average = AveragedModel(model, use_buffers=use_buffers)
    seen: list[dict[str, Tensor]] = []
    for _ in range(2):
        randomize(model)(torch.randn(4, 3, 33, 45))
        average.update_parameters(model)
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
    buffers = {key for key, _ in model.named_buffers()}
    for key, value in average.module.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue  # an integer
        mean = (seen[0][key] + seen[1][key]) / 2
        expected = mean if use_buffers or key not in buffers else seen[1][key]
        torch.testing.assert_close(value, expected, msg=key)
    x = torch.randn(2, 3, 33, 45)
    model.load_state_dict(average.module.state_dict())
    assert torch.equal(average.eval()(x), model.eval()(x))


@pytest.mark.parity
@pytest.mark.parametrize("build", FAMILIES)
def test_timms_average(build, randomize, timm):
    model = randomize(build()).train()
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    before = {key: value.clone() for key, value in average.module.state_dict().items()}
    randomize(model)(torch.randn(4, 3, 33, 45))
    average.update(model)
    state = model.state_dict()
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.9 * before[key] + 0.1 * state[key], msg=key)
    assert not average.module.training
    assert average.module(torch.randn(2, 3, 33, 45)).shape == (2, 5)


@pytest.mark.parametrize("training", [False, True])
def test_copies_train_on_alike(pair, training):
    """A deep copy and a whole model from a file, of models that have run."""
    _, model = pair
    x = torch.randn(4, 3, 33, 45)
    step(model.train(training), x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    expected = step(model, x)
    for twin in copies:
        assert {m.training for m in twin.modules()} == {training}
        assert_same(step(twin, x), expected)
