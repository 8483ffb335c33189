"""Our networks as models of transformers: config, backbone, base model and image classifier.

    import vertebra

    vertebra.interop.transformers.register()  # AutoConfig, AutoBackbone, AutoModel, ...

    config = VertebraConfig(architecture="regnet_y_400mf", out_features=["stage2", "stage4"])
    DetrConfig(backbone_config=config, ...)

What they compute is said in `vertebra.models.heads`; this adds what transformers asks of a model:
a config in JSON, `save_pretrained` and `from_pretrained`, its classes of outputs. Keys are those of
the network behind "network.", whichever the class, so that one loads what another has saved.

Imported on demand, by whoever names it; importing it imports transformers.
"""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..models import create_model, heads
from ..models._network import Network
from ..nn import CheckpointSequential

try:
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoModel,
        AutoModelForImageClassification,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
    from transformers.modeling_outputs import (
        BackboneOutput,
        BaseModelOutputWithPoolingAndNoAttention,
        ImageClassifierOutputWithNoAttention,
    )
    from transformers.utils.generic import can_return_tuple
except ImportError as error:
    raise ImportError(
        "vertebra.interop.transformers makes our networks models of transformers, 5.23 or one with "
        f"the same interface; pip install -U transformers ({error})"
    ) from error

__all__ = [
    "VertebraBackbone",
    "VertebraConfig",
    "VertebraForImageClassification",
    "VertebraModel",
    "register",
]


def register() -> None:
    """Make `AutoConfig`, `AutoBackbone` and the other auto classes know "vertebra".

    Doing it again changes nothing.
    """
    AutoConfig.register(VertebraConfig.model_type, VertebraConfig, exist_ok=True)
    AutoBackbone.register(VertebraConfig, VertebraBackbone, exist_ok=True)
    AutoModel.register(VertebraConfig, VertebraModel, exist_ok=True)
    AutoModelForImageClassification.register(
        VertebraConfig, VertebraForImageClassification, exist_ok=True
    )


# what the config says of the classifier and the image in transformers' words
_SAID = {"num_classes": "num_labels", "in_chans": "num_channels"}
# what is a model's to decide, or reads a file
_REFUSED = ("weights", "features_only", "out_indices")


class VertebraConfig(BackboneConfigMixin, PreTrainedConfig):
    """Which network, and what of its features.

    Takes its attributes, and what `transformers.PreTrainedConfig` takes, among that `num_labels` or
    `id2label` for a classifier, `out_features` or `out_indices` for a backbone.

    Attributes:
        architecture: a name of `vertebra.list_models()`.
        num_channels: of the images.
        model_args: further options of `vertebra.create_model`, as JSON has them: an activation or a
            norm goes by its name.

    Raises:
        KeyError: there is no such network.
        TypeError: an option that is no option of the network, or no JSON, or stands in the wrong
            place.
        ValueError: features that there are not, or not in the network's order.
    """

    model_type = "vertebra"

    architecture: str = "resnet50"
    num_channels: int = 3
    model_args: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.model_args = dict(self.model_args or {})
        for name in (*_SAID, *_REFUSED):
            if name in self.model_args:
                instead = f"; give {_SAID[name]} to the config" if name in _SAID else ""
                raise TypeError(f"model_args cannot have {name!r}{instead}")
        misplaced = sorted(self._describe().options & kwargs.keys())
        if misplaced:
            name = misplaced[0]
            place = _SAID.get(name) or f"model_args={{{name!r}: {kwargs[name]!r}}}"
            raise TypeError(f"{name!r} is an option of the network; give {place}")
        self.set_output_features_output_indices(
            kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """All features there are: "stem", then "stage1" and so on."""
        return self._describe().stage_names

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of all stages."""
        return self._describe().num_features[1:]

    def _describe(self) -> _Description:
        return _describe(self.architecture, _to_json(self.model_args or {}))

    def build(self, num_classes: int = 0) -> Network:
        """Build the network, with random weights."""
        return create_model(
            self.architecture,
            num_classes=num_classes,
            in_chans=self.num_channels,
            **(self.model_args or {}),
        )


class _Description:
    """What a config need know of its network, whose weights it has no use for."""

    def __init__(self, network: Network) -> None:
        backbone = heads.Backbone(network)
        self.stage_names = backbone.stage_names
        self.num_features = backbone.num_features
        self.options = {field.name for field in fields(network.config)}


@cache
def _describe(architecture: str, model_args: str) -> _Description:
    with torch.device("meta"):
        return _Description(create_model(architecture, num_classes=0, **json.loads(model_args)))


def _to_json(options: dict[str, Any]) -> str:
    try:
        return json.dumps(options, sort_keys=True)
    except TypeError as error:
        raise TypeError(
            f"model_args is saved as JSON, and {error}; give classes by their names, as "
            "{'act_layer': 'gelu'}"
        ) from error


class VertebraPreTrainedModel(PreTrainedModel):
    """What our models of transformers have in common: a network, and how it comes by its weights.

    A new model has the initial weights that `vertebra.create_model` gives; so has what a checkpoint
    lacks. What only `forward` needs, and no checkpoint holds, is there too.
    """

    config: VertebraConfig
    config_class = VertebraConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = {  # noqa: RUF012 - transformers writes to the instance's
        "BasicBlock",
        "Bottleneck",
        "ResBottleneckBlock",
        "PreActBlock",
        "ConvNeXtBlock",
    }

    network: Network

    def post_init(self) -> None:
        self._awaits_weights = next(self.parameters()).is_meta
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give all that is still empty the values of a new model, at the first call.

        A model with memory has drawn its weights when it was built. `from_pretrained` builds on the
        meta device, fills what the checkpoint has, and then calls this for every module that holds
        something else.
        """
        if not self._awaits_weights:
            return
        self._awaits_weights = False
        empty = {name: value for name, value in _tensors(self).items() if not _is_filled(value)}
        if empty:
            new = _tensors(type(self)(self.config))
            for name, value in empty.items():
                value.copy_(new[name])

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass: `set_grad_checkpointing`."""
        return any(
            module.grad_checkpointing
            for module in self.network.modules()
            if isinstance(module, CheckpointSequential)
        )

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.network.set_grad_checkpointing(enable)

    def _hidden_states(self, output_hidden_states: bool | None) -> bool:
        if output_hidden_states is None:
            return bool(self.config.output_hidden_states)
        return output_hidden_states


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _is_filled(value: Tensor) -> bool:
    return getattr(value, "_is_hf_initialized", False)  # transformers' mark on what it has loaded


class VertebraModel(VertebraPreTrainedModel):
    """`vertebra.models.Model` in transformers: the last feature map, and that pooled."""

    def __init__(self, config: VertebraConfig) -> None:
        super().__init__(config)
        self.network = config.build()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Return the last feature map, that pooled, and the hidden states if wanted."""
        own: Any = self
        hidden = self._hidden_states(output_hidden_states)
        output: Any = heads.Model.forward(own, pixel_values, hidden)
        return BaseModelOutputWithPoolingAndNoAttention(**output)


class VertebraForImageClassification(VertebraPreTrainedModel):
    """`vertebra.models.ForImageClassification` in transformers: logits, and with labels a loss."""

    accepts_loss_kwargs = False  # the loss is a mean over the batch it is given

    def __init__(self, config: VertebraConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.network = config.build(config.num_labels or 0)
        self.post_init()

    compute_loss = heads.ForImageClassification.compute_loss

    @property
    def problem_type(self) -> str | None:
        """The config's; None until the first labels decide."""
        return self.config.problem_type

    @problem_type.setter
    def problem_type(self, value: Any) -> None:
        self.config.problem_type = value

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention:
        """Return the logits, with labels the loss, and the hidden states if wanted."""
        own: Any = self
        hidden = self._hidden_states(output_hidden_states)
        output: Any = heads.ForImageClassification.forward(own, pixel_values, labels, hidden)
        return ImageClassifierOutputWithNoAttention(**output)


class VertebraBackbone(BackboneMixin, VertebraPreTrainedModel):
    """`vertebra.models.Backbone` in transformers: feature maps for detectors and segmenters.

    It has all stages, whichever are returned, and nothing behind the last.
    """

    has_attentions = False

    def __init__(self, config: VertebraConfig) -> None:
        super().__init__(config)
        self.network = config.build()
        self.network.drop_neck()
        self.network.drop_head()
        backbone = heads.Backbone(self.network, config.out_features)
        self.num_features = backbone.num_features
        self.hidden_states_norms = backbone.hidden_states_norms
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BackboneOutput:
        """Return the feature maps of `out_features`, and the hidden states if wanted."""
        own: Any = self
        hidden = self._hidden_states(output_hidden_states)
        output: Any = heads.Backbone.forward(own, pixel_values, hidden)
        return BackboneOutput(**output)
