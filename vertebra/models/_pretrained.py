"""Pretrained weights by name: where they are published, what images they want, what they reach.

`ResNet50_Weights.IMAGENET1K_V2`, `ResNet50_Weights.DEFAULT` and so on are torchvision's names for
torchvision's files; `get_weight` finds them by their full name. Weights on a hub have no member:
pass their id, "timm/resnet50.a1_in1k", to `create_model(..., weights=)`.
"""

from __future__ import annotations

from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._transforms import ImageTransform

_HOST = "https://download.pytorch.org/models/"
_SWAG_LICENSE = "https://github.com/facebookresearch/SWAG/blob/main/LICENSE"


class Published(NamedTuple):
    """What is known of one set of weights."""

    model: str
    file: str
    sha256: str  # its first eight digits, which the file's name ends in
    resize_size: int
    crop_size: int
    interpolation: str
    acc1: float
    acc5: float


class Weights(Enum):
    """The weights of one model; a member is what `weights=` takes.

    Attributes:
        url: where the file is.
        meta: "model", "num_classes", "license" where it is not that of torchvision, and "_metrics":
            published top-1 and top-5 accuracy on ImageNet-1K, in per cent.
    """

    value: Published

    @property
    def url(self) -> str:
        """Where the file is."""
        return _HOST + self.value.file

    @property
    def meta(self) -> dict[str, Any]:
        """What is known of the weights, in torchvision's words."""
        license = {"license": _SWAG_LICENSE} if "SWAG" in self.name else {}
        metrics = {"acc@1": self.value.acc1, "acc@5": self.value.acc5}
        return {
            "model": self.value.model,
            "num_classes": 1000,
            "_metrics": {"ImageNet-1K": metrics},
            **license,
        }

    def transforms(self) -> ImageTransform:
        """Return what prepares an image for the model."""
        return ImageTransform(
            crop_size=self.value.crop_size,
            resize_size=self.value.resize_size,
            interpolation=self.value.interpolation,
        )

    def download(self, progress: bool = True) -> Path:
        """Return the file, from torch's hub folder or fetched there and checked by its hash.

        Raises:
            OSError: it cannot be fetched, or something else was.
        """
        path = Path(torch.hub.get_dir()) / "checkpoints" / self.value.file
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(self.url, str(path), self.value.sha256, progress)
            except (OSError, RuntimeError) as error:
                raise OSError(
                    f"{self} cannot be fetched from {self.url}: {getattr(error, 'reason', error)}; "
                    f"put the file into {path.parent} by other means"
                ) from error
        return path

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


def get_weight(name: str) -> Weights:
    """Return weights by their full name.

    >>> get_weight("ResNet50_Weights.DEFAULT").meta["_metrics"]
    {'ImageNet-1K': {'acc@1': 80.858, 'acc@5': 95.434}}
    """
    enum, _, member = name.partition(".")
    if enum in ENUMS and member in ENUMS[enum].__members__:
        return ENUMS[enum][member]
    if enum in ENUMS:
        known = ", ".join(f"{enum}.{member}" for member in ENUMS[enum].__members__)
        raise ValueError(f"there are no weights {name!r}; there are {known}")
    raise ValueError(
        f"there are no weights {name!r}; names are like ResNet50_Weights.IMAGENET1K_V2, "
        "and the models that have some are listed by list_models(pretrained=True)"
    )


def weights_of(model: str) -> type[Weights] | None:
    """Return the weights published for a model of this name, if any."""
    return next((e for e in ENUMS.values() if e["DEFAULT"].value.model == model), None)


def member_of(model: str, name: str) -> Weights | None:
    """Return the weights of a model that have `name` among its own: "DEFAULT" and the like."""
    published = weights_of(model)
    return published.__members__.get(name) if published else None


# model, torchvision's name for its weights, version, sha256, size resized to, top-1, top-5
_TORCHVISION = """
resnet18 ResNet18 V1 f37072fd 256 69.758 89.078
resnet34 ResNet34 V1 b627a593 256 73.314 91.42
resnet50 ResNet50 V1 0676ba61 256 76.13 92.862
resnet50 ResNet50 V2 11ad3fa6 232 80.858 95.434
resnet101 ResNet101 V1 63fe2227 256 77.374 93.546
resnet101 ResNet101 V2 cd907fc2 232 81.886 95.78
resnet152 ResNet152 V1 394f9c45 256 78.312 94.046
resnet152 ResNet152 V2 f82ba261 232 82.284 96.002
resnext50_32x4d ResNeXt50_32X4D V1 7cdf4587 256 77.618 93.698
resnext50_32x4d ResNeXt50_32X4D V2 1a0047aa 232 81.198 95.34
resnext101_32x8d ResNeXt101_32X8D V1 8ba56ff5 256 79.312 94.526
resnext101_32x8d ResNeXt101_32X8D V2 110c445d 232 82.834 96.228
resnext101_64x4d ResNeXt101_64X4D V1 173b62eb 232 83.246 96.454
wide_resnet50_2 Wide_ResNet50_2 V1 95faca4d 256 78.468 94.086
wide_resnet50_2 Wide_ResNet50_2 V2 9ba9bcbe 232 81.602 95.758
wide_resnet101_2 Wide_ResNet101_2 V1 32ee1156 256 78.848 94.284
wide_resnet101_2 Wide_ResNet101_2 V2 d733dc28 232 82.51 96.02
regnet_x_400mf RegNet_X_400MF V1 adf1edd5 256 72.834 90.95
regnet_x_400mf RegNet_X_400MF V2 62229a5f 232 74.864 92.322
regnet_x_800mf RegNet_X_800MF V1 ad17e45c 256 75.212 92.348
regnet_x_800mf RegNet_X_800MF V2 94a99ebd 232 77.522 93.826
regnet_x_1_6gf RegNet_X_1_6GF V1 e3633e7f 256 77.04 93.44
regnet_x_1_6gf RegNet_X_1_6GF V2 a12f2b72 232 79.668 94.922
regnet_x_3_2gf RegNet_X_3_2GF V1 f342aeae 256 78.364 93.992
regnet_x_3_2gf RegNet_X_3_2GF V2 7071aa85 232 81.196 95.43
regnet_x_8gf RegNet_X_8GF V1 03ceed89 256 79.344 94.686
regnet_x_8gf RegNet_X_8GF V2 2b70d774 232 81.682 95.678
regnet_x_16gf RegNet_X_16GF V1 2007eb11 256 80.058 94.944
regnet_x_16gf RegNet_X_16GF V2 ba3796d7 232 82.716 96.196
regnet_x_32gf RegNet_X_32GF V1 9d47f8d0 256 80.622 95.248
regnet_x_32gf RegNet_X_32GF V2 6eb8fdc6 232 83.014 96.288
regnet_y_400mf RegNet_Y_400MF V1 c65dace8 256 74.046 91.716
regnet_y_400mf RegNet_Y_400MF V2 e6988f5f 232 75.804 92.742
regnet_y_800mf RegNet_Y_800MF V1 1b27b58c 256 76.42 93.136
regnet_y_800mf RegNet_Y_800MF V2 58fc7688 232 78.828 94.502
regnet_y_1_6gf RegNet_Y_1_6GF V1 b11a554e 256 77.95 93.966
regnet_y_1_6gf RegNet_Y_1_6GF V2 0d7bc02a 232 80.876 95.444
regnet_y_3_2gf RegNet_Y_3_2GF V1 b5a9779c 256 78.948 94.576
regnet_y_3_2gf RegNet_Y_3_2GF V2 9180c971 232 81.982 95.972
regnet_y_8gf RegNet_Y_8GF V1 d0d0e4a8 256 80.032 95.048
regnet_y_8gf RegNet_Y_8GF V2 dc2b1b54 232 82.828 96.33
regnet_y_16gf RegNet_Y_16GF V1 9e6ed7dd 256 80.424 95.24
regnet_y_16gf RegNet_Y_16GF V2 3e4a00f9 232 82.886 96.328
regnet_y_16gf RegNet_Y_16GF SWAG_E2E_V1 43afe44d 384 86.012 98.054
regnet_y_16gf RegNet_Y_16GF SWAG_LINEAR_V1 f3ec0043 224 83.976 97.244
regnet_y_32gf RegNet_Y_32GF V1 4dee3f7a 256 80.878 95.34
regnet_y_32gf RegNet_Y_32GF V2 8db6d4b5 232 83.368 96.498
regnet_y_32gf RegNet_Y_32GF SWAG_E2E_V1 04fdfa75 384 86.838 98.362
regnet_y_32gf RegNet_Y_32GF SWAG_LINEAR_V1 e1583746 224 84.622 97.48
regnet_y_128gf RegNet_Y_128GF SWAG_E2E_V1 c8ce3e52 384 88.228 98.682
regnet_y_128gf RegNet_Y_128GF SWAG_LINEAR_V1 cbe8ce12 224 86.068 97.844
convnext_tiny ConvNeXt_Tiny V1 983f1562 236 82.52 96.146
convnext_small ConvNeXt_Small V1 0c510722 230 83.616 96.65
convnext_base ConvNeXt_Base V1 6075fbad 232 84.062 96.87
convnext_large ConvNeXt_Large V1 ea097f82 232 84.414 96.976
"""

# version: what follows the model in the file's name
_VERSIONS = {"V1": "", "V2": "", "SWAG_E2E_V1": "_swag", "SWAG_LINEAR_V1": "_lc_swag"}


def _enums() -> dict[str, type[Weights]]:
    members: dict[str, dict[str, Published]] = defaultdict(dict)
    for line in _TORCHVISION.split("\n")[1:-1]:
        model, name, version, sha256, resized, acc1, acc5 = line.split()
        members[f"{name}_Weights"][f"IMAGENET1K_{version}"] = Published(
            model=model,
            file=f"{model}{_VERSIONS[version]}-{sha256}.pth",
            sha256=sha256,
            resize_size=int(resized),
            crop_size=384 if version == "SWAG_E2E_V1" else 224,
            interpolation="bicubic" if "SWAG" in version else "bilinear",
            acc1=float(acc1),
            acc5=float(acc5),
        )
    enums: dict[str, type[Weights]] = {}
    for name, found in members.items():
        best = "IMAGENET1K_V2" if "IMAGENET1K_V2" in found else next(iter(found))
        build: Any = Weights
        enums[name] = build(name, {**found, "DEFAULT": found[best]}, module=__name__)
    return enums


ENUMS = _enums()
globals().update(ENUMS)  # a member is pickled by the name of its class here
