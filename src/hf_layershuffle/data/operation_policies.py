# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""RandAugment, TrivialAugment and corruptions: which operation an image gets, and how strong."""

from typing import NamedTuple

import numpy as np


# Operations on levels, those that blend images with others, those that move pixels, and those that make them worse
TABLES = ("invert", "posterize", "solarize", "solarize_add", "brightness", "contrast", "auto_contrast", "equalize")
BLENDS = ("color", "sharpness")
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
FILTERS = ("blur", "noise")
OPERATIONS = (
    "identity",
    *TABLES,
    *BLENDS,
    *MOVES,
    *FILTERS,
)  # the place of a name is its code in a batch's `operations`


class Range(NamedTuple):
    """What an operation is told at levels 0 and 1, in the operation's own unit.

    The units are degrees (rotate), bits that are kept (posterize), the level of grey from which on is inverted
    (solarize), levels of grey (solarize_add, and noise's standard deviation), what a factor differs by from 1 (color,
    contrast, brightness, sharpness), pixels sideways for each pixel across (shear), pixels or fractions of the side
    (translate), and fractions of [`strongest_blur`] (blur's standard deviation).
    """

    weakest: float = 0.0
    strongest: float = 0.0
    has_sign: bool = False  # half of the images get the negative
    is_whole: bool = False
    by_size: bool = False  # it is a fraction of what an image's size says


_FACTOR = Range(0, 0.9, has_sign=True)
_ONLY_MORE = Range(0, 0.9)
_SHEAR = Range(0, 0.3, has_sign=True)
_SHIFT = Range(0, 0.45, has_sign=True, by_size=True)
_WIDE_FACTOR = Range(0, 0.99, has_sign=True)
_WIDE_SHEAR = Range(0, 0.99, has_sign=True)
_WIDE_SHIFT = Range(0, 32, has_sign=True)
_NOISE = 51.0  # a fifth of the range
_LOWER_CONTRAST = -0.7
POLICIES: dict[str, dict[str, Range]] = {
    # Cubuk et al., arXiv 1909.13719, with the ranges that grow with the level, as DeiT was trained with
    "randaugment": {
        "auto_contrast": Range(),
        "equalize": Range(),
        "invert": Range(),
        "rotate": Range(0, 30, has_sign=True),
        "posterize": Range(4, 0, is_whole=True),
        "solarize": Range(256, 0, is_whole=True),
        "solarize_add": Range(0, 110, is_whole=True),
        "color": _FACTOR,
        "contrast": _FACTOR,
        "brightness": _FACTOR,
        "sharpness": _FACTOR,
        "shear_x": _SHEAR,
        "shear_y": _SHEAR,
        "translate_x": _SHIFT,
        "translate_y": _SHIFT,
    },
    # As Beyer et al. trained plain ViTs, arXiv 2205.01580: the operations of their code at the highest level, but for
    # its cutout. Below it they are weaker here. There, images turn black or inverted at low levels
    "randaugment_plain_vit": {
        "auto_contrast": Range(),
        "equalize": Range(),
        "invert": Range(),
        "rotate": Range(0, 30, has_sign=True),
        "posterize": Range(8, 4, is_whole=True),
        "solarize": Range(256, 256, is_whole=True),  # which changes nothing
        "solarize_add": Range(0, 110, is_whole=True),
        "color": _ONLY_MORE,
        "contrast": _ONLY_MORE,
        "brightness": _ONLY_MORE,
        "sharpness": _ONLY_MORE,
        "shear_x": _SHEAR,
        "shear_y": _SHEAR,
        "translate_x": _SHIFT,
        "translate_y": _SHIFT,
    },
    # Müller and Hutter, arXiv 2103.10158, the wide ranges of table 7
    "trivialaugment": {
        "identity": Range(),
        "auto_contrast": Range(),
        "equalize": Range(),
        "rotate": Range(0, 135, has_sign=True),
        "posterize": Range(8, 2, is_whole=True),
        "solarize": Range(256, 0, is_whole=True),
        "color": _WIDE_FACTOR,
        "contrast": _WIDE_FACTOR,
        "brightness": _WIDE_FACTOR,
        "sharpness": _WIDE_FACTOR,
        "shear_x": _WIDE_SHEAR,
        "shear_y": _WIDE_SHEAR,
        "translate_x": _WIDE_SHIFT,
        "translate_y": _WIDE_SHIFT,
    },
    # Lower quality, as in arXiv 1903.12261: at random, to train with, or each in full strength, to measure on
    "corruptions": {
        "identity": Range(),
        "blur": Range(0, 1, by_size=True),
        "noise": Range(0, _NOISE),
        "contrast": Range(0, _LOWER_CONTRAST),
    },
    "blur": {"blur": Range(1, 1, by_size=True)},
    "noise": {"noise": Range(_NOISE, _NOISE)},
    "low_contrast": {"contrast": Range(_LOWER_CONTRAST, _LOWER_CONTRAST)},
}
CORRUPTIONS = ("blur", "noise", "low_contrast")
COLOUR_OPERATIONS = ("color",)  # which do nothing to grey images
# These give an image one operation, always, of one of so many strengths
ONE_OPERATION = ("trivialaugment", "corruptions", *CORRUPTIONS)
NUM_STRENGTHS = 31


def policies_with_strength() -> list[str]:
    """The policies that are told how many operations an image gets, and how strong."""
    return [name for name in POLICIES if name not in ONE_OPERATION]


def strongest_blur(shorter_side: int) -> float:
    """The largest standard deviation of blur, in pixels, for images of this shorter side: 4 at 224, and 1 at least."""
    return max(1.0, shorter_side / 56)


def chosen_operations(
    policy: str, choices: np.ndarray, levels: np.ndarray, signs: np.ndarray, image_shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of operations, and what each is told.

    Args:
        policy: A key of `POLICIES`.
        choices: Numbers in [0, 1) of any shape, which choose evenly among the policy's operations. Those of colours
            are not among them for images of one channel.
        levels: Strengths in [0, 1], of the same shape.
        signs: Numbers in [0, 1) of the same shape. Below 0.5 an operation goes the other way, if it has two.
        image_shape: Channels, height and width.

    Returns:
        int64 and float32 of the same shape: codes (see `OPERATIONS`), and magnitudes in the units of [`Range`], where
        translations and blur are in pixels.
    """
    num_channels, height, width = image_shape
    space = POLICIES[policy]
    names = [name for name in space if num_channels > 1 or name not in COLOUR_OPERATIONS]
    places = (choices * len(names)).astype(np.int64)
    codes = np.array([OPERATIONS.index(name) for name in names])[places]
    sides = {"translate_x": width, "translate_y": height, "blur": strongest_blur(min(height, width))}
    scale = np.array([sides.get(name, 1) if space[name].by_size else 1 for name in names])[places]
    weakest, strongest = (
        np.array([getattr(space[name], end) for name in names])[places] for end in ("weakest", "strongest")
    )
    values = (weakest + (strongest - weakest) * levels) * scale
    is_whole, has_sign = (
        np.array([getattr(space[name], flag) for name in names])[places] for flag in ("is_whole", "has_sign")
    )
    # Falling numbers are rounded up and growing ones down: to the weaker side
    whole = np.where(strongest < weakest, np.ceil(values - 1e-9), np.floor(values + 1e-9))
    values = np.where(is_whole, whole, values)
    return codes, np.where(has_sign & (signs < 0.5), -values, values).astype(np.float32)
