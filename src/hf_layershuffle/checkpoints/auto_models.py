# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Auto classes that choose the free-order class of a checkpoint, plain or ours, as transformers' Auto classes do."""

import os
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import find_adapter_config_file

from ..common.yaml_files import read_json
from ..models.auto_classes import AUTO_CLASSES, plain_class_name, plain_type_of
from ..models.classification_heads import plain_class_of
from ..models.configuration_layershuffle import LayerShuffleConfigMixin
from ..models.families import check_family
from ..models.modeling_layershuffle import LayerShuffleMixin, layershuffle_class
from .checks import explained_reading
from .loading import implementations_of
from .locations import hub_arguments


# Of a configuration, and not in its dictionary
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


class LayerShuffleAutoModel:
    """Loads the model of any family with free layer order: [`AutoModel`], and which layer runs next can be said.

    ```python
    >>> import hf_layershuffle as ls

    >>> model = ls.LayerShuffleAutoModel.from_pretrained("facebook/dinov2-base", shuffle_mode="arbitrary")
    ```
    """

    auto_class: ClassVar[str] = "AutoModel"

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        name = type(self).__name__
        raise OSError(
            f"{name} is instantiated by `{name}.from_pretrained(name_or_path)` or `{name}.from_config(config)`."
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> LayerShuffleMixin:
        """Loads a checkpoint, plain or with free layer order, as the class that its configuration says.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            args: Passed to the `from_pretrained` of that class.
            kwargs: Likewise. Flags are set on the configuration, such as `shuffle_mode="arbitrary"`. With
                `trust_remote_code=True`, code that the checkpoint brings may run to read its configuration.

        Raises:
            `ValueError`: if the family has no such class or cannot run its layers in any order, or a flag is not
                valid.
            `OSError`: if there is no such checkpoint, or it cannot be read.
        """
        config = kwargs.get("config")
        trusts = kwargs.pop("trust_remote_code", False)
        what = f"'{pretrained_model_name_or_path}'"
        if not isinstance(config, PreTrainedConfig):
            hub = hub_arguments(kwargs)
            with explained_reading(what):
                source = config or _base_of(pretrained_model_name_or_path, hub)
                config = AutoConfig.from_pretrained(source, trust_remote_code=trusts, **hub)
        model_class: Any = cls._class_for(config, what)
        if "config" in kwargs:  # transformers then takes what is beside it for arguments of the class
            flags = {name: kwargs.pop(name) for name in list(kwargs) if hasattr(LayerShuffleConfigMixin, name)}
            kwargs["config"] = _as_free(model_class, config, **flags)
        with explained_reading(what):
            return model_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> LayerShuffleMixin:
        """A model with new weights.

        Args:
            config: A configuration of transformers or of ours, which is left as it is.
            kwargs: Flags, such as `shuffle_mode="arbitrary"`, and arguments such as `attn_implementation` and `dtype`.

        Raises:
            `ValueError`: as for `from_pretrained`.
        """
        model_class: Any = cls._class_for(config, type(config).__name__)
        options = {name: kwargs.pop(name) for name in ("attn_implementation", "dtype") if name in kwargs}
        return model_class._from_config(_as_free(model_class, config, **kwargs), **options)

    @classmethod
    def _class_for(cls, config: PreTrainedConfig, what: str) -> type[LayerShuffleMixin]:
        model_type = plain_type_of(config.model_type)
        check_family(model_type, what)
        name = plain_class_name(cls.auto_class, model_type)
        plain_class = None if name is None else plain_class_of(name)
        if plain_class is None:
            others = [f"LayerShuffle{each}" for each in AUTO_CLASSES if plain_class_name(each, model_type) is not None]
            advice = f"take {' or '.join(others)}" if others else "take a model of another family"
            raise ValueError(
                f"{what} is a model of type '{model_type}', of which {cls.__name__} has no class; {advice}."
            )
        return layershuffle_class(plain_class)


def _base_of(name_or_path: str | os.PathLike, hub: dict[str, Any]) -> str | os.PathLike:
    """The model that an adapter of PEFT is of, which `from_pretrained` loads with it; a model itself otherwise."""
    adapter = find_adapter_config_file(os.fspath(name_or_path), **hub)
    if adapter is None or Path(name_or_path, hub.get("subfolder") or "", "config.json").exists():
        return name_or_path
    return read_json(Path(adapter), dict)["base_model_name_or_path"]


def _as_free(model_class: Any, config: PreTrainedConfig, **flags: Any) -> PreTrainedConfig:
    """A configuration of the class, of a plain or a free one."""
    values = config.to_dict() | {"model_type": model_class.config_class.model_type}
    free = model_class.config_class.from_dict(values, **flags)
    for name in _IMPLEMENTATIONS:
        if hasattr(config, name):
            setattr(free, name, implementations_of(config, name))
    return free


class LayerShuffleAutoModelForImageClassification(LayerShuffleAutoModel):
    """Loads an image classifier of any family with free layer order; see [`LayerShuffleAutoModel`]."""

    auto_class = "AutoModelForImageClassification"


class LayerShuffleAutoModelForSequenceClassification(LayerShuffleAutoModel):
    """Loads a text classifier of any family with free layer order; see [`LayerShuffleAutoModel`]."""

    auto_class = "AutoModelForSequenceClassification"


class LayerShuffleAutoModelForAudioClassification(LayerShuffleAutoModel):
    """Loads an audio classifier of any family with free layer order; see [`LayerShuffleAutoModel`]."""

    auto_class = "AutoModelForAudioClassification"


class LayerShuffleAutoModelForVideoClassification(LayerShuffleAutoModel):
    """Loads a video classifier of any family with free layer order; see [`LayerShuffleAutoModel`]."""

    auto_class = "AutoModelForVideoClassification"


class LayerShuffleAutoModelForCausalLM(LayerShuffleAutoModel):
    """Loads a causal language model of any family with free layer order; see [`LayerShuffleAutoModel`]."""

    auto_class = "AutoModelForCausalLM"
