"""`fuse`: a copy of a model for inference, its norms folded into the convolutions before them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import backend
from ..nn import ConvNormActs, ConvNorms, FusedConv2d, FusedLinear, MlpNames
from ..nn._act import fusible_act, has_hooks
from ..nn._drop import is_idle
from ..nn.back_to_back import BackToBack, has_neighbours
from ..nn.conv_same import Conv2dSame
from ..nn.cuda_graph import CudaGraphs
from ..nn.fused import Folded, FoldedAct, FusedConv2dSame, epilogue
from ..nn.fused_blocks import FusedBlocks, Recorded, passes_on
from ..nn.norm_act import FrozenBatchNorm2d, FusesAct, is_bare
from ..nn.sync import SyncBatchNormAct2d
from ._fold import fold, fold_image, scale_of
from ._swap import Swapped, path_of
from .accelerate import Site, swap_all

Values = float | Sequence[float]


@torch.inference_mode(False)
@torch.no_grad()
def fuse(
    model: nn.Module,
    *,
    mean: Values | None = None,
    std: Values | None = None,
    pack_weights: bool = True,
    cuda_graph: bool = False,
) -> nn.Module:
    """Return a copy of `model` for inference, in which a convolution runs all that follows it.

    Batch norms are folded into the convolutions before them, layer scale into the linear layer, in
    double precision; bias, residual add and activation run in the epilogue. The copy has a
    `weight` and a `bias` where there were a convolution and a norm, in channels_last; it is a
    module like any other, with classes and attributes of `model`, and its parameters want no
    gradient. `model` is left as it is, and may be of any library that `accelerate` knows.

    What cannot be fused runs as it did; `vertebra.explain` and `unfused` say why.

    Args:
        model: in eval mode.
        mean: of the images' channels, if `model` is to normalise them: it then takes images that
            are not, and computes (x - mean) / std in its first convolution.
        std: goes with mean.
        pack_weights: on CPUs, keep a copy of each weight as oneDNN wants it: as much memory again,
            and up to twice the speed for few and small images.
        cuda_graph: replay CUDA graphs, one per shape of input (`vertebra.nn.CudaGraphs`).

    Raises:
        ValueError: the model is in training mode; a norm to fold has no running statistics; the
            image is not read by one convolution alone, which could normalise it; there is no GPU to
            capture graphs on.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> fuse(model)
    Sequential(
      (0): FusedConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), act=relu)
      (1): Folded(8)
      (2): Identity()
    )
    """
    _check_mode(model)
    _check_device(model, cuda_graph)
    image = _image_values(mean, std)
    fused = swap_all(copy.deepcopy(model), fused=True).requires_grad_(False)
    users = _Users(fused)
    for pair in list(_pairs(fused)):
        if _refuses_pair(pair, users) is None:
            _fuse_pair(pair)
    for block in list(fused.modules()):
        _fuse_mlp(block, users)
    for module in fused.modules():
        _fuse_conv(module)
        if isinstance(module, (FusedConv2d, FusedLinear)) and not pack_weights:
            module.packs = False
        if isinstance(module, Swapped):
            module.stays = True
    for module in list(fused.modules()):
        _fuse_act(module, users)
        if passes_on(module):
            module.__class__ = BackToBack if has_neighbours(module) else FusedBlocks
        if isinstance(module, Recorded) and _is_as_written(module):
            module.is_recorded = True
    if image is not None:
        fold_image(_find_image_conv(fused, len(image[0])), *image)
    return CudaGraphs(fused) if cuda_graph else fused


def unfused(model: nn.Module) -> list[Site]:
    """Return the batch norms that `fuse` has left in a model that it made, each with the reason."""
    users = _Users(model)
    reasons = {id(pair.norm): _refuses_pair(pair, users) for pair in _pairs(model)}
    alone = "no convolution that this version knows of comes right before it"
    return [
        Site(name, path_of(type(module)), reasons.get(id(module)) or alone)
        for name, module in model.named_modules()
        if _is_batch_norm(module)
    ]


# ---------------------------------------------------------------------------------- what is refused


def _check_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                "fuse makes a model for inference, and "
                f"{f'{name!r} of this one' if name else 'this one'} is in training mode; "
                "call model.eval() first"
            )


def _check_device(model: nn.Module, cuda_graph: bool) -> None:
    devices = {p.device for p in model.parameters()}
    if any(device.type == "meta" for device in devices):
        raise ValueError(
            "fuse computes weights, and the model's are on the meta device; load them first"
        )
    if cuda_graph and {device.type for device in devices} != {"cuda"}:
        kinds = ", ".join(sorted({device.type for device in devices})) or "no device"
        raise ValueError(
            f"cuda_graph=True replays work of a GPU, and the model is on {kinds}; move it with "
            '.to("cuda") first, or leave cuda_graph out'
        )


def _image_values(
    mean: Values | None, std: Values | None
) -> tuple[Sequence[float], Sequence[float]] | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError("mean and std belong together: give both, or neither")
    means = [mean] if isinstance(mean, (int, float)) else list(mean)
    stds = [std] if isinstance(std, (int, float)) else list(std)
    if len(means) != len(stds) or not means or min(stds) <= 0:
        raise ValueError(
            "mean and std must have one value per channel of the image, and those of std be "
            f"positive; got mean {mean} and std {std}"
        )
    return means, stds


class _Users:
    """How many places the modules and parameters of a model have there."""

    def __init__(self, model: nn.Module) -> None:
        self._things: list[Any] = [
            thing
            for module in model.modules()
            for held in (vars(module)["_modules"], vars(module)["_parameters"])
            for thing in held.values()
            if thing is not None
        ]  # which are kept: what comes later shall have other ids
        self._places = Counter(map(id, self._things))

    def has_several(self, thing: nn.Module | Tensor) -> bool:
        """Return whether a module or a parameter stands in several places."""
        return self._places[id(thing)] > 1

    def shares(self, layer: nn.Module) -> str | None:
        """Return how somebody else has a part in `layer`, None if nobody has."""
        if self.has_several(layer):
            return "stands in several places"
        for name, parameter in layer.named_parameters(recurse=False):
            if self.has_several(parameter):
                return f"has a {name} that another module has too"
        return None


# ------------------------------------------------------------------------- convolutions and norms


class _Pair(NamedTuple):
    """A convolution and the norm that a block runs right behind it, and nowhere else."""

    block: nn.Module
    conv: nn.Module
    norm: Any
    conv_name: str


def _pairs(model: nn.Module) -> Iterator[_Pair]:
    for block in model.modules():
        for conv_name, norm_name in _pair_names(block):
            conv, norm = _child(block, conv_name), _child(block, norm_name)
            while type(conv) in (nn.Sequential, ConvNormActs) and conv and not has_hooks(conv):
                conv = conv[-1]  # a stem of several
            if isinstance(conv, nn.Module) and _is_batch_norm(norm):
                yield _Pair(block, conv, norm, conv_name)


def _pair_names(block: nn.Module) -> ConvNorms:
    if type(block) is nn.Sequential:  # runs its children one after the other, whatever they are
        return tuple(pairwise(vars(block)["_modules"]))  # each place, if one module has several
    return getattr(type(block), "CONV_NORMS", ())


def _child(block: nn.Module, path: str) -> Any:
    """Return what is under a dotted name, None if nothing is."""
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _is_batch_norm(module: Any) -> bool:
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
    return isinstance(module, kinds) or type(module).forward is FrozenBatchNorm2d.forward


def _ends_in_act(norm: nn.Module) -> bool:
    """Return whether `norm` is one of those, known by their forward, that end in an activation."""
    if isinstance(norm, Swapped):
        return hasattr(type(norm), "ENDS_IN_ACT")
    return type(norm).forward in (FusesAct.forward, SyncBatchNormAct2d.forward)


def _refuses_pair(pair: _Pair, users: _Users) -> str | None:
    """Return why a norm is not folded into what comes before it, in words."""
    conv, norm = pair.conv, pair.norm
    if type(conv) not in (*_FUSED, *_FUSED.values()):
        return f"a {path_of(type(conv))} comes before it, and no plain torch.nn.Conv2d"
    if has_hooks(conv) or has_hooks(norm):
        return f"the {'convolution before it' if has_hooks(conv) else 'norm'} is watched by hooks"
    if not (_ends_in_act(norm) or is_bare(norm)):
        return "it computes something else than a batch norm"
    if pair.conv_name in getattr(pair.block, "return_layers", ()):
        return "what the convolution before it returns is asked for"
    shared = users.shares(conv)
    if shared is not None:
        return f"the convolution before it {shared}"
    shared = users.shares(norm)
    return None if shared is None else f"it {shared}"


def _fuse_pair(pair: _Pair) -> None:
    conv: nn.Module = pair.conv
    norm: Any = pair.norm
    if norm.running_mean is None:
        raise ValueError(
            "a norm is folded with its running statistics, and the one behind "
            f"{pair.conv_name!r} of a {type(pair.block).__name__} has none: in eval mode, too, it "
            "normalises by the batch; build it with track_running_stats=True"
        )
    fold(conv, *scale_of(norm))
    channels = len(norm.running_mean)
    if not _ends_in_act(norm) or _leaves_act_to_block(norm):
        _become(norm, Folded(channels))
    else:
        _become(norm, FoldedAct(channels, norm.drop, norm.act))


def _leaves_act_to_block(norm: Any) -> bool:
    """Return whether `norm` is timm's without an activation of its own."""
    is_timms = isinstance(norm, Swapped)
    act, drop = norm.act, norm.drop
    return is_timms and fusible_act(act) == "none" and is_idle(drop)


def _become(module: nn.Module, other: nn.Module) -> None:
    """Make `module` what `other` is, wherever it is held."""
    module.__class__ = type(other)
    module.__dict__ = vars(other.train(module.training))


_FUSED: dict[type[nn.Module], type[FusedConv2d]] = {
    nn.Conv2d: FusedConv2d,
    Conv2dSame: FusedConv2dSame,
}


def _fuse_conv(module: nn.Module) -> None:
    """Let a convolution run what follows it, whether or not a norm was folded into it."""
    kind = _FUSED.get(type(module))
    if kind is not None and not has_hooks(module):
        conv: Any = module
        conv.__class__ = kind
        conv.act = "none"
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        if (left, top) == (right, bottom):
            conv.padding = (top, left)  # and neither "same" nor "valid"
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


def _is_as_written(module: nn.Module) -> bool:
    """Return whether nobody has derived a class from ours, who may do more than compute."""
    return isinstance(module, Swapped) or type(module).__module__.startswith("vertebra.")


def _fuse_act(sequence: nn.Module, users: _Users) -> None:
    """Let the convolutions of a sequence end in the activations that follow their norms there."""
    if type(sequence) is not nn.Sequential or has_hooks(sequence):
        return
    names = list(vars(sequence)["_modules"])
    for conv_name, norm_name, act_name in zip(names, names[1:], [*names[2:], None], strict=False):
        conv, norm = _child(sequence, conv_name), _child(sequence, norm_name)
        if not isinstance(conv, FusedConv2d) or users.shares(conv):
            continue
        if type(norm) is FoldedAct:
            act = epilogue(norm, None, None)
            if act is not None:
                conv.act = act
                _become(norm, Folded(norm.num_features))
        elif type(norm) is Folded and act_name is not None and not has_hooks(norm):
            act = fusible_act(_child(sequence, act_name))
            if act is not None:
                conv.act = act
                sequence.add_module(act_name, nn.Identity().train(sequence.training))


# ----------------------------------------------------------------------------------------- MLPs


def _fuse_mlp(block: nn.Module, users: _Users) -> None:
    """Let the linear layers of an MLP run what follows them, layer scale folded into the last."""
    names: MlpNames | None = getattr(type(block), "MLP", None)
    if names is None or names.refuses(block) is not None:
        return
    layers = [_child(block, names.fc1), _child(block, names.fc2)]
    kinds = (nn.Linear, nn.Conv2d)
    if any(type(fc) not in kinds or has_hooks(fc) or users.shares(fc) for fc in layers):
        return
    for fc in layers:
        if type(fc) is nn.Linear:
            fc.__class__ = FusedLinear
    gamma = None if names.gamma is None else _child(block, names.gamma)
    if gamma is not None and not users.has_several(gamma):
        fold(layers[1], gamma.double().flatten())
        setattr(block, str(names.gamma), None)


# -------------------------------------------------------------------------------------- the image


class _Readers(TorchDispatchMode):
    """Notes the ops that read a tensor, each with its other arguments."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._x = x
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(arg is self._x for arg in args):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def _find_image_conv(model: nn.Module, channels: int) -> FusedConv2d:
    """Return the convolution that reads the image, and that alone, by letting it read one."""
    like = next(model.parameters())
    x = torch.zeros(1, channels, 64, 64, dtype=like.dtype, device=like.device)
    x = x.contiguous(memory_format=torch.channels_last)
    with _Readers(x) as readers, backend("eager"):
        model(x)
    if len(readers.calls) == 1:
        (_, args), *_ = readers.calls
        for module in model.modules():
            if type(module) is not FusedConv2d or module.groups != 1:
                continue
            if any(arg is module.weight for arg in args):
                return module
    found = ", ".join(str(func) for func, _ in readers.calls) or "nothing"
    raise ValueError(
        "mean and std go into the one convolution without groups that reads the image; this "
        f"model's image is read by {found}; normalise the images before"
    )
