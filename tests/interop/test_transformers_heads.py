"""Detectors and segmenters of transformers: on our backbone, and accelerated on their own."""

import ast
import copy
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.interop import _swap
from vertebra.interop._swap import Swapped
from vertebra.models import load_weights
from vertebra.models._layouts import export
from vertebra.testing.parity import randomize

pytestmark = pytest.mark.parity

_DECODER = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16}
_DECODER |= {"decoder_ffn_dim": 16, "d_model": 16, "num_queries": 4, "dropout": 0.0}
_DETR = {**_DECODER, "encoder_layers": 1, "decoder_layers": 1}
CHANNELS = [8, 16, 24]

# per head: class, config and its options, and which of the backbone's features it reads
HEADS: dict[str, tuple[str, str, dict[str, Any], list[int]]] = {
    "detr": ("DetrForObjectDetection", "DetrConfig", _DETR, [3]),
    "conditional-detr": (
        *("ConditionalDetrForObjectDetection", "ConditionalDetrConfig"),
        *(_DETR, [3]),
    ),
    "rt-detr": (
        *("RTDetrForObjectDetection", "RTDetrConfig"),
        {
            **_DECODER,
            "decoder_layers": 1,
            "encoder_in_channels": CHANNELS,
            "encoder_hidden_dim": 16,
            "decoder_in_channels": [16, 16, 16],
            "feat_strides": [4, 8, 16],
            "num_denoising": 0,
        },
        [1, 2, 3],
    ),
    "maskformer": (
        *("MaskFormerForInstanceSegmentation", "MaskFormerConfig"),
        {"fpn_feature_size": 32, "mask_feature_size": 32, "decoder_config": _DETR},
        [0, 1, 2, 3],
    ),
    "upernet": (
        *("UperNetForSemanticSegmentation", "UperNetConfig"),
        {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 16},
        [0, 1, 2, 3],
    ),
}
# per backbone of transformers: its config and options, and ours
BACKBONES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "resnet": (
        *("ResNetConfig", {"layer_type": "basic", "embedding_size": 8}),
        *("resnet18", {"embedding_size": 8}),
    ),
    "convnext": (
        *("ConvNextConfig", {"num_stages": 3}),
        *("convnext_tiny", {}),
    ),
}
_STAGES: dict[str, Any] = {"hidden_sizes": CHANNELS, "depths": [1, 1, 1]}


@pytest.fixture(autouse=True)
def _in_double() -> Iterator[None]:
    """Losses make tensors of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module", autouse=True)
def interop(transformers: ModuleType) -> ModuleType:
    vertebra.interop.transformers.register()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return vertebra.interop.transformers


def build(head: str, backbone: Any) -> nn.Module:
    """Build a head on the backbone of that config, with random weights."""
    import transformers

    model, config, options, indices = HEADS[head]
    options = copy.deepcopy(options)
    backbone.out_indices = indices
    if "decoder_config" in options:  # else it makes itself one with a ResNet-50
        decoder = transformers.DetrConfig(backbone_config=backbone, **options["decoder_config"])
        options["decoder_config"] = decoder
    settings = getattr(transformers, config)(backbone_config=backbone, num_labels=3, **options)
    return randomize(getattr(transformers, model)(settings))


def of_theirs(backbone: str) -> Any:
    import transformers

    config, options, _, _ = BACKBONES[backbone]
    return getattr(transformers, config)(**options, **_STAGES)


def of_ours(name: str, options: dict[str, Any]) -> Any:
    return vertebra.interop.transformers.VertebraConfig(
        architecture=name, model_args={**options, **_STAGES}
    )


def inputs(head: str) -> dict[str, Any]:
    """Return two images and what is to be found on them."""
    images = torch.randn(2, 3, 32, 32)
    if head == "upernet":
        return {"pixel_values": images, "labels": torch.randint(0, 3, (2, 32, 32))}
    kinds = [torch.tensor([0, 2]), torch.tensor([1])]
    if head == "maskformer":
        masks = [(torch.rand(len(kind), 32, 32) > 0.5).double() for kind in kinds]
        return {"pixel_values": images, "mask_labels": masks, "class_labels": kinds}
    boxes = [0.2 + 0.3 * torch.rand(len(kind), 4) for kind in kinds]
    targets = [{"class_labels": kind, "boxes": box} for kind, box in zip(kinds, boxes, strict=True)]
    return {"pixel_values": images, "labels": targets}


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output, however nested."""
    if isinstance(output, Tensor):
        return [output]
    if not isinstance(output, (dict, list, tuple)):
        return []
    parts = output.values() if isinstance(output, dict) else output
    return [t for part in parts for t in tensors(part)]


def trained(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """Return the outputs and the gradients of three steps of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found: list[Tensor] = []
    for _ in range(3):
        optimizer.zero_grad()
        torch.manual_seed(1)  # what a loss samples
        output = model(**batch)
        output.loss.backward()
        found += [y.detach().clone() for y in tensors(output)]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return found


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    assert list(actual.state_dict()) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(
            actual.state_dict()[key], value, msg=lambda m, key=key: f"{key}: {m}"
        )


def swapped(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, Swapped)]


def place(model: nn.Module, kind: type[nn.Module]) -> str:
    """Return where in a model its backbone is."""
    return next(name for name, module in model.named_modules() if isinstance(module, kind))


THOROUGH = ("conditional-detr",)  # whose backbone is treated as DETR's
heads = pytest.mark.parametrize(
    "head",
    [pytest.param(n, marks=pytest.mark.thorough) if n in THOROUGH else n for n in HEADS],
)
backbones = pytest.mark.parametrize("backbone", BACKBONES)


@heads
@backbones
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_accelerated_on_its_own_backbone(head, backbone, training) -> None:
    own = build(head, of_theirs(backbone)).train(training)
    before = [type(module) for module in own.modules()]
    ours = vertebra.accelerate(copy.deepcopy(own))
    assert len(swapped(ours)) >= 8
    batch = inputs(head)
    expected, found = trained(own, batch), trained(ours, batch)
    assert len(found) == len(expected)
    for y, peer in zip(found, expected, strict=True):
        torch.testing.assert_close(y, peer)
    assert_same_state(ours, own)
    vertebra.restore(ours)
    assert [type(module) for module in ours.modules()] == before
    torch.testing.assert_close(trained(ours, batch), trained(own, batch))


@heads
@backbones
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_our_backbone_in_the_place_of_theirs(head, backbone, training, interop) -> None:
    """With the same weights, the same outputs and gradients."""
    from transformers.backbone_utils import BackboneMixin

    peer = build(head, of_theirs(backbone)).train(training)
    ours = build(head, of_ours(*BACKBONES[backbone][2:])).train(training)
    name = place(peer, BackboneMixin)
    assert place(ours, interop.VertebraBackbone) == name
    theirs = peer.get_submodule(name).state_dict()
    norms = {k: theirs.pop(k) for k in list(theirs) if k.startswith("hidden_states_norms.")}
    mine: Any = ours.get_submodule(name)
    load_weights(mine.network, theirs)
    mine.load_state_dict({**mine.state_dict(), **norms})
    rest = {k: v for k, v in peer.state_dict().items() if not k.startswith(f"{name}.")}
    ours.load_state_dict({**ours.state_dict(), **rest})

    batch = inputs(head)
    outputs: list[list[Tensor]] = []
    for model in (ours, peer):
        torch.manual_seed(1)
        output: Any = model(**batch)
        output.loss.backward()
        outputs.append(tensors(output))
        outputs[-1] += [p.grad for k, p in model.named_parameters() if f"{name}." not in k]
    torch.testing.assert_close(*outputs)
    found = {k: p.grad for k, p in mine.network.named_parameters()}
    assert all(grad is not None for grad in found.values())
    found = export(found, backbone, "transformers")
    expected = {f"{backbone}.{k}": p.grad for k, p in peer.get_submodule(name).named_parameters()}
    for key, grad in expected.items():
        if grad is not None and key in found:  # DETR freezes the stem of a ResNet of theirs
            torch.testing.assert_close(found[key], grad, msg=lambda m, key=key: f"{key}: {m}")
    assert len(found.keys() & expected.keys()) == len(found)


@heads
def test_on_a_regnet(head, interop, tmp_path) -> None:
    """Which transformers has no backbone of; saved and loaded with the head."""
    options = {"stem_width": 8, "group_width": 4}
    model: Any = build(head, of_ours("regnet_y_400mf", options)).train()
    batch = inputs(head)
    model(**batch).loss.backward()
    backbone = model.get_submodule(place(model, interop.VertebraBackbone))
    assert all(p.grad is not None for p in backbone.parameters())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded.get_submodule(place(loaded, interop.VertebraBackbone))) is type(backbone)
    assert_same_state(loaded, model)
    with torch.no_grad():
        x = batch["pixel_values"]
        torch.testing.assert_close(tensors(loaded(x)), tensors(model.eval()(x)))


# the hook by which transformers takes kernels from the hub

HOOKS = {
    "use_kernel_forward_from_hub",
    "use_kernel_func_from_hub",
    "use_kernel_func_from_hub_with_fallback",
    "use_kernelized_func",
}


def hooked(module: ModuleType) -> set[str]:
    """Return the classes and functions of a module that stand under such a hook."""
    tree = ast.parse(inspect.getsource(module))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") in HOOKS
    }


def test_no_layer_that_we_accelerate_is_under_the_kernel_hook(transformers) -> None:
    """So that there is nothing to register a kernel for: the documentation says so."""
    importlib.import_module("vertebra.interop._transformers")
    recipes = {
        path for path, r in _swap.recipes("transformers").items() if hasattr(r.mixin, "forward")
    }
    assert len(recipes) > 20
    under_hook = {
        f"{name}.{layer}"
        for name in {path.rpartition(".")[0] for path in recipes}
        for layer in hooked(importlib.import_module(name))
    }
    attention = "transformers.models.rt_detr.modeling_rt_detr.MultiScaleDeformableAttention"
    assert attention in under_hook  # where the hook is, it is found
    assert not under_hook & recipes
