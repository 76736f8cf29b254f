# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Random numbers of an image in an epoch, whatever batch, process or run it is in."""

import zlib
from typing import Any

import numpy as np


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seed: int, epoch: int, indices: np.ndarray, purpose: str, count: int = 1) -> np.ndarray:
    """Numbers in [0, 1) that are a function of the arguments alone.

    They are the output of SplitMix64's mixing function (Steele, Lea and Flood, 2014) on a counter, so an image's
    numbers need no others to be drawn first: a stream may begin anywhere, and workers need not agree.

    Args:
        seed: Seed of the augmentation, an integer of at least 0.
        epoch: Number of the pass over the data, at least 0.
        indices: Integers of shape `(num_images,)`, at least 0: the numbers of the images in the dataset or stream.
        purpose: What the numbers are for, such as "crop". Those of two purposes are unrelated.
        count: How many numbers an image, at least 1.

    Returns:
        float64 of shape `(num_images, count)`.
    """
    key: Any = np.uint64(0)
    for part in (seed, epoch, zlib.crc32(purpose.encode())):
        key = _mix(np.asarray(key ^ np.uint64(part % 2**64)) + _GOLDEN)
    of_image = _mix(np.asarray(indices).astype(np.uint64) + key)
    bits = _mix(of_image[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer. Overflow is meant."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
