"""The three heads that transformers puts on a backbone, around any `Network` of this package.

    Model                    the last feature map, and that pooled
    ForImageClassification   logits, and with labels a loss
    Backbone                 feature maps of chosen stages, for detectors and segmenters

`forward` takes `pixel_values` and returns the fields of transformers' outputs, or with
`return_dict=False` a tuple. Hidden states are what leaves the stem and each stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ._network import Network
from ._outputs import BackboneOutput, ClassifierOutput, PooledOutput

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class Model(nn.Module):
    """A network without its classifier.

    `pooler_output` has the shape it has in transformers: (N, C, 1, 1) for ResNet and RegNet, (N, C)
    after the last norm for ConvNeXt.
    """

    main_input_name = "pixel_values"

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> PooledOutput | tuple[object, ...]:
        states = self.network.forward_states(pixel_values)
        last = self.network.forward_neck(states[-1])
        hidden_states = tuple(states) if output_hidden_states else None
        output = PooledOutput(last, self.network.forward_pool(last), hidden_states)
        return output if return_dict else output.to_tuple()


class ForImageClassification(nn.Module):
    """A network with its classifier and the loss that belongs to the labels.

    Args:
        network: built with `num_classes`.
        problem_type: "regression" (mean squared error), "single_label_classification" (cross
            entropy) or "multi_label_classification" (binary cross entropy). None decides at the
            first labels: one class is a regression, integers are single labels, else multi-label.
    """

    main_input_name = "pixel_values"

    def __init__(self, network: Network, problem_type: str | None = None) -> None:
        super().__init__()
        if problem_type is not None and problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, or None; "
                f"got {problem_type!r}"
            )
        self.network = network
        self.problem_type = problem_type

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> ClassifierOutput | tuple[object, ...]:
        states = self.network.forward_states(pixel_values)
        logits = self.network.forward_head(self.network.forward_neck(states[-1]))
        loss = None if labels is None else self.compute_loss(logits, labels)
        hidden_states = tuple(states) if output_hidden_states else None
        output = ClassifierOutput(loss, logits, hidden_states)
        return output if return_dict else output.to_tuple()

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss that belongs to `problem_type`, which the first labels may decide."""
        classes = self.network.num_classes
        if classes == 0:
            raise ValueError("a loss needs a classifier; build the network with num_classes > 0")
        if self.problem_type is None:
            if classes == 1:
                self.problem_type = "regression"
            elif labels.is_floating_point():
                self.problem_type = "multi_label_classification"
            else:
                self.problem_type = "single_label_classification"
        labels = labels.to(logits.device)
        if self.problem_type == "regression":
            if classes == 1:
                logits, labels = logits.squeeze(), labels.squeeze()
            return F.mse_loss(logits, labels)
        if self.problem_type == "single_label_classification":
            return F.cross_entropy(logits.view(-1, classes), labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels)


class Backbone(nn.Module):
    """A network that returns feature maps of chosen stages, RegNet's included.

    A ConvNeXt passes each through a LayerNorm of its own (`hidden_states_norms`).

    Args:
        network: its classifier is not used.
        out_features: names of stages, "stem", "stage1", ..., in this order and each once.
        out_indices: the same by number, negative ones from the end; one of the two is enough, and
            without either it is the last stage.

    Attributes:
        stage_names: all names.
        num_features: channels of all, in order.
        channels: channels of the returned ones.
    """

    main_input_name = "pixel_values"

    def __init__(
        self,
        network: Network,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        stages = [f"stage{i + 1}" for i in range(len(network.stage_names))]
        self.stage_names = ["stem", *stages]
        self.num_features = network.state_channels()
        self.out_features, self.out_indices = self._choose(out_features, out_indices)
        norms = {name: network.make_feature_norm(n) for name, n in self._returned()}
        self.hidden_states_norms = nn.ModuleDict({k: v for k, v in norms.items() if v is not None})

    def _choose(
        self, features: Sequence[str] | None, indices: Sequence[int] | None
    ) -> tuple[list[str], list[int]]:
        names = self.stage_names
        if features is not None:
            if any(name not in names for name in features):
                raise ValueError(f"out_features must be among {names}; got {list(features)}")
            by_name = [names.index(name) for name in features]
            _require_order("out_features", by_name, features)
            if indices is None:
                return list(features), by_name
        if indices is None:
            return names[-1:], [len(names) - 1]
        if any(not -len(names) <= i < len(names) for i in indices):
            raise ValueError(
                f"out_indices must number the stages {names}, from {-len(names)} to "
                f"{len(names) - 1}; got {list(indices)}"
            )
        places = [i % len(names) for i in indices]
        _require_order("out_indices", places, indices)
        found = [names[i] for i in places]
        if features is not None and list(features) != found:
            raise ValueError(
                f"out_features and out_indices must name the same stages; got {list(features)} and "
                f"{list(indices)}, which are {found}"
            )
        return found, places

    def _returned(self) -> list[tuple[str, int]]:
        return [(self.stage_names[i], self.num_features[i]) for i in self.out_indices]

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Channels of every stage, by name."""
        return dict(zip(self.stage_names, self.num_features, strict=True))

    @property
    def channels(self) -> list[int]:
        """Channels of the feature maps that are returned."""
        return [channels for _, channels in self._returned()]

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> BackboneOutput | tuple[object, ...]:
        states = self.network.forward_states(pixel_values)
        maps: list[Tensor] = []
        for i in self.out_indices:
            name = self.stage_names[i]
            has_norm = name in self.hidden_states_norms
            maps.append(self.hidden_states_norms[name](states[i]) if has_norm else states[i])
        output = BackboneOutput(tuple(maps), tuple(states) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()


def _require_order(name: str, places: Sequence[int], got: Sequence[object]) -> None:
    if list(places) != sorted(set(places)):
        raise ValueError(
            f"{name} must name each stage once and in the network's order; got {list(got)}"
        )
