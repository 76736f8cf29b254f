# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Which class of a family each of transformers' Auto classes takes.

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import modeling_auto

from .classification_heads import HEADS


# transformers' tables of class names by model type
AUTO_CLASSES: dict[str, Mapping[str, Any]] = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForAudioClassification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForVideoClassification": modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
# Those first, and then the tables of all other Auto classes of models
ALL_AUTO_CLASSES: dict[str, Mapping[str, Any]] = AUTO_CLASSES | {
    name: mapping._model_mapping
    for name, each in vars(modeling_auto).items()
    for mapping in [getattr(each, "_model_mapping", None) if isinstance(each, type) else None]
    if mapping is not None
}


MODEL_TYPE_PREFIX = "layershuffle_"


def plain_type_of(model_type: str) -> str:
    """The family's own model type: "vit" of "layershuffle_vit" and of "vit"."""
    return model_type.removeprefix(MODEL_TYPE_PREFIX)


def is_free_model_type(model_type: str) -> bool:
    """Whether a model type is one of ours, such as "layershuffle_vit"."""
    return model_type.startswith(MODEL_TYPE_PREFIX)


def plain_class_names(auto_class: str, plain_model_type: str) -> tuple[str, ...]:
    """The names of the classes that an Auto class takes for a model type: of transformers, or a head of ours.

    Where there are several, a configuration's `architectures` choose, and else the first is taken.
    """
    names = ALL_AUTO_CLASSES[auto_class].get(plain_model_type) or ()
    if not names and auto_class == "AutoModelForImageClassification" and plain_model_type in HEADS:
        names = HEADS[plain_model_type].name
    return (names,) if isinstance(names, str) else tuple(names)


def plain_class_name(auto_class: str, plain_model_type: str) -> str | None:
    """The first of [`plain_class_names`]; None if there is none."""
    return next(iter(plain_class_names(auto_class, plain_model_type)), None)


def auto_classes_that_take(plain_class: type[PreTrainedModel]) -> list[str]:
    """The names of the Auto classes, of any task, that take a class of transformers."""
    if plain_class.config_class is None:
        return []
    model_type = plain_class.config_class.model_type
    return [name for name in ALL_AUTO_CLASSES if plain_class.__name__ in plain_class_names(name, model_type)]


def auto_class_of(plain_class: type[PreTrainedModel]) -> str | None:
    """The first Auto class that takes a class of transformers; None if none does."""
    return next(iter(auto_classes_that_take(plain_class)), None)


def auto_classes_of(plain_model_type: str) -> dict[str, str]:
    """`{"AutoModel": "LayerShuffleViTModel", ...}` of a model type of transformers, for the Auto classes that know
    it."""
    names = {auto_class: plain_class_name(auto_class, plain_model_type) for auto_class in AUTO_CLASSES}
    return {auto_class: f"LayerShuffle{name}" for auto_class, name in names.items() if name is not None}


def auto_map_of(config: PreTrainedConfig, plain_class: type[PreTrainedModel] | None = None) -> dict[str, str]:
    """What `config.json` says of the code that travels with a model, for each Auto class of its family.

    Args:
        plain_class: Plain class of a model that is saved, of whatever task: Auto classes that take it load it, too.
    """
    classes = auto_classes_of(config.plain_model_type)
    if plain_class is not None:
        classes |= dict.fromkeys(auto_classes_that_take(plain_class), f"LayerShuffle{plain_class.__name__}")
    auto_map = {"AutoConfig": f"configuration_layershuffle.{type(config).__name__}"}
    return auto_map | {auto_class: f"modeling_layershuffle.{name}" for auto_class, name in classes.items()}


def register_conversion(made: Any, is_one_module: bool) -> None:
    """Lets transformers rename the tensors of old checkpoints, which it does by class name or model type.

    Without this a checkpoint loads with a random encoder and a mere warning. A class with a head needs nothing of its
    own: its encoder is renamed by itself. Not so of a model that is no encoder with a head, but one module.
    """
    plain = made.plain_class
    mapping = get_checkpoint_conversion_mapping(plain.__name__)
    model_type = plain.config_class.model_type
    is_whole = is_one_module or plain.__name__ == plain_class_name("AutoModel", model_type)
    if mapping is None and is_whole:
        mapping = get_checkpoint_conversion_mapping(model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(made.__name__, mapping, overwrite=True)
