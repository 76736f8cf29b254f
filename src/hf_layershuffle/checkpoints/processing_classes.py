# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What makes a model's inputs of images or of texts: its image processor or its tokenizer."""

import os
from typing import Any, TypeAlias

from transformers import ImageProcessingMixin, PreTrainedConfig, PreTrainedTokenizerBase

from .image_processors import load_image_processor
from .tokenizers import load_tokenizer, takes_texts


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
