"""What torchvision builds around a backbone: extractors, pyramids, detectors, segmenters.

Around an accelerated body, and around one of ours.
"""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vertebra
from vertebra.interop._swap import Swapped
from vertebra.models import load_weights
from vertebra.testing.parity import randomize, relative_error

pytestmark = pytest.mark.parity


def _iou(box: Tensor, boxes: Tensor) -> Tensor:
    inner = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(0)
    sizes = boxes[:, 2:] - boxes[:, :2]
    union = (box[2:] - box[:2]).prod() + sizes.prod(1) - inner.prod(1)
    return inner.prod(1) / union


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return the boxes that overlap none of a higher score: torchvision's operator, in Python."""
    rest, kept = scores.argsort(descending=True, stable=True), []
    while len(rest):
        kept.append(rest[0])
        rest = rest[1:][_iou(boxes[rest[0]], boxes[rest[1:]]) <= iou_threshold]
    return torch.stack(kept) if kept else scores.new_empty(0, dtype=torch.long)


@pytest.fixture(scope="module")
def models(torchvision):
    """Its models, with operators where the installed wheel has none for this torch."""
    from torchvision import models, ops
    from torchvision.extension import _has_ops

    if _has_ops():
        yield models
        return
    with pytest.MonkeyPatch.context() as patch:
        boxes, roi_align = (
            importlib.import_module(f"torchvision.ops.{name}") for name in ("boxes", "roi_align")
        )
        patch.setattr(boxes, "nms", _nms)
        patch.setattr(ops, "nms", _nms)
        align = roi_align._roi_align  # its own definition in Python, which it compiles when called
        patch.setattr(roi_align, "_roi_align", align.__wrapped__)
        yield models


def images(n: int = 2, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.double)


def peer(models, norm: str = "batch", block: str = "BasicBlock") -> nn.Module:
    """A ResNet of torchvision's with one block per stage."""
    from torchvision.ops import FrozenBatchNorm2d

    norms = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}
    options = {"norm_layer": norms[norm], "num_classes": 5}
    blocks = getattr(models.resnet, block)
    return randomize(models.resnet.ResNet(blocks, (1,) * 4, **options)).double()


def accelerated(net: nn.Module) -> nn.Module:
    return vertebra.accelerate(copy.deepcopy(net))


def our_twin(net: nn.Module) -> nn.Module:
    """Ours, with the peer's weights and norms."""
    is_frozen = not isinstance(net.bn1, nn.BatchNorm2d)
    is_basic = type(net.layer1[0]).__name__ == "BasicBlock"
    model = vertebra.create_model(
        "resnet18" if is_basic else "resnet50",
        layers=(1,) * 4,
        num_classes=5,
        norm_layer="frozenbatchnorm2d" if is_frozen else None,
    ).double()
    load_weights(model, net.state_dict())
    return model


BODIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "accelerated": accelerated,
    "ours": our_twin,
}


@pytest.fixture(params=BODIES)
def body(request) -> Callable[[nn.Module], nn.Module]:
    return BODIES[request.param]


def assert_close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ops(model: nn.Module, x: Tensor) -> Counter[str]:
    return Counter(site.op for site in vertebra.explain(model, x, bandwidth=1e9))


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_intermediate_layer_getter(body, norm, models):
    from torchvision.models._utils import IntermediateLayerGetter

    net = peer(models, norm)
    for wanted in (("layer1", "layer4"), ("relu", "layer2"), ("bn1",), ("maxpool",)):
        layers = {name: name for name in wanted}
        expected = IntermediateLayerGetter(copy.deepcopy(net), layers)
        found = IntermediateLayerGetter(body(net), layers)
        x = images()
        for training in (True, False):
            assert_close(found.train(training)(x), expected.train(training)(x))
    inside = vertebra.accelerate(IntermediateLayerGetter(copy.deepcopy(net), {"layer1": "0"}))
    assert isinstance(inside, Swapped | IntermediateLayerGetter)
    assert ops(inside.eval(), x) == {"batch_norm_act_pool": 1, "scale_bias_act": 2}
    expected = IntermediateLayerGetter(net, {"layer1": "0"}).eval()
    assert_close(inside(x), expected(x))
    seen = []
    inside["relu"].register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    inside["maxpool"].register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    assert_close(inside(x), expected(x))
    y = expected["relu"](expected["bn1"](expected["conv1"](x)))
    assert_close(seen, [y, expected["maxpool"](y)])


FX = {
    "resnet18": ("layer2", "layer4.0.bn2", "avgpool"),
    "regnet_y_400mf": ("trunk_output.block1", "trunk_output.block2.block2-0.f", "avgpool"),
    "convnext_tiny": ("features.1", "features.3.0", "avgpool"),
}


@pytest.mark.parametrize("name", FX)
def test_feature_extraction(name, models):
    """Names of modules name the same features, in both modes, of torchvision's models and ours."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    net = randomize(getattr(models, name)(num_classes=5)).double()
    twin = accelerated(net)
    train, evaluate = get_graph_node_names(twin)
    assert train == evaluate
    wanted = list(FX[name])
    expected = create_feature_extractor(net, wanted)
    found = create_feature_extractor(twin, wanted)
    x = images()
    assert_close(found.eval()(x), expected.eval()(x))
    if name != "convnext_tiny":  # which drops paths at random
        assert_close(found.train()(x), expected.train()(x))
    for name, value in found.state_dict().items():
        assert_close(value, expected.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("resnet18", ["relu", "layer2", "layer4.1.conv2", "fc"]),
        ("seresnet18", ["layer1", "layer4.0.se"]),
        ("regnety_002", ["stem", "trunk_output.block2", "avgpool"]),
        ("convnext_atto", ["stem", "stages.1.blocks.0", "head.fc"]),
    ],
)
def test_feature_extraction_of_ours(name, wanted):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = randomize(vertebra.create_model(name, num_classes=5)).double().eval()
    train, evaluate = get_graph_node_names(model)
    assert train == evaluate
    extractor = create_feature_extractor(copy.deepcopy(model), wanted).eval()
    seen: dict[str, Tensor] = {}

    def see(key: str) -> None:
        module = model.get_submodule(key)
        module.register_forward_hook(lambda module, args, y: seen.__setitem__(key, y.clone()))

    for key in wanted:
        see(key)
    x = images(1)
    model(x)
    assert_close(extractor(x), seen)


MODES = ("train", "test")


def detector(models, kind: str, net: nn.Module) -> nn.Module:
    """A reference model on a ResNet, with as few and small boxes as it takes."""
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    extra = LastLevelP6P7(16, 16) if kind == "RetinaNet" else None
    widths = [net.layer1[0].conv1.out_channels * scale for scale in (1, 2, 4, 8)]
    expansion = net.fc.in_features // widths[-1]
    widths = [width * expansion for width in widths]
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(net, layers, widths, 16, extra)
    sizes = ((8,), (16,), (32,), (64,), (96,), (128,))[: 6 if kind == "RetinaNet" else 5]
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    options = {"num_classes": 3, "min_size": 64, "max_size": 64}
    few = {f"rpn_{when}_nms_top_n_{mode}": 8 for when in ("pre", "post") for mode in MODES}
    few |= {"box_batch_size_per_image": 4, "box_score_thresh": 0.0}
    if kind == "RetinaNet":
        options |= {"anchor_generator": anchors, "score_thresh": 0.0, "topk_candidates": 20}
    else:
        options |= {"rpn_anchor_generator": anchors, **few, "box_detections_per_img": 4}
    return getattr(detection, kind)(backbone, **options).double()


@pytest.mark.parametrize(
    "kind",
    ["FasterRCNN", "RetinaNet", pytest.param("MaskRCNN", marks=pytest.mark.thorough)],
)
def test_detectors(kind, body, models):
    """Losses, gradients and detections, on a frozen body as the reference models have it."""
    net = peer(models, "frozen")
    expected = detector(models, kind, copy.deepcopy(net))
    found = detector(models, kind, our_twin(net)) if body is our_twin else copy.deepcopy(expected)
    found.load_state_dict(expected.state_dict())
    vertebra.accelerate(found)
    assert any(isinstance(module, Swapped) for module in found.modules())
    targets = [
        {
            "boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0]]).double(),
            "labels": torch.tensor([1, 2]),
            "masks": torch.randint(2, (2, 64, 64), dtype=torch.uint8),
        }
    ] * 2
    x = list(images().sigmoid())
    losses = []
    for model in (found, expected):
        torch.manual_seed(1)  # which boxes are sampled
        loss = model.train()(x, targets)
        sum(loss.values()).backward()
        losses.append({name: value.detach() for name, value in loss.items()})
    assert_close(*losses)
    assert len(losses[0]) >= 2
    peers = gradients(expected)
    assert gradients(found).keys() == peers.keys()
    for name, value in gradients(found).items():
        assert relative_error(value, peers[name]) < 1e-6, name
    with torch.no_grad():
        detections, expectations = (model.eval()(x) for model in (found, expected))
    assert_close(detections, expectations)
    assert sum(len(one["boxes"]) for one in detections) > 4


def test_the_reference_detector_whole(models):
    """Torchvision's own builder, with its stem in one op, and nothing left out."""
    model = models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    expected = copy.deepcopy(model.eval())
    body = vertebra.accelerate(model).backbone.body
    x = images(1).float()
    assert ops(body, x) == {"batch_norm_act_pool": 1, "scale_bias_act": 48}
    assert relative_error(body(x)["3"], expected.backbone.body(x)["3"]) < 2e-5
    left = {site.reason for site in vertebra.interop.report(model)} - {None}
    assert left == {"it is not a convolution, a norm and perhaps an activation"}  # FPN and RPN


@pytest.mark.parametrize("kind", ["FCN", "DeepLabV3"])
def test_segmenters(kind, body, models):
    from torchvision.models import segmentation
    from torchvision.models._utils import IntermediateLayerGetter

    net = peer(models, block="Bottleneck")
    layers = {"layer4": "out", "layer3": "aux"}

    def segmenter(net: nn.Module) -> nn.Module:
        heads = {"FCN": segmentation.fcn.FCNHead, "DeepLabV3": segmentation.deeplabv3.DeepLabHead}
        return getattr(segmentation, kind)(
            IntermediateLayerGetter(net, layers),
            heads[kind](2048, 3),
            segmentation.fcn.FCNHead(1024, 3),
        ).double()

    expected = randomize(segmenter(copy.deepcopy(net)))
    found = segmenter(body(net))
    found.load_state_dict(expected.state_dict())
    vertebra.accelerate(found)
    x = images()
    outputs = []
    for model in (found, expected):
        torch.manual_seed(1)  # dropout
        y = model.train()(x)
        sum(value.square().mean() for value in y.values()).backward()
        outputs.append(y)
    assert_close(*outputs)
    peers = gradients(expected)
    assert gradients(found).keys() == peers.keys()
    for name, value in gradients(found).items():
        assert relative_error(value, peers[name]) < 1e-6, name
    assert_close(found.eval()(x), expected.eval()(x))
