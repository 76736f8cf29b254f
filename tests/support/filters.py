"""Filters of images by NumPy, as what ours are held against."""

import math

import numpy as np


def blur(image: np.ndarray, std: float) -> np.ndarray:
    """Under a Gaussian, the edges continued: of shape `(height, width, channels)`."""
    radius = math.ceil(3 * std)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
    image = np.pad(image.astype(float), [(radius, radius)] * 2 + [(0, 0)], mode="edge")
    for axis in (0, 1):
        image = np.apply_along_axis(lambda line: np.convolve(line, weights / weights.sum(), "valid"), axis, image)
    return image
