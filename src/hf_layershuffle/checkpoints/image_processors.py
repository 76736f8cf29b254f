# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The image processor that a model was trained with."""

import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoImageProcessor, ImageProcessingMixin

from ..common.paths import check_links
from .checks import explained_reading


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_image_processor(name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """Loads the image processor of a model as `AutoImageProcessor` does.

    It works without torchvision too. In transformers before 5.23 that class needs it, although the processors do not.

    Args:
        name_or_path: Folder or Hub id.
        kwargs: Passed to `from_pretrained`: `revision`, `token`, ... Code that a model brings runs only with
            `trust_remote_code=True`.

    Raises:
        `OSError`: if there is none, or it cannot be read.
        `ValueError`: if it needs code that the model brings, or is of sounds.
    """
    folder = Path(name_or_path)
    kwargs = {"trust_remote_code": False} | kwargs
    if folder.is_dir() and not any((folder / name).exists() for name in _PROCESSOR_FILES):
        raise OSError(
            f"The folder '{folder}' holds no image processor ('{_PROCESSOR_FILES[0]}'). Save the one that the model "
            "was trained with there, such as ViTImageProcessor(size={'height': 224, 'width': 224}, "
            "image_mean=[0.5, 0.5, 0.5], "
            f"image_std=[0.5, 0.5, 0.5]).save_pretrained('{folder}')."
        )
    if folder.is_dir():
        check_links(folder, _PROCESSOR_FILES)  # what is read here is written into results
        _check_is_of_images(folder)
    try:
        with explained_reading(f"The image processor of '{name_or_path}'"):
            return AutoImageProcessor.from_pretrained(name_or_path, **kwargs)
    except ImportError:
        del kwargs["trust_remote_code"]
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **kwargs)
        name = settings.get("image_processor_type", "ViTImageProcessor").removesuffix("Fast")
        return getattr(transformers, name).from_pretrained(name_or_path, **kwargs)


def _check_is_of_images(folder: Path) -> None:
    path = folder / _PROCESSOR_FILES[0]
    if not path.is_file():
        return
    with explained_reading(f"The image processor of '{folder}'"):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    kind = settings.get("feature_extractor_type")
    known = getattr(transformers, kind, None) if isinstance(kind, str) else None
    if isinstance(known, type) and issubclass(known, transformers.SequenceFeatureExtractor):
        raise ValueError(
            f"'{folder}' holds a feature extractor ({kind}), which is for sounds. Commands take images; measure a "
            "model of sounds by `hf_layershuffle.score_execution_orders(model, items, orders)`, with items of its "
            "feature extractor."
        )
