"""Models of transformers on our ops: the same numbers, objects, keys and hooks, and back."""

import copy
import importlib
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.interop import _swap
from vertebra.interop._swap import Swapped
from vertebra.interop.accelerate import accelerate, restore
from vertebra.kernels._op import Call, observe

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("transformers")]

_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [2, 1]}
_RESNET: dict[str, Any] = {"embedding_size": 8, **_STAGES}
_REGNET: dict[str, Any] = {"embedding_size": 8, "groups_width": 4, **_STAGES}
_CONVNEXT: dict[str, Any] = {"num_stages": 2, "layer_scale_init_value": 0.5, **_STAGES}

# per family: class, config and its options
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resnet-basic": (
        *("ResNetForImageClassification", "ResNetConfig"),
        {"layer_type": "basic", **_RESNET},
    ),
    "resnet-bottleneck": (
        *("ResNetForImageClassification", "ResNetConfig"),
        {"layer_type": "bottleneck", "downsample_in_bottleneck": True, **_RESNET},
    ),
    "resnet-gelu": (
        *("ResNetBackbone", "ResNetConfig"),
        {"layer_type": "basic", "hidden_act": "gelu", "out_indices": [1, 2], **_RESNET},
    ),
    "rt-detr-resnet": (
        *("RTDetrResNetBackbone", "RTDetrResNetConfig"),
        {"layer_type": "basic", "out_indices": [1, 2], **_RESNET},
    ),
    "regnet-x": ("RegNetForImageClassification", "RegNetConfig", {"layer_type": "x", **_REGNET}),
    "regnet-y": ("RegNetForImageClassification", "RegNetConfig", {"layer_type": "y", **_REGNET}),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", _CONVNEXT),
    "convnext-unscaled": (
        *("ConvNextForImageClassification", "ConvNextConfig"),
        {**_CONVNEXT, "layer_scale_init_value": 0.0},
    ),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", _CONVNEXT),
    "dinov3-convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", _STAGES),
}
# the same arithmetic in the same order: not a bit may differ
BIT_EQUAL = ("resnet-basic", "resnet-bottleneck", "resnet-gelu", "rt-detr-resnet", "regnet-x")

SWAPPED: dict[str, dict[str, int]] = {
    "resnet-basic": {"Embeddings": 1, "ConvLayer": 7, "ShortCut": 1, "BasicLayer": 3},
    "resnet-bottleneck": {"Embeddings": 1, "ConvLayer": 10, "ShortCut": 1, "BottleNeckLayer": 3},
    "resnet-gelu": {"Embeddings": 1, "ConvLayer": 7, "ShortCut": 1, "BasicLayer": 3},
    "rt-detr-resnet": {"Embeddings": 1, "ConvLayer": 9, "ShortCut": 2, "BasicLayer": 3},
    "regnet-x": {"ConvLayer": 10, "ShortCut": 2, "XLayer": 3},
    "regnet-y": {"ConvLayer": 10, "ShortCut": 2, "YLayer": 3, "SELayer": 3},
    "convnext": {"LayerNorm": 5, "Layer": 3},
    "convnext-unscaled": {"LayerNorm": 5, "Layer": 3},
    "convnextv2": {"LayerNorm": 5, "Layer": 3, "GRN": 3},
    "dinov3-convnext": {"LayerNorm": 5, "Layer": 3},
}
# of a forward pass in training mode: one op per norm, the adds and activations inside
OPS: dict[str, dict[str, int]] = {
    "resnet-basic": {"batch_norm_act_pool": 1, "batch_norm_act": 7},
    "resnet-bottleneck": {"batch_norm_act_pool": 1, "batch_norm_act": 10},
    "resnet-gelu": {"batch_norm_act": 8},
    "rt-detr-resnet": {"batch_norm_act_pool": 1, "batch_norm_act": 10},
    "regnet-x": {"batch_norm_act": 12},
    "regnet-y": {"batch_norm_act": 12, "squeeze_excite": 3},
    "convnext": {"layer_norm_2d": 5, "drop_path_add": 3},
    "convnext-unscaled": {"layer_norm_2d": 5, "drop_path_add": 3},
    "convnextv2": {"layer_norm_2d": 5, "drop_path_add": 3, "global_response_norm": 3},
    "dinov3-convnext": {"layer_norm_2d": 5, "drop_path_add": 3},
}

families = pytest.mark.parametrize("family", FAMILIES)


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


def build(family: str) -> nn.Module:
    import transformers

    name, config, options = FAMILIES[family]
    return randomised(getattr(transformers, name)(getattr(transformers, config)(**options)))


def pair(family: str) -> tuple[nn.Module, nn.Module]:
    """Return a model as it is, and its twin on our ops."""
    own = build(family)
    return own, accelerate(copy.deepcopy(own))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=dtype)


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output, however nested."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [t for part in parts if part is not None for t in tensors(part)]


def swapped(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Swapped)]


def part(path: str) -> Any:
    """Return a class of transformers' models."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def assert_same_state(actual: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    state = actual.state_dict()
    assert list(state) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(
            state[key], value, msg=lambda m, key=key: f"{key}: {m}", **tolerance
        )


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the outputs and the gradients of three steps of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found: list[Tensor] = []
    for _ in range(3):
        optimizer.zero_grad()
        leaf = x.clone().requires_grad_()
        outputs = tensors(model(leaf))
        sum(y.square().mean() for y in outputs).backward()
        found += [y.detach().clone() for y in outputs] + [leaf.grad]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found


@families
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_same_numbers(family, training):
    own, ours = (model.double().train(training) for model in pair(family))
    x = images(torch.float64)
    expected, found = trained(own, x), trained(ours, x)
    assert len(found) == len(expected)
    for y, peer in zip(found, expected, strict=True):
        torch.testing.assert_close(y, peer)
    assert_same_state(ours, own)
    restore(ours)
    assert not swapped(ours)
    torch.testing.assert_close(tensors(ours(x)), tensors(own(x)))


@pytest.mark.parametrize("family", BIT_EQUAL)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_not_a_bit_differs(family, training):
    own, ours = (model.train(training) for model in pair(family))
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(tensors(ours(x)), tensors(own(x)), rtol=0, atol=0)
    assert_same_state(ours, own, rtol=0, atol=0)


@families
def test_every_hidden_state_is_returned(family):
    own, ours = (model.double().eval() for model in pair(family))
    x = images(torch.float64)
    with torch.no_grad():
        expected = own(x, output_hidden_states=True)
        found = ours(x, output_hidden_states=True)
    assert list(found) == list(expected)
    assert len(expected.hidden_states) == 3
    torch.testing.assert_close(tensors(found), tensors(expected))


def test_a_backbone_that_captures_outputs(transformers):
    config = transformers.ConvNextConfig(out_indices=[1, 2], **_CONVNEXT)
    own = randomised(transformers.ConvNextBackbone(config)).double()
    ours = accelerate(copy.deepcopy(own))
    assert len([m for m in swapped(ours) if isinstance(m, nn.LayerNorm)]) == 7  # two of outputs
    x = images(torch.float64)
    expected, found = own(x).feature_maps, ours(x).feature_maps
    assert len(found) == 2
    torch.testing.assert_close(found, expected)


@families
def test_modules_are_swapped_and_run_ops(family):
    model = accelerate(build(family))
    names = Counter(type(module).__name__ for module in swapped(model))
    suffixes = SWAPPED[family]
    assert sorted(names.values()) == sorted(suffixes.values())
    for suffix, count in suffixes.items():
        assert count in [n for name, n in names.items() if name.endswith(suffix)], suffix
    with vertebra.backend("eager"):
        ops = Counter(site.op for site in vertebra.explain(model.train(), images(), bandwidth=1e9))
    assert ops == OPS[family]


@families
def test_the_model_stays_what_it_is(family):
    own = build(family)
    classes = [type(module) for module in own.modules()]
    state = {key: id(value) for key, value in own.named_parameters()}
    keys = list(own.state_dict())
    ours = accelerate(own)
    assert ours is own
    assert swapped(ours)
    assert {key: id(value) for key, value in ours.named_parameters()} == state
    assert list(ours.state_dict()) == keys
    for module, cls in zip(ours.modules(), classes, strict=True):
        assert isinstance(module, cls)
        assert type(module).__name__ == cls.__name__
    once = [type(module) for module in ours.modules()]
    assert [type(module) for module in accelerate(ours).modules()] == once
    assert [type(module) for module in copy.deepcopy(ours).modules()] == once
    loaded = pickle.loads(pickle.dumps(ours))
    assert [type(module) for module in loaded.modules()] == classes
    assert_same_state(loaded, ours, rtol=0, atol=0)
    assert [type(module) for module in restore(ours).modules()] == classes


def test_saves_as_its_own(tmp_path):
    ours = accelerate(build("resnet-basic")).eval()
    ours.save_pretrained(tmp_path)
    own = type(ours).from_pretrained(tmp_path).eval()
    assert not swapped(own)
    x = images()
    with torch.no_grad():
        assert torch.equal(own(x).logits, ours(x).logits)


@families
def test_every_hook_fires(family):
    own, ours = (model.double().eval() for model in pair(family))
    x = images(torch.float64)
    with torch.no_grad():
        expected = tensors(own(x))
        for (name, peer), (_, module) in zip(
            own.named_modules(), ours.named_modules(), strict=True
        ):
            seen: list[list[Tensor]] = []
            hooks = [  # cloned: transformers adds to what a layer returned, in place
                m.register_forward_hook(
                    lambda *args, seen=seen: seen.append([t.clone() for t in tensors(args[2])])
                )
                for m in (peer, module)
            ]
            own(x)
            torch.testing.assert_close(tensors(ours(x)), expected)
            for hook in hooks:
                hook.remove()
            half = len(seen) // 2
            torch.testing.assert_close(
                seen[half:], seen[:half], msg=lambda m, name=name: f"{name}: {m}"
            )


@families
def test_a_forward_of_an_instance_is_called(family):
    """As accelerate of Hugging Face replaces it to move weights."""
    model = accelerate(build(family)).double().eval()
    x = images(torch.float64)
    with torch.no_grad():
        expected = tensors(model(x))
        for name, module in model.named_modules():
            if list(module.children()) or not list(module.parameters()):
                continue
            calls: list[str] = []
            forward = module.forward

            def replaced(*args: Any, calls=calls, forward=forward) -> Any:
                calls.append("called")
                return forward(*args)

            module.forward = replaced
            torch.testing.assert_close(tensors(model(x)), expected)
            assert calls == ["called"], name
            del module.forward


@pytest.mark.parametrize(
    "family",
    [
        "resnet-basic",
        pytest.param("rt-detr-resnet", marks=pytest.mark.thorough),
        pytest.param("regnet-y", marks=pytest.mark.thorough),
        "convnextv2",
        pytest.param("dinov3-convnext", marks=pytest.mark.thorough),
    ],
)
def test_compiles_in_one_graph(family):
    model = accelerate(build(family)).double().train()
    expected = copy.deepcopy(model)
    x = images(torch.float64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(tensors(compiled(x)), tensors(expected(x)))
    assert_same_state(model, expected)


def assert_as_exact(found: list[Tensor], own: list[Tensor], exact: list[Tensor]) -> None:
    """Hold the error to twice that of the model as it is, and a rounding to bf16."""
    for y, peer, reference in zip(found, own, exact, strict=True):
        error, allowed = ((t.float() - reference).norm() for t in (y, peer))
        assert error <= 2 * (allowed + 2**-8 * reference.norm())


@families
def test_channels_last_autocast_and_bf16(family):
    own, ours = (model.eval() for model in pair(family))
    x = images()
    with torch.no_grad():
        exact = tensors(own(x))
        torch.testing.assert_close(
            tensors(ours(x.contiguous(memory_format=torch.channels_last))), exact
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert_as_exact(tensors(ours(x)), tensors(own(x)), exact)
        own, ours, x = own.bfloat16(), ours.bfloat16(), x.bfloat16()
        found = tensors(ours(x))
        assert {y.dtype for y in found} == {torch.bfloat16}
        assert_as_exact(found, tensors(own(x)), exact)


# loose modules


def test_layer_norm_of_either_format_and_any_rank():
    for path in (
        "convnext.modeling_convnext.ConvNextLayerNorm",
        "convnextv2.modeling_convnextv2.ConvNextV2LayerNorm",
        "dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextLayerNorm",
    ):
        for data_format, shape in (
            ("channels_first", (2, 6, 5, 3)),
            ("channels_last", (2, 5, 3, 6)),
            ("channels_last", (4, 6)),
        ):
            own = randomised(part(path)(6, data_format=data_format)).double()
            ours = accelerate(copy.deepcopy(own))
            assert swapped(ours)
            x = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(ours(features=x), own(features=x))
        plane = accelerate(part(path)((3, 6), elementwise_affine=False))
        assert not swapped(plane)
        assert plane(torch.randn(2, 5, 3, 6)).shape == (2, 5, 3, 6)


DROPS = (
    "convnext.modeling_convnext.ConvNextDropPath",
    "convnextv2.modeling_convnextv2.ConvNextV2DropPath",
    "dinov3_convnext.modeling_dinov3_convnext.Dinov3ConvnextDropPath",
)
LAYERS = (
    ("convnext.modeling_convnext.ConvNextLayer", "ConvNextConfig"),
    ("convnextv2.modeling_convnextv2.ConvNextV2Layer", "ConvNextV2Config"),
    ("dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextLayer", "DINOv3ConvNextConfig"),
)


@pytest.fixture
def keep_first_and_third(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dropping with 0.4 keep these two of four samples, in our convention and in theirs.

    Kept are those below 0.6 here, and there those above 0.4.
    """

    def rand(*shape: Any, **kwargs: Any) -> Tensor:
        noise = torch.tensor([0.1, 0.7, 0.3, 0.95], **kwargs)
        return noise if isinstance(shape[0], int) else (1 - noise).reshape(shape[0])

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.parametrize("path", DROPS)
@pytest.mark.usefixtures("keep_first_and_third")
def test_drop_path(path):
    own = part(path)(0.4)
    ours = accelerate(copy.deepcopy(own))
    assert swapped(ours)
    for shape in ((4, 3, 2, 2), (4, 5, 3), (4, 2)):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours(hidden_states=x), own(hidden_states=x))
        assert ours(x)[1].count_nonzero() == 0
        assert ours(x)[2].count_nonzero() > 0
    assert ours.eval()(x) is x
    assert repr(ours) == repr(own)


@pytest.mark.parametrize(("path", "config"), LAYERS)
@pytest.mark.usefixtures("keep_first_and_third")
def test_a_layer_that_drops(path, config, transformers):
    own = randomised(part(path)(getattr(transformers, config)(), 6, drop_path=0.4)).double()
    ours = accelerate(copy.deepcopy(own))
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64)
    expected, found = trained(own, x), trained(ours, x)
    for y, peer in zip(found, expected, strict=True):
        torch.testing.assert_close(y, peer)
    sites = vertebra.explain(ours, x, bandwidth=1e9)
    assert [site.op for site in sites].count("drop_path_add") == 1
    seen: list[Tensor] = []
    ours.drop_path.register_forward_hook(lambda *args: seen.append(args[2]))
    torch.testing.assert_close(ours(x), own(x))
    assert seen[0][1].count_nonzero() == 0
    torch.testing.assert_close(ours.eval()(x), own.eval()(x))


def test_loose_modules():
    modules = (
        part("convnextv2.modeling_convnextv2.ConvNextV2GRN")(6),
        part("regnet.modeling_regnet.RegNetSELayer")(6, 4),
        part("detr.modeling_detr.DetrFrozenBatchNorm2d")(6),
        part("rt_detr.modeling_rt_detr.RTDetrFrozenBatchNorm2d")(6),
        part("resnet.modeling_resnet.ResNetShortCut")(6, 4),
        part("regnet.modeling_regnet.RegNetConvLayer")(6, 4, activation="silu"),
    )
    for module in modules:
        own = randomised(module).double()
        ours = accelerate(copy.deepcopy(own))
        assert type(ours) is not type(own)
        for x in (torch.randn(2, 6, 6, 6), torch.randn(2, 6, 6, 6).transpose(1, 3)):
            leaves = [x.double().requires_grad_() for _ in range(2)]
            y, peer = ours(leaves[0]), own(leaves[1])
            torch.testing.assert_close(y, peer)
            y.square().sum().backward()
            peer.square().sum().backward()
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        assert_same_state(ours, own)


def test_a_frozen_norm_ignores_the_counter_of_a_checkpoint():
    ours = accelerate(part("detr.modeling_detr.DetrFrozenBatchNorm2d")(6))
    ours.load_state_dict(nn.BatchNorm2d(6).state_dict())


def test_a_detector_with_a_frozen_backbone(transformers):
    config = transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(
            layer_type="basic", out_features=["stage2"], **_RESNET
        ),
        **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
        **{"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0},
    )
    own = randomised(transformers.DetrForObjectDetection(config)).double()
    ours = accelerate(copy.deepcopy(own))
    names = Counter(type(module).__name__ for module in swapped(ours))
    assert names["DetrFrozenBatchNorm2d"] == 8
    assert names["ResNetBasicLayer"] == 3
    ops = Counter(site.op for site in vertebra.explain(ours, images(torch.float64), bandwidth=1e9))
    assert ops == {"scale_bias_act": 7, "batch_norm_act_pool": 1}
    x = images(torch.float64)
    for y, peer in zip(trained(ours, x), trained(own, x), strict=True):
        torch.testing.assert_close(y, peer)
    assert_same_state(ours, own)


@pytest.mark.thorough
def test_every_recipe_is_for_the_installed_library():
    importlib.import_module("vertebra.interop._transformers")
    recipes = {p: r for p, r in _swap._recipes.items() if p.startswith("transformers.models.")}
    assert len(recipes) > 30
    for path, recipe in recipes.items():
        cls = part(path.removeprefix("transformers.models."))
        assert _swap.path_of(cls) == path
        for name, known in recipe.methods.items():
            assert _swap.reading(getattr(cls, name)) in known, path


# what is left alone, and what is said


def test_a_wrong_number_of_channels_is_the_same_error():
    for family in ("resnet-basic", "rt-detr-resnet"):
        model = accelerate(build(family))
        with pytest.raises(ValueError, match="channel dimension of the pixel values"):
            model(torch.randn(2, 4, 64, 64))


def test_a_subclass_keeps_what_it_has():
    layer = part("resnet.modeling_resnet.ResNetConvLayer")

    class Louder(layer):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    own = build("resnet-basic").eval()
    _, last = own.resnet.encoder.stages[0].layers[0].layer
    last.__class__ = Louder
    ours = accelerate(copy.deepcopy(own))
    assert isinstance(ours.resnet.encoder.stages[0].layers[0].layer[0], Swapped)
    assert not isinstance(ours.resnet.encoder.stages[0].layers[0].layer[1], Swapped)
    x = images()
    with torch.no_grad():
        assert torch.equal(ours(x).logits, own(x).logits)


def test_an_excitation_of_other_modules_is_left_alone():
    own = part("regnet.modeling_regnet.RegNetSELayer")(6, 4)
    own.attention.insert(1, nn.BatchNorm2d(4))
    assert not swapped(accelerate(own))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Let classes be looked at anew."""
    _swap._swapped.cache_clear()
    yield
    _swap._swapped.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_a_changed_forward_is_left_alone(monkeypatch):
    layer = part("resnet.modeling_resnet.ResNetConvLayer")

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(hidden_states))) + 1

    monkeypatch.setattr(layer, "forward", forward)
    own = build("resnet-basic").eval()
    with pytest.warns(UserWarning, match=r"ResNetConvLayer\.forward is not the one") as caught:
        ours = accelerate(copy.deepcopy(own))
    assert len(caught) == 1
    names = {type(module).__name__ for module in swapped(ours)}
    assert names == {"ResNetEmbeddings", "ResNetBasicLayer", "ResNetShortCut"}
    x = images()
    with torch.no_grad():
        assert torch.equal(ours(x).logits, own(x).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        accelerate(ours)


@pytest.mark.parametrize("family", ["convnext", "convnextv2", "dinov3-convnext"])
@pytest.mark.usefixtures("eager_on_one_thread")
def test_a_fused_layer_runs_gelu_with_the_convolution_before_it(family: str) -> None:
    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.gelu(x)

    def acts(model: nn.Module) -> Counter[str]:
        """Return how many convolutions end in which activation."""
        calls: list[Call] = []
        with observe(calls.append):
            model(x)
        return Counter(call.args[9] for call in calls if call.op.name == "conv2d_act")

    model, x = build(family).eval(), images()
    gelus = [n for n, m in model.named_modules() if type(m).__name__ == "GELUActivation"]
    with torch.no_grad():
        fused = vertebra.fuse(model)
        assert acts(fused)["gelu"] == len(gelus) == 3
        assert type(fused.get_submodule(gelus[0])).__name__ == "GELUActivation"
        torch.testing.assert_close(tensors(fused(x)), tensors(model(x)))
        # each for itself: a hook, a kernel of the hub, erf in Python, a class of somebody
        fused.get_submodule(gelus[0]).register_forward_hook(lambda *_: None)
        assert acts(fused)["gelu"] == 2
        for change in (
            {"forward": nn.functional.gelu},
            {"act": lambda x: nn.functional.gelu(x)},
            {"__class__": Watched},
        ):
            twin = vertebra.fuse(model)
            for name, value in change.items():
                setattr(twin.get_submodule(gelus[1]), name, value)
            assert acts(twin)["gelu"] == 2
            torch.testing.assert_close(tensors(twin(x)), tensors(model(x)))
