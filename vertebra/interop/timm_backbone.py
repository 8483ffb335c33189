"""Any model of timm as a backbone, with the interface that transformers gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..models._outputs import BackboneOutput
from ..nn import freeze_batch_norm_2d, unfreeze_batch_norm_2d


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("TimmBackbone builds models of timm; pip install timm") from error
    return timm


class TimmBackbone(nn.Module):
    """A model of timm that returns feature maps.

    Arguments, attributes and keys (`_backbone.`) are those of transformers' `TimmBackbone` and its
    configuration. The numbers of features are timm's: those of a ResNet start at its stem.

    Args:
        model: timm's name of it.
        num_channels: of the images.
        features_only: let timm drop what comes after the last feature and rename what stays, as
            `timm.create_model(features_only=True)` does; or keep the whole model and its names.
        out_indices: the features to return, in the network's order; negative ones from the end.
        freeze_batch_norm_2d: start with frozen batch norms.
        output_stride: 8, 16 or 32 where the model knows it; None for its own.
        pretrained: load timm's weights.
        kwargs: passed to `timm.create_model`.

    Attributes:
        stage_names: the modules that all features leave.
        num_features: channels of all features.
        out_indices: as given.
        out_features: the stage names of the returned features.
        channels: channels of the returned features.

    Raises:
        ImportError: timm is not installed.
        ValueError: features that there are not, or not in order; a model that only returns features
            if timm takes it apart, with `features_only=False`.
    """

    main_input_name = "pixel_values"

    def __init__(
        self,
        model: str,
        *,
        num_channels: int = 3,
        features_only: bool = True,
        out_indices: Sequence[int] = (-1,),
        freeze_batch_norm_2d: bool = False,
        output_stride: int | None = None,
        pretrained: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        timm = _import_timm()
        options = {"pretrained": pretrained, "in_chans": num_channels, **kwargs}
        if output_stride is not None:
            options["output_stride"] = output_stride
        if features_only:
            options |= {"features_only": True, "out_indices": tuple(out_indices)}
        if ":" not in model and not timm.is_model(model.partition(".")[0]):
            raise ValueError(f"timm has no model {model!r}; timm.list_models() has all names")
        try:
            backbone = timm.create_model(model, **options)
        except (AssertionError, IndexError) as error:
            raise ValueError(f"timm does not build {model} with {options}: {error}") from error
        self._backbone: nn.Module = backbone
        self.features_only = features_only
        if not features_only and not hasattr(backbone, "forward_intermediates"):
            raise ValueError(f"{model} returns no features as a whole; use features_only=True")
        info: list[dict[str, Any]] = list(
            getattr(backbone.feature_info, "info", backbone.feature_info)
        )
        self.stage_names = [entry["module"] for entry in info]
        self.num_features = [entry["num_chs"] for entry in info]
        self.out_indices = list(out_indices)
        self._places = _in_order(self.out_indices, len(info))
        self._whole = self._select_all() if features_only else None
        if freeze_batch_norm_2d:
            self.freeze_batch_norm_2d()

    def _select_all(self) -> tuple[str, Any] | None:
        """Return which attribute of timm's wrapper, set to what, lets all features out."""
        net: Any = self._backbone
        count = self._places[-1] + 1
        if hasattr(net, "return_layers"):
            names = self.stage_names[:count]
            names = [name if name in net else name.replace(".", "_") for name in names]
            return "return_layers", {name: str(i) for i, name in enumerate(names)}
        if hasattr(net, "out_indices") and hasattr(net, "model"):
            return "out_indices", list(range(count))
        return None

    @property
    def out_features(self) -> list[str]:
        """Stage names of the returned features."""
        return [self.stage_names[i] for i in self._places]

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Channels of every feature, by stage name."""
        return dict(zip(self.stage_names, self.num_features, strict=True))

    @property
    def channels(self) -> list[int]:
        """Channels of the returned features."""
        return [self.num_features[i] for i in self._places]

    def freeze_batch_norm_2d(self) -> None:
        """Freeze the batch norms: `vertebra.nn.freeze_batch_norm_2d`."""
        self._backbone = freeze_batch_norm_2d(self._backbone)

    def unfreeze_batch_norm_2d(self) -> None:
        """Undo it, with each norm's momentum and counter: `vertebra.nn.unfreeze_batch_norm_2d`."""
        self._backbone = unfreeze_batch_norm_2d(self._backbone)

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> BackboneOutput | tuple[object, ...]:
        """Return the features that were asked for, and all up to the last of them if wanted.

        Args:
            pixel_values: the images.
            output_attentions: there are none to be had.
            output_hidden_states: return all features up to the last of `out_indices` as well.
            return_dict: return a `BackboneOutput`, or a tuple.
        """
        if output_attentions:
            raise ValueError("TimmBackbone cannot return attentions; leave output_attentions out")
        states = self._all_features(pixel_values) if output_hidden_states else None
        if states is not None:
            maps = tuple(states[i] for i in self._places)
        elif self.features_only:
            maps = tuple(self._backbone(pixel_values))
        else:
            maps = self._intermediates(pixel_values, self._places)
        output = BackboneOutput(maps, states)
        return output if return_dict else output.to_tuple()

    def _intermediates(self, x: Tensor, indices: list[int]) -> tuple[Tensor, ...]:
        net: Any = self._backbone
        return tuple(net.forward_intermediates(x, indices=indices, intermediates_only=True))

    def _all_features(self, x: Tensor) -> tuple[Tensor, ...]:
        everything = list(range(self._places[-1] + 1))
        if not self.features_only:
            return self._intermediates(x, everything)
        net: Any = self._backbone
        if self._places == everything:
            return tuple(net(x))
        if self._whole is None:
            raise ValueError(
                f"a {type(net).__name__} of timm returns the features it was built for; "
                f"for all hidden states build with out_indices={tuple(everything)}"
            )
        name, value = self._whole
        kept = getattr(net, name)
        setattr(net, name, value)
        try:
            return tuple(net(x))
        finally:
            setattr(net, name, kept)


def _in_order(indices: Sequence[int], count: int) -> list[int]:
    """Return features by number from the start."""
    places = [i % count for i in indices if -count <= i < count]
    if not places or len(places) < len(indices) or places != sorted(set(places)):
        raise ValueError(
            f"out_indices must number features from {-count} to {count - 1}, each once and in "
            f"order; got {tuple(indices)}"
        )
    return places
