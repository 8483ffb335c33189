"""What all families share: an image goes through a stem, stages and a head; features may leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import (
    CheckpointSequential,
    Unit,
    conv_norm_act,
    create_global_pool,
    ends_in_pool,
    pooled_channels,
    run_into_pool,
    takes_pool,
)
from ._features import FeatureInfo, Indices, take_indices
from ._param_groups import Matcher


def _check_image(x: Tensor, channels: int | None, family: str) -> None:
    if x.dim() != 4 or (channels is not None and x.shape[1] != channels):
        raise ValueError(
            f"a {family} takes images of shape (N, {channels or 'C'}, H, W), got {tuple(x.shape)}; "
            "add the batch with x[None], or build the model with in_chans=<channels of the image>"
        )


torch.fx.wrap("_check_image")  # a leaf: it looks at a shape, which a proxy does not have


class Network(nn.Module):
    """A backbone and its classifier: what ResNet, RegNet and ConvNeXt derive from.

    A family says what its stem is and where its stages are. Its head is the one that ResNet and
    RegNet have in torchvision: pool (`avgpool`), dropout, a linear layer (`fc`); ConvNeXt has its
    own.

    Attributes:
        config: what it was built from, a frozen dataclass.
        family: "resnet", "regnet" or "convnext".
        stage_names: the stages, as names of submodules.
        stem_is_feature: whether feature 0 is the stem's, and feature 1 that of the first stage.
        in_chans: channels of the image.
        num_classes: outputs of the classifier; 0 for none.
        num_features: channels of the last feature map.
        head_hidden_size: channels that the classifier reads.
        feature_info: the feature maps, as timm numbers and describes them: one dict each. After
            `keep_features`, a `FeatureInfo`.
        out_indices: after `keep_features`, the features that `forward` returns; else None.
    """

    family: str
    stem_is_feature = True
    stage_names: tuple[str, ...]
    feature_info: list[dict[str, Any]] | FeatureInfo
    avgpool: nn.Module
    fc: nn.Module

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.in_chans: int = config.in_chans
        self.num_classes: int = config.num_classes
        self.num_features: int = config.channels[-1]
        self.drop_rate: float = config.drop_rate
        self.out_indices: tuple[int, ...] | None = None

    # ------------------------------------------------------------------------ what a family says

    @property
    def stem_conv(self) -> nn.Module:
        """The layer that reads the image."""
        raise NotImplementedError

    def forward_stem(self, x: Tensor) -> Tensor:
        """Return what enters the first stage."""
        raise NotImplementedError

    def forward_first_feature(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature map of the stem, and what enters the first stage."""
        x = self.forward_stem(x)
        return x, x

    @property
    def has_neck(self) -> bool:
        """Whether `forward_neck` computes anything."""
        return False

    def forward_neck(self, x: Tensor) -> Tensor:
        """Return the last feature map, from what leaves the last stage."""
        return x

    def neck_unit(self) -> Unit | None:
        """Return the convolution that `forward_neck` is, and what follows it; None if it is not."""
        return None

    def make_feature_norm(self, channels: int) -> nn.Module | None:
        """Return the norm that transformers' backbone puts behind a feature map, if any."""
        return None

    def state_channels(self) -> list[int]:
        """Return the channels of what leaves the stem and each stage."""
        return [self.config.stem_channels, *self.config.channels[: len(self.stage_names)]]

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """Return which layer each parameter belongs to, a block or if `coarse` a stage, as timm."""
        raise NotImplementedError

    def drop_neck(self) -> None:
        """Make `forward_neck` return what it is given."""

    def drop_head(self) -> None:
        """Make `forward_head` return what it is given."""
        self.reset_classifier(0, "")

    # -------------------------------------------------------------------------------- the passage

    def list_stages(self) -> list[nn.Module]:
        """Return the stages, in order."""
        return [self.get_submodule(name) for name in self.stage_names]

    def _check_image(self, x: Tensor) -> None:
        conv = self.stem_conv
        channels = conv.weight.shape[1] if isinstance(conv, nn.Conv2d) else None
        _check_image(x, channels, type(self).__name__)

    def forward_states(self, x: Tensor) -> list[Tensor]:
        """Return what leaves the stem and each stage: transformers' hidden states."""
        self._check_image(x)
        states = [self.forward_stem(x)]
        for stage in self.list_stages():
            states.append(stage(states[-1]))
        return states

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, (N, num_features, H', W')."""
        return self.forward_neck(self._run_stages(x))

    def _run_stages(self, x: Tensor) -> Tensor:
        self._check_image(x)
        x = self.forward_stem(x)
        for stage in self.list_stages():
            x = stage(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last feature map and the wanted ones before it, with timm's arguments.

        Args:
            x: the images.
            indices: numbers of the wanted features, or how many last ones; None for all.
            norm: pass the last stage's feature through the norm that follows the stages, if any.
            stop_early: compute nothing after the last wanted feature, which comes back as the last.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW'; got {output_fmt!r}")
        count = len(self.feature_info)
        wanted = take_indices(count, indices)
        if wanted[-1] >= self.stem_is_feature + len(self.stage_names):
            raise ValueError(f"feature {wanted[-1]} is wanted, and its stage was pruned")
        found: list[Tensor] = []
        self._check_image(x)
        if self.stem_is_feature and 0 in wanted:
            feature, x = self.forward_first_feature(x)
            found.append(feature)
        else:
            x = self.forward_stem(x)
        for i, stage in enumerate(self.list_stages(), int(self.stem_is_feature)):
            if stop_early and i > wanted[-1]:
                break
            x = stage(x)
            is_last = i == count - 1
            if i in wanted:
                found.append(self.forward_neck(x) if norm and is_last else x)
            if is_last and not intermediates_only:
                x = self.forward_neck(x)
        return found if intermediates_only else (x, found)

    def forward_pool(self, x: Tensor) -> Tensor:
        """Return a feature map pooled, (N, C, 1, 1): transformers' pooler output."""
        return self.avgpool(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a feature map, or with `pre_logits` what the classifier reads."""
        return self._read_out(self.forward_pool(x), pre_logits)

    def _read_out(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.config.global_pool:
            x = x.flatten(1)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Any:
        if self.out_indices is not None:
            return self.forward_intermediates(
                x, self.out_indices, stop_early=True, intermediates_only=True
            )
        pool = getattr(self, "avgpool", None)
        if pool is not None and self.stage_names:
            last, neck = self.get_submodule(self.stage_names[-1]), self.neck_unit()
            if not self.has_neck and ends_in_pool(last, pool, x):
                return self._read_out(self._forward_into_pool(last, x))
            if neck is not None and takes_pool(neck, pool, x):
                conv, norm, act, _ = neck
                x = self._run_stages(x)
                return self._read_out(conv_norm_act(conv, norm, x, act, pool=pool))
        return self.forward_head(self.forward_features(x))

    def _forward_into_pool(self, last: nn.Module, x: Tensor) -> Tensor:
        """Return what `forward_pool` makes of the last feature map, which `last` need not write."""
        self._check_image(x)
        x = self.forward_stem(x)
        for stage in self.list_stages()[:-1]:
            x = stage(x)
        return run_into_pool(last, self.avgpool, x)

    # ------------------------------------------------------------------------------ the classifier

    def _make_head(self, global_pool: str) -> None:
        self.head_hidden_size = pooled_channels(global_pool, self.num_features)
        if self.num_classes and not global_pool:
            raise ValueError(
                "a classifier reads pooled features; give a global_pool, or num_classes=0"
            )
        self.avgpool = create_global_pool(global_pool)
        has_classifier = self.num_classes > 0
        self.fc = (
            nn.Linear(self.head_hidden_size, self.num_classes) if has_classifier else nn.Identity()
        )

    def get_classifier(self) -> nn.Module:
        """Return the classifier, `nn.Identity` where there is none."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place of the present one; 0 for none.

        Args:
            num_classes: its outputs.
            global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none, where there is no
                classifier; None for what it is now.
        """
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config = replace(self.config, num_classes=num_classes, global_pool=pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self._make_head(pool)
        for module in (self.avgpool, self.fc):
            module.to(like.device, like.dtype).train(self.training)

    # ------------------------------------------------------------------------------- the features

    def keep_features(self, out_indices: Indices = None) -> None:
        """Make the network a feature extractor: `forward` returns a list of feature maps.

        What comes after the last one is dropped, the classifier first. The keys of what stays do
        not change. `create_model(..., features_only=True)` calls this.
        """
        if isinstance(self.feature_info, FeatureInfo):
            raise ValueError(f"the model returns features {self.out_indices} already")
        info = FeatureInfo(self.feature_info, out_indices)
        self.prune_intermediate_layers(info.out_indices, prune_norm=True)
        self.feature_info, self.out_indices = info, info.out_indices

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted feature, and the head; return what is wanted.

        Args:
            indices: as `forward_intermediates` takes them.
            prune_norm: drop the norm after the last stage even if that stays.
            prune_head: drop the head even if the last stage stays.
        """
        wanted = take_indices(len(self.feature_info), indices)
        kept = wanted[-1] + 1 - self.stem_is_feature
        dropped = self.stage_names[kept:]
        for name in dropped:
            parent, _, child = name.rpartition(".")
            delattr(self.get_submodule(parent), child)
        self.stage_names = self.stage_names[:kept]
        if dropped:
            self.num_features = self.feature_info[wanted[-1]]["num_chs"]
        if dropped or prune_norm:
            self.drop_neck()
        if dropped or prune_head:
            self.drop_head()
        return wanted

    # ------------------------------------------------------------------------------- the training

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep of each block its input alone, and compute the rest again in the backward pass.

        Memory for time: the gradients are the same, random numbers too, and the statistics of batch
        norms count each batch once.
        """
        for module in self.modules():
            if isinstance(module, CheckpointSequential):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters that should not decay, beside vectors: none, as in timm."""
        return set()
