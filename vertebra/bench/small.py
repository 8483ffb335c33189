"""The peers' models, small: one of every kind of network, for tests of whatever runs them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import peers

_HF: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}


def _torchvision(name: str) -> nn.Module:
    convnext, regnet, resnet = (
        peers.torchvision_module(f"models.{family}") for family in ("convnext", "regnet", "resnet")
    )
    if name in ("BasicBlock", "Bottleneck"):
        return resnet.ResNet(getattr(resnet, name), (1,) * 4, num_classes=5)
    if name == "convnext":
        stages = [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)]
        return convnext.ConvNeXt(stages, num_classes=5)
    options = {"se_ratio": 0.25} if name == "regnet_y" else {}
    blocks = regnet.BlockParams([1, 1], [8, 16], [4, 4], [1.0, 1.0], [2, 2], **options)
    return regnet.RegNet(blocks, num_classes=5)


def _timm(name: str) -> nn.Module:
    models = peers.timm().models
    convnext, regnet, resnet = models.convnext, models.regnet, models.resnet
    if name in ("BasicBlock", "Bottleneck", "seresnet"):
        block = resnet.Bottleneck if name == "seresnet" else getattr(resnet, name)
        options: dict[str, Any] = {"channels": (8, 8, 8, 8), "num_classes": 5}
        attention = {"attn_layer": "se"} if name == "seresnet" else {}
        return resnet.ResNet(block, (1,) * 4, block_args=attention, **options)
    if name == "regnet":
        shape = {"depth": 4, "w0": 8, "wa": 8, "wm": 1.7, "group_size": 4, "stem_width": 8}
        return regnet.RegNet(regnet.RegNetCfg(**shape, se_ratio=0.25), num_classes=5)
    v2 = {"use_grn": True, "ls_init_value": None} if name == "convnextv2" else {}
    return convnext.ConvNeXt(depths=(1,) * 4, dims=(8,) * 4, num_classes=5, **v2)


class Logits(nn.Module):
    """A model of transformers that returns a tensor, as the others do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits alone."""
        return self.model(x).logits


def _transformers(name: str) -> nn.Module:
    transformers = peers.transformers()
    family, _, kind = name.partition(" ")
    stem = {} if family.startswith("ConvNext") else {"embedding_size": 8, "layer_type": kind}
    stem |= {"num_stages": 2} if family.startswith("ConvNext") else {}
    stem |= {"groups_width": 4} if family == "RegNet" else {}
    config = getattr(transformers, f"{family}Config")(**stem, **_HF)
    return Logits(getattr(transformers, f"{family}ForImageClassification")(config))


_BUILD: dict[str, tuple[Callable[[str], nn.Module], tuple[str, ...]]] = {
    "torchvision": (
        *(_torchvision,),
        ("BasicBlock", "Bottleneck", "regnet_x", "regnet_y", "convnext"),
    ),
    "timm": (
        *(_timm,),
        ("BasicBlock", "Bottleneck", "seresnet", "regnet", "convnext", "convnextv2"),
    ),
    "transformers": (
        *(_transformers,),
        ("ResNet basic", "ResNet bottleneck", "RegNet x", "RegNet y", "ConvNext", "ConvNextV2"),
    ),
}
MEMBERS = [f"{library}: {name}" for library, (_, names) in _BUILD.items() for name in names]


def build(member: str) -> nn.Module:
    """Build one of `MEMBERS`, in which nothing is dropped."""
    library, _, name = member.partition(": ")
    model = _BUILD[library][0](name)
    for module in model.modules():
        for drop in ("p", "drop_prob"):  # drops would be others
            if hasattr(module, drop):
                setattr(module, drop, 0.0)
    return model
