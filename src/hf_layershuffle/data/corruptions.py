# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Images of lower quality: blurred, noisy, or of low contrast (as in arXiv 1903.12261), to measure on.

Each function takes and gives uint8 images of shape `(count, height, width)` or `(count, height, width, channels)`.
"""

from collections.abc import Callable

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image as PILImage

from ..common.checks import check_integers, check_number
from .image_reading import to_pil


def blur(images: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Images under a Gaussian of standard deviation `sigma`, in pixels and above 0. Edges are continued."""
    check_number("sigma", sigma, 1e-3, 1000)
    radius = max(1, round(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    pixels = _checked(images).astype(np.float64)
    for axis in (1, 2):
        widths = [(radius, radius) if each == axis else (0, 0) for each in range(pixels.ndim)]
        padded = np.pad(pixels, widths, mode="edge")
        shifted = [
            np.take(padded, np.arange(start, start + pixels.shape[axis]), axis) for start in range(2 * radius + 1)
        ]
        pixels = sum(weight * each for weight, each in zip(weights, shifted))
    return _as_uint8(pixels)


def noise(images: np.ndarray, std: float = 0.2, seed: int = 0) -> np.ndarray:
    """Images with Gaussian noise.

    Args:
        images: See above.
        std: Standard deviation as a fraction of the full range, in [0, 1].
        seed: Seed of the noise, at least 0.
    """
    check_number("std", std, 0, 1)
    check_integers(seed=(seed, 0))
    pixels = _checked(images).astype(np.float64)
    return _as_uint8(pixels + 255 * std * np.random.default_rng(seed).standard_normal(pixels.shape))


def low_contrast(images: np.ndarray, factor: float = 0.3) -> np.ndarray:
    """Images whose pixels are `factor`, in [0, 1], times as far from the image's mean as they were."""
    check_number("factor", factor, 0, 1)
    pixels = _checked(images).astype(np.float64)
    mean = pixels.mean(axis=tuple(range(1, pixels.ndim)), keepdims=True)
    return _as_uint8(mean + factor * (pixels - mean))


CORRUPTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "blur": blur,
    "noise": noise,
    "low_contrast": low_contrast,
}


def check_corruption(name: str) -> None:
    """Raises a `ValueError` if there is no corruption of this name."""
    if name not in CORRUPTIONS:
        raise ValueError(f"`corruption` is {name!r}; choose from {', '.join(CORRUPTIONS)}.")


def corrupted(dataset: Dataset, name: str, seed: int = 0) -> Dataset:
    """A dataset whose images are of lower quality, in memory.

    Args:
        dataset: With the columns `image` and `label`, as from [`load_image_datasets`].
        name: A key of `CORRUPTIONS`, with its default strength.
        seed: Seed of the noise, at least 0.

    Raises:
        `ValueError`: if there is no corruption of this name.
    """
    check_corruption(name)
    seeds = np.random.default_rng(seed).integers(2**31, size=len(dataset)).tolist()
    images = []
    for image, seed_of_image in zip(dataset["image"], seeds):
        is_grey = image.mode == "L" if isinstance(image, PILImage.Image) else np.ndim(image) == 2
        pixels = np.asarray(to_pil(image, "L" if is_grey else "RGB"))[None]
        changed = noise(pixels, seed=seed_of_image) if name == "noise" else CORRUPTIONS[name](pixels)
        images.append(PILImage.fromarray(changed[0]))
    columns = {column: images if column == "image" else dataset[column] for column in dataset.column_names}
    return Dataset.from_dict(columns, features=Features({**dataset.features, "image": ImageFeature()}))


def _checked(images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"`images` is {images.dtype} of shape {images.shape}; pass uint8 of shape `(count, height, width)` or "
            "`(count, height, width, channels)`."
        )
    return images


def _as_uint8(pixels: np.ndarray) -> np.ndarray:
    return pixels.round().clip(0, 255).astype(np.uint8)
