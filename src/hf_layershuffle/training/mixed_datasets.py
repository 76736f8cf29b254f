# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Datasets whose images are mixed (mixup, CutMix): which they are, and what is not done with them."""

from typing import Any

from ..data.augmentation_settings import Augmentation
from .callback import nested_datasets


def mixes_images(dataset: Any) -> bool:
    """Whether a dataset, or one inside it, has its images mixed."""
    settings = (getattr(each, "augmentation", None) for each in nested_datasets(dataset))
    return any(isinstance(each, Augmentation) and each.mixes for each in settings)


def check_unmixed(dataset: Any, name: str) -> None:
    """Refuses to evaluate on images that are mixed.

    Raises:
        `ValueError`: if the dataset, one inside it, or one of a dictionary, mixes.
    """
    if any(mixes_images(each) for each in (dataset.values() if isinstance(dataset, dict) else [dataset])):
        raise ValueError(
            f"`{name}` mixes images (mixup or CutMix), so each is of two classes; evaluate on images that are not "
            "mixed, such as an `ImageClassificationDataset` without `augmentation`."
        )
