# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What makes a model's inputs of images or of texts: its image processor or its tokenizer."""

import os
from typing import Any, TypeAlias

from transformers import ImageProcessingMixin, PreTrainedConfig, PreTrainedTokenizerBase

from ..models.configuration_layershuffle import num_channels_of
from .image_processors import load_image_processor
from .tokenizers import check_tokenizer, load_tokenizer, takes_texts


ProcessingClass: TypeAlias = ImageProcessingMixin | PreTrainedTokenizerBase


def load_processing_class(name_or_path: str | os.PathLike, config: PreTrainedConfig, **kwargs: Any) -> Any:
    """The tokenizer of a model of texts, and the image processor of any other.

    Args:
        name_or_path: Folder or Hub id of the model.
        config: The model's configuration.
        kwargs: As for [`load_image_processor`].

    Raises:
        `OSError`, `ValueError`: as in [`load_image_processor`] and [`load_tokenizer`].
    """
    return (load_tokenizer if takes_texts(config) else load_image_processor)(name_or_path, **kwargs)


def chosen_processing_class(
    processing_class: ProcessingClass | None, image_processor: ProcessingClass | None
) -> ProcessingClass | None:
    """The one that is given. `image_processor` is the earlier name of the argument, and stays valid.

    Raises:
        `ValueError`: if both are given.
    """
    if processing_class is not None and image_processor is not None:
        raise ValueError("`processing_class` and `image_processor` are two names of one argument; give one of them.")
    return image_processor if processing_class is None else processing_class


def check_evaluable(config: PreTrainedConfig, processing_class: ProcessingClass | None = None) -> None:
    """Refuses a model that does not choose one class of several, since it has no accuracy.

    It also refuses an image processor for images with another number of channels than the model takes, and a tokenizer
    that does not fit the model's vocabulary.

    Raises:
        `ValueError`: naming the field.
    """
    problem = getattr(config, "problem_type", None) or ("regression" if config.num_labels == 1 else None)
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"The model is for '{problem}' (`problem_type` and `num_labels`, {config.num_labels}); accuracy is "
            "measured of models that choose one class of at least two. Take a model for single-label classification."
        )
    if isinstance(processing_class, PreTrainedTokenizerBase):
        check_tokenizer(processing_class, config)
    if processing_class is None or not getattr(processing_class, "do_normalize", False):
        return
    num_channels = num_channels_of(config)
    for name in ("image_mean", "image_std"):
        value = getattr(processing_class, name, None)
        if num_channels is not None and isinstance(value, (list, tuple)) and len(value) != num_channels:
            kind = {1: "grey", 3: "RGB"}.get(num_channels, f"{num_channels}-channel")
            raise ValueError(
                f"The model takes {kind} images (`num_channels` is {num_channels}), but `{name}` of its image "
                f"processor has {len(value)} numbers: {list(value)}. Save the image processor that it was trained "
                "with beside it."
            )
