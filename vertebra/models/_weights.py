"""Loading of weights: read, unwrap, rename, fit to the model, check every key, and only then copy.

A checkpoint has the keys of the model itself, or those of a library in `_layouts`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._fitting import COUNTER, classifier_of, differences, explain, reshape, stem_of
from ._hub import download, in_folder, is_repository
from ._layouts import check_options, export, recognise
from ._network import Network
from ._pretrained import Weights, get_weight

Source = str | os.PathLike[str] | Mapping[str, Any] | Weights

_WRAPPERS = ("state_dict", "model", "model_ema")  # what training scripts file the weights under
_PREFIXES = ("module.", "network.")  # of DDP; of the heads around our networks


def export_weights(model: Network, layout: str) -> dict[str, Tensor]:
    """Return the weights of `model` as another library names and shapes them.

    Args:
        model: built by `create_model` or a builder of this package.
        layout: "torchvision", "timm", "transformers", or for ConvNeXt "original".

    Raises:
        ValueError: there is no such layout, or that library cannot build the network.

    >>> from vertebra import create_model
    >>> list(export_weights(create_model("resnet18"), "transformers"))[0]
    'resnet.embedder.embedder.convolution.weight'
    """
    check_options(model.config, model.family, layout)
    return export(model.state_dict(), model.family, layout)


def load_weights(model: Network, source: Source, *, keep_classifier: bool | None = None) -> None:
    """Load a checkpoint into `model`, completely or not at all.

    Args:
        model: built by `create_model` or a builder of this package.
        source: a `.safetensors` file, a file of `torch.save` (read with `weights_only=True`), a
            folder of `save_pretrained`, a state dict, a `Weights` member or its full name, or the
            id of a repository on the Hugging Face hub ("timm/resnet50.a1_in1k"). The weights have
            the names that torchvision, timm, transformers, the original ConvNeXt or this package
            give them, may lie under "state_dict", "model" or "model_ema", and their names may
            carry the prefixes of DDP, of `torch.compile` and of the heads around our networks.
        keep_classifier: leave the model's classifier as it is and load the rest. None does so for
            published weights (a member, the hub) of another number of classes, which are a start
            for training; a file of yours that does not fit is an error. A model built with
            `num_classes=0` has no classifier and takes the rest anyway.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or weights that do not fit; the model is then
            unchanged. A stem for RGB images is adapted to the model's `in_chans`.
    """
    own = model.state_dict()
    if any(value.is_meta for value in own.values()):
        raise ValueError(
            "the model must have memory to copy weights into, and it is on the meta device; "
            "call model.to_empty(device=...) first"
        )
    is_published = False
    if not isinstance(source, Mapping):
        found = find(source)
        is_published = found.is_published
        source = read(found.path)
    classifier, has_classifier = classifier_of(model)
    last = f"{classifier}weight"
    weights = _renamed(model, source, own)
    if keep_classifier is None:
        keep_classifier = is_published and last in own and last in weights
        keep_classifier = keep_classifier and len(own[last]) != len(weights[last])
    if keep_classifier or not has_classifier:
        weights = {key: value for key, value in weights.items() if not key.startswith(classifier)}
        weights |= {key: value for key, value in own.items() if key.startswith(classifier)}
    stem = stem_of(model)
    if stem in weights:
        weights[stem] = _adapt_stem(weights[stem], own[stem].shape[1])
    if unfit := differences(own, weights):
        raise ValueError(explain(unfit, classifier, weights))
    model.load_state_dict({key: weights.get(key, value) for key, value in own.items()})


def fit_weights(model: Network, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a state dict of any layout with the keys and shapes of `model`.

    For loaders of other libraries, which see to the two that may differ themselves: the weight that
    reads the image, and the classifier.

    Raises:
        ValueError: others differ.
    """
    own = model.state_dict()
    found = _renamed(model, weights, own)
    classifier, _ = classifier_of(model)
    stem = stem_of(model)
    unfit = {
        key: difference
        for key, difference in differences(own, found).items()
        if key != stem and not key.startswith(classifier)
    }
    if unfit:
        raise ValueError(explain(unfit, classifier, found))
    counters = {key: value for key, value in own.items() if key.endswith(COUNTER)}
    known = {key: w for key, w in found.items() if key in own or not key.endswith(COUNTER)}
    return {**counters, **known}


def _renamed(
    model: Network, source: Mapping[str, Any], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the names of `model`, and where it can in shape."""
    classifier, _ = classifier_of(model)
    # known even where it is left out
    known = {*own, f"{classifier}weight", f"{classifier}bias"}
    return reshape(recognise(known, unwrap(source), model.family), own)


class Found(NamedTuple):
    """The file that weights are in, and whose they are: a member's, a repository's, your own."""

    path: Path
    member: Weights | None = None
    repository: str | None = None

    @property
    def is_published(self) -> bool:
        """Whether they are a start for other tasks, not what you have made for this one."""
        return self.member is not None or self.repository is not None


def find(source: str | os.PathLike[str] | Weights) -> Found:
    """Return the file with the weights, fetched if need be."""
    if isinstance(source, Weights):
        return Found(source.download(), member=source)
    name = os.fspath(source)
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if path.exists():
        return Found(in_folder(path) if path.is_dir() else path)
    if "_Weights." in name:
        return find(get_weight(name))
    repository = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if repository != name or is_repository(name):
        return Found(download(repository), repository=repository)
    raise FileNotFoundError(f"weights: there is no file {path}")


def read(path: Path) -> Mapping[str, Any]:
    """Return what a file of weights holds."""
    try:
        content = _load(path)
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # every reader has its own for a file it cannot make sense of
        raise ValueError(
            f"{path} must be a safetensors file, or hold a state dict of tensors and nothing else; "
            f"save it again with torch.save(model.state_dict(), path). The reader says: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a state dict; got {type(content).__name__}")
    return cast("Mapping[str, Any]", content)


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # not needed for anything else

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def unwrap(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights themselves, under the names of the bare model."""
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return unwrap(content[wrapper])
    weights: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"weights must be tensors, got {type(value).__name__} under {key!r}; pass a state "
                f"dict, alone or under one of {', '.join(_WRAPPERS)}"
            )
        key = key.replace("_orig_mod.", "")
        while key.startswith(_PREFIXES):
            key = key.partition(".")[2]
        weights[key] = value
    weights.pop("n_averaged", None)  # the counter of torch.optim.swa_utils.AveragedModel
    return weights


def _adapt_stem(weight: Tensor, channels: int) -> Tensor:
    """Fit the weight of a stem to another number of image channels, by timm's rule.

    One channel gets the sum over all. More get those of RGB in turn, scaled to keep the sum's size.
    """
    if weight.dim() != 4 or weight.shape[1] == channels:
        return weight
    if channels == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    if weight.shape[1] != 3:
        return weight
    repeated = weight.float().repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels]
    return (repeated * (3 / channels)).to(weight.dtype)
