# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Makes transformers' Auto classes know the free-order classes of all families. A family is imported when it is
used."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

from . import modeling_layershuffle
from .auto_classes import ALL_AUTO_CLASSES, is_free_model_type, plain_class_names, plain_type_of
from .configuration_layershuffle import layershuffle_config_class


class _MadeOnDemand(dict):
    """What was registered with an Auto class. An entry of a free-order family is made when it is first asked for."""

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key):
            value = self.make(key)
            if value is None:
                return False
            self[key] = value
        return True

    def make(self, key: Any) -> Any:
        raise NotImplementedError


class _Configurations(_MadeOnDemand):
    """By model type, such as "layershuffle_vit"."""

    def make(self, key: Any) -> type[PreTrainedConfig] | None:
        if not (isinstance(key, str) and is_free_model_type(key)):
            return None
        if plain_type_of(key) not in configuration_auto.CONFIG_MAPPING:
            return None
        return layershuffle_config_class(configuration_auto.CONFIG_MAPPING[plain_type_of(key)])


class _Models(_MadeOnDemand):
    """By configuration class, for one Auto class."""

    def __init__(self, auto_class: str, registered: dict):
        super().__init__(registered)
        self.auto_class = auto_class

    def make(self, key: Any) -> type[PreTrainedModel] | tuple[type[PreTrainedModel], ...] | None:
        model_type = getattr(key, "plain_model_type", None)
        names = plain_class_names(self.auto_class, model_type) if isinstance(model_type, str) else ()
        made = tuple(getattr(modeling_layershuffle, f"LayerShuffle{name}") for name in names)
        return made if len(made) > 1 else next(iter(made), None)


def register_auto_classes() -> None:
    """Lets `AutoConfig` and all Auto classes of models load saved free-order models of every family."""
    configurations = configuration_auto.CONFIG_MAPPING
    if isinstance(configurations._extra_content, _MadeOnDemand):
        return
    configurations._extra_content = _Configurations(configurations._extra_content)
    for name in ALL_AUTO_CLASSES:
        mapping = getattr(modeling_auto, name)._model_mapping
        mapping._extra_content = _Models(name, mapping._extra_content)
