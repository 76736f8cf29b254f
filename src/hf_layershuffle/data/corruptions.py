# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Images of lower quality, to measure on: blurred, noisy, or of low contrast (as in arXiv 1903.12261)."""

from typing import Any

from datasets import Dataset
from transformers import ImageProcessingMixin

from ..common.checks import check_integers
from .augmentation_settings import Augmentation
from .image_dataset import ImageClassificationDataset
from .operation_policies import CORRUPTIONS


def corrupted(
    dataset: Dataset, image_processor: ImageProcessingMixin, corruption: str, *, seed: int = 0, **kwargs: Any
) -> ImageClassificationDataset:
    """The images as the model takes them, all of lower quality.

    They are changed after they were resized, by what `--augmentation_policy corruptions` does at most: a Gaussian of
    one pixel (4 pixels at 224), noise of a fifth of the range, or three tenths of the contrast.

    Args:
        dataset: With the columns `image` and `label`, as from [`load_image_datasets`].
        image_processor: The model's.
        corruption: "blur", "noise" or "low_contrast".
        seed: Seed of the noise, at least 0.
        kwargs: `num_channels` and others, as for [`ImageClassificationDataset`].

    Raises:
        `ValueError`: if there is no corruption of this name, or an argument is of another kind.
    """
    check_corruption(corruption)
    check_integers(seed=(seed, 0))
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`dataset` is a {type(dataset).__name__}; pass a `datasets.Dataset` with the columns `image` and "
            "`label`, such as `load_image_datasets(name)['test']`."
        )
    if not isinstance(image_processor, ImageProcessingMixin):
        raise ValueError(
            f"`image_processor` is a {type(image_processor).__name__}; pass the model's (`load_image_processor`)."
        )
    settings = Augmentation(crop_padding=0, horizontal_flip=False, policy=corruption)
    return ImageClassificationDataset(dataset, image_processor, augmentation=settings, seed=seed, **kwargs)


def check_corruption(corruption: str) -> None:
    """Raises a `ValueError` if there is no corruption of this name."""
    if corruption not in CORRUPTIONS:
        raise ValueError(f"`corruption` is {corruption!r}; choose from {', '.join(CORRUPTIONS)}.")
