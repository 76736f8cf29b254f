# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Classifiers of any family, loaded or given as models with free layer order."""

import copy
import difflib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..models.auto_classes import AUTO_CLASSES, auto_class_of, is_free_model_type, plain_class_name, plain_type_of
from ..models.classification_heads import plain_class_of
from ..models.configuration_layershuffle import num_layers_of, set_num_layers
from ..models.families import check_family
from ..models.layer_lists import find_layers
from ..models.modeling_layershuffle import LayerShuffleMixin, free_order, layershuffle_class
from .checks import check_complete, check_finite, check_model_files, explained_reading
from .locations import hub_arguments
from .tokenizers import takes_texts


CLASSIFIERS = tuple(name for name in AUTO_CLASSES if name.endswith("Classification"))


def load_classifier(
    name_or_path: str | os.PathLike, *, as_saved: bool = False, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Loads a classifier of any family, plain or LayerShuffle, from a folder or the Hub, as a LayerShuffle model.

    A plain model has `shuffle_mode="none"` then, and computes what it did, but accepts an `execution_order`.

    Args:
        name_or_path: Folder or Hub id.
        as_saved: Whether a plain model stays plain.
        trust_remote_code: Whether code that a model brings may run to read its configuration. The model itself is
            always one of the classes here.
        kwargs: Passed to `from_pretrained`: `revision`, `token`, `subfolder`, `dtype`, `attn_implementation`, ...

    Raises:
        `ValueError`: if the model is of another type, was not trained as a classifier, lacks tensors, or holds NaN.
        `OSError`: if there is no such model, or its files cannot be read.
    """
    what = f"'{name_or_path}'"
    check_model_files(os.path.join(name_or_path, kwargs.get("subfolder") or ""))
    hub = hub_arguments(kwargs)
    with explained_reading(what):
        model_type = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub).model_type
    plain_class, free_class = classes_of(model_type, what)
    stays_plain = as_saved and not is_free_model_type(model_type)
    model_class: Any = plain_class if stays_plain else free_class
    with explained_reading(what), _quiet(modeling_utils.logger):  # its table of tensors, which are checked below
        model, found = model_class.from_pretrained(
            name_or_path, output_loading_info=True, use_safetensors=True, **kwargs
        )
    kind = "text" if takes_texts(model.config) else "image"
    check_complete(what, found["missing_keys"], found["unexpected_keys"], requested=kwargs, input_kind=kind)
    check_finite(what, model.state_dict().items())
    return model


@contextmanager
def _quiet(logger: Any) -> Iterator[None]:
    """Lets nothing but errors through. The level stays: a higher one makes transformers list what it did not shard."""

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def as_layershuffle(model: PreTrainedModel) -> LayerShuffleMixin:
    """The model itself if it is a LayerShuffle classifier, and of a plain classifier one that shares its weights.

    Raises:
        `ValueError`: if it is not a classifier, its layers cannot be reordered, or they were cut by hand.
    """
    if isinstance(model, LayerShuffleMixin):
        check_is_classifier(type(model).plain_class)
        model.check_depth()
        return model
    check_is_classifier(type(model))
    # A copy of the modules, but not of their tensors
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: Any = copy.deepcopy(model, tensors)
    if "_original_forward" in vars(twin):  # after training in half precision, the forward of `Accelerator.prepare`
        del twin.forward, twin._original_forward
    layers: Any = twin.get_submodule(find_layers(twin, any_depth=True))
    if len(layers) != num_layers_of(twin.config):  # cut by hand
        set_num_layers(twin.config, len(layers))
    return free_order(twin)


def is_classifier(plain_class: type[PreTrainedModel]) -> bool:
    """Whether one of the Auto classes of classifiers takes a class of transformers."""
    return auto_class_of(plain_class) in CLASSIFIERS


def check_is_classifier(plain_class: type[PreTrainedModel]) -> None:
    """Refuses a class of transformers that none of the Auto classes of classifiers takes.

    Raises:
        `ValueError`: naming the class to take instead.
    """
    if not is_classifier(plain_class):
        model_type = getattr(plain_class.config_class, "model_type", None)
        heads = list(classifiers_of(model_type).values()) if model_type else []
        advice = f"pass a {' or '.join(heads)}." if heads else "models of its family cannot be evaluated."
        raise ValueError(f"{plain_class.__name__} is not a classifier of its whole input; {advice}")


def classifiers_of(plain_model_type: str) -> dict[str, str]:
    """The names of a family's classifiers in transformers, by the Auto class that takes them."""
    names = {name: plain_class_name(name, plain_model_type) for name in CLASSIFIERS}
    return {auto_class: name for auto_class, name in names.items() if name is not None}


def classes_of(model_type: str, what: str) -> tuple[type[PreTrainedModel], type[LayerShuffleMixin]]:
    """The plain classifier of a model type, and the one with free layer order.

    Raises:
        `ValueError`: naming `what`, if the family has no classifier.
    """
    check_family(model_type, what)
    name = next(iter(classifiers_of(plain_type_of(model_type)).values()), None)
    plain_class = None if name is None else plain_class_of(name)
    if plain_type_of(model_type) not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(plain_type_of(model_type), CONFIG_MAPPING_NAMES, n=3)
        advice = f"Did you mean {' or '.join(near)}?" if near else "Take one such as vit, dinov2 or bert."
        raise ValueError(f"{what} is a model of type '{model_type}', which transformers does not know. {advice}")
    if plain_class is None:
        raise ValueError(
            f"{what} is a model of type '{model_type}', of which transformers has no classifier. Take a model that "
            "classifies images or texts, such as one of type 'vit', 'deit', 'dinov2' or 'bert'."
        )
    return plain_class, layershuffle_class(plain_class)


def saved_class_of(config: PreTrainedConfig | Any) -> type[LayerShuffleMixin] | None:
    """The class with free layer order that `architectures` of a configuration name; None of a plain model's."""
    name = str(next(iter(getattr(config, "architectures", None) or ()), ""))
    plain_class = plain_class_of(name.removeprefix("LayerShuffle")) if name.startswith("LayerShuffle") else None
    return None if plain_class is None else layershuffle_class(plain_class)


def implementations_of(config: PreTrainedConfig, name: str = "_attn_implementation") -> dict[str, Any]:
    """What computes attention, by a configuration (key "") and likewise by those in it, as its setter takes it."""
    parts = {part: getattr(config, part, None) for part in config.sub_configs}
    own = {"": getattr(config, name)}
    return own | {part: implementations_of(each, name) for part, each in parts.items() if each is not None}
