# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Boxes and weights made of evenly distributed numbers: for resized crops, random erasing, mixup and CutMix.

A box is top, left, height and width in pixels.
"""

from collections.abc import Callable

import numpy as np
import torch


def normal(numbers: np.ndarray) -> np.ndarray:
    """Standard normal numbers of evenly distributed ones in [0, 1)."""
    return torch.special.ndtri(torch.from_numpy(numbers) + 2.0**-54).numpy()


def tried_boxes(
    numbers: np.ndarray, sizes: np.ndarray, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The first box of each image that fits into it, of several that are tried.

    Args:
        numbers: Numbers in [0, 1) of shape `(num_images, tries, 4)`.
        sizes: Heights and widths of shape `(num_images, 2)`.
        area: Smallest and largest part of the image's area.
        ratio: Smallest and largest width to height. Its logarithm is evenly distributed.

    Returns:
        int64 boxes of shape `(num_images, 4)`, and booleans of shape `(num_images,)`: whether one did fit.
    """
    heights, widths = sizes[:, :1], sizes[:, 1:]
    areas = heights * widths * (area[0] + (area[1] - area[0]) * numbers[..., 0])
    low, high = np.log(ratio)
    root = np.exp((low + (high - low) * numbers[..., 1]) / 2)
    box_widths = np.rint(np.sqrt(areas) * root).astype(np.int64)
    box_heights = np.rint(np.sqrt(areas) / root).astype(np.int64)
    fits = (box_widths > 0) & (box_widths <= widths) & (box_heights > 0) & (box_heights <= heights)
    tops = (numbers[..., 2] * (heights - box_heights + 1)).astype(np.int64)
    lefts = (numbers[..., 3] * (widths - box_widths + 1)).astype(np.int64)
    first = fits.argmax(1)
    boxes = np.stack([tops, lefts, box_heights, box_widths], axis=-1)
    return boxes[np.arange(len(boxes)), first], fits.any(1)


def resized_crop_boxes(
    numbers: np.ndarray, sizes: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Boxes of random area and shape, or the largest in the middle where none of ten did fit (arXiv 1409.4842)."""
    boxes, fits = tried_boxes(numbers, sizes, scale, ratio)
    heights, widths = sizes[:, 0], sizes[:, 1]
    widest = np.minimum(widths, np.rint(heights * ratio[1]).astype(np.int64)).clip(min=1)
    highest = np.minimum(heights, np.rint(widths / ratio[0]).astype(np.int64)).clip(min=1)
    middle = np.stack([(heights - highest) // 2, (widths - widest) // 2, highest, widest], axis=-1)
    return np.where(fits[:, None], boxes, middle)


def erased_boxes(numbers: np.ndarray, probability: float, size: tuple[int, int]) -> np.ndarray:
    """Boxes to erase (arXiv 1708.04896), without height in images of which nothing is erased.

    Args:
        numbers: Numbers in [0, 1) of shape `(num_images, 41)`.
        probability: How often something is erased, in [0, 1].
        size: Height and width.
    """
    sizes = np.broadcast_to(np.array(size), (len(numbers), 2))
    boxes, fits = tried_boxes(numbers[:, 1:].reshape(-1, 10, 4), sizes, (0.02, 1 / 3), (0.3, 1 / 0.3))
    return boxes * (fits & (numbers[:, 0] < probability))[:, None]


def beta(draws: Callable[[str, int], np.ndarray], purpose: str, alpha: float) -> np.ndarray:
    """Numbers in [0, 1] of the symmetric beta distribution with this parameter, above 0; shape `(num_images,)`."""
    first, second = (_log_gamma(draws, f"{purpose} {number}", alpha) for number in (1, 2))
    return 1 / (1 + np.exp((second - first).clip(max=700)))  # the exponential of more is no float64


def _log_gamma(draws: Callable[[str, int], np.ndarray], purpose: str, alpha: float) -> np.ndarray:
    """Logarithms of numbers of the gamma distribution (Marsaglia and Tsang, 2000, with eight tries of over 95 %)."""
    numbers = draws(purpose, 17)
    normals, evens = normal(numbers[:, :8]), 1 - numbers[:, 8:16]
    shape = alpha + 1 - 1 / 3
    cubes = (1 + normals / np.sqrt(9 * shape)) ** 3
    logs = np.log(cubes.clip(min=1e-300))
    is_taken = (cubes > 0) & (np.log(evens) < normals**2 / 2 + shape * (1 - cubes + logs))
    log = logs[np.arange(len(logs)), is_taken.argmax(1)]
    return np.log(shape) + log + np.log(1 - numbers[:, 16]) / alpha


def mixing_draws(
    draws: Callable[[str, int], np.ndarray],
    mixup_alpha: float,
    cutmix_alpha: float,
    cutmix_probability: float,
    mixing_probability: float,
    size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """The weights of images in their mixtures, and the boxes that CutMix takes of the other image.

    Args:
        draws: Gives numbers in [0, 1) of shape `(num_images, count)` by purpose and count.
        mixup_alpha, cutmix_alpha: Parameters of the beta distributions, 0 for none; not both.
        cutmix_probability: How often CutMix is chosen where both are above 0.
        mixing_probability: How often images are mixed.
        size: Height and width.

    Returns:
        float32 of shape `(num_images,)`, 1 for images that stay as they are, and int64 of shape `(num_images, 4)`.
    """
    numbers = draws("mixing", 4)
    num_images = len(numbers)
    share = 1.0 if not mixup_alpha else cutmix_probability if cutmix_alpha else 0.0
    is_mixed, cuts = numbers[:, 0] < mixing_probability, numbers[:, 1] < share
    weights = beta(draws, "mixup", mixup_alpha) if mixup_alpha else np.ones(num_images)
    boxes = np.zeros((num_images, 4), dtype=np.int64)
    if cutmix_alpha:
        sides = np.sqrt(1 - beta(draws, "cutmix", cutmix_alpha))[:, None] * size
        corners = numbers[:, 2:] * size - sides / 2  # of a box around a point of the image, which cuts it off
        starts = np.rint(corners).astype(np.int64).clip(0, size)
        ends = np.rint(corners + sides).astype(np.int64).clip(0, size)
        is_cut = is_mixed & cuts & (ends > starts).all(1)
        boxes = np.concatenate([starts, ends - starts], axis=1) * is_cut[:, None]
        is_mixed = is_mixed & ~(cuts & ~is_cut)
        weights = np.where(cuts, 1 - boxes[:, 2] * boxes[:, 3] / (size[0] * size[1]), weights)
    return np.where(is_mixed, weights, 1.0).astype(np.float32), boxes
