# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""One image at a time: read as 8 bits whatever it is stored as, measured, and named when it cannot be read."""

import io
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Array2D, Array3D, Dataset
from datasets import Image as ImageFeature
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from .class_labels import unformatted


_ORIENTATION = 0x0112  # EXIF tag
# Of tar files, `datasets` takes the endings of the first images
MISSING = "it is missing (in tar files all images need one ending, such as .jpg; .jpeg is another)"
_SHOWN = 5  # damaged images that a message names


def to_pil(image: Any, mode: str) -> PILImage.Image:
    """An image of 8 bits a channel.

    16-bit images (grey PNG and TIFF, arrays of dtype uint16) and floats in [0, 1] are scaled to 0..255. PIL alone
    would cut them off: all white, or all black.

    Args:
        image: A PIL image, or an array (nested lists too) of shape `(height, width)`, `(height, width, channels)` or
            `(channels, height, width)`.
        mode: "RGB", or "L" for grey.

    Raises:
        `ValueError`: if there is no image, or its numbers have a range that is not known.
    """
    if image is None:
        raise ValueError(MISSING)
    if not isinstance(image, PILImage.Image):
        return PILImage.fromarray(_channels_last(_to_uint8(np.asarray(image)))).convert(mode)
    if image.mode.startswith("I;16"):
        image = PILImage.fromarray(_to_uint8(np.asarray(image).astype(np.uint16)))
    elif image.mode == "I" and image.format == "PNG":  # how Pillow before 11 opens 16 bits
        image = PILImage.fromarray(_to_uint8(np.asarray(image).clip(0, 65535).astype(np.uint16)))
    elif image.mode in ("I", "F"):
        image = PILImage.fromarray(_to_uint8(np.asarray(image)))
    return image.convert(mode)


def read_images(dataset: Dataset, rows: list[int]) -> list:
    """The images of these rows: PIL images, or arrays of the type they were stored with, which lists do not tell."""
    images = dataset[rows]["image"]
    feature = dataset.features["image"]
    if isinstance(feature, (Array2D, Array3D)):
        return [np.asarray(image, dtype=feature.dtype) for image in images]
    return images


def is_grey(image: Any) -> bool:
    """Whether a PIL image or an array has one channel."""
    if isinstance(image, PILImage.Image):
        return image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")
    return _channels_last(np.asarray(image)).ndim == 2


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.uint16:
        return np.round(pixels / 257).astype(np.uint8)  # 65535 -> 255
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind not in "iuf" or pixels.size == 0:
        raise ValueError(f"it is an array of dtype {pixels.dtype} and shape {pixels.shape}")
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f":
        if not (low >= 0 and high <= 1):  # also not-a-number
            raise ValueError(
                f"it holds floats from {low:.4g} to {high:.4g}; floats must be in [0, 1], and numbers from 0 to 255 "
                f"of dtype uint8"
            )
        return np.round(pixels * 255).astype(np.uint8)
    if low < 0 or high > 255:
        raise ValueError(
            f"it holds integers from {low} to {high} of dtype {pixels.dtype}; they must be from 0 to 255, or of "
            f"dtype uint16"
        )
    return pixels.astype(np.uint8)


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ValueError(f"it is an array of shape {pixels.shape}; it must be (height, width) or (height, width, 3)")
    return pixels


def typical_image_size(dataset: Dataset, num_images: int = 100, seed: int = 0) -> tuple[int, int]:
    """The median height and the median width of some images, in pixels.

    Only the headers of image files are read, so that this takes milliseconds. Images that cannot be read do not count.

    Args:
        dataset: A dataset with a column `image`.
        num_images: How many images are looked at, drawn by `seed`; at least 1.
        seed: Seed of the draw, at least 0.

    Raises:
        `ValueError`: if `num_images` is out of range, or none of these images can be read.
    """
    heights, widths = zip(*_of_some_images(dataset, _size, num_images, seed))
    return statistics.median_low(heights), statistics.median_low(widths)


def are_mostly_grey(dataset: Dataset, num_images: int = 100, seed: int = 0) -> bool:
    """Whether more than half of some images have one channel, as [`is_grey`] says.

    Args:
        dataset, num_images, seed: As for [`typical_image_size`], and so are the images that are looked at.

    Raises:
        `ValueError`: as in [`typical_image_size`].
    """
    return statistics.mean(_of_some_images(dataset, is_grey, num_images, seed)) > 0.5


def _of_some_images(dataset: Dataset, measure: Callable[[Any], Any], num_images: int, seed: int) -> list:
    """What `measure` gives for those of some images that can be read: PIL images, not decoded, or arrays."""
    if num_images < 1:
        raise ValueError(f"`num_images` is {num_images}; it must be at least 1.")
    rows = draw_rows(len(dataset), num_images, seed)
    stored = undecoded(unformatted(dataset))
    measured = []
    for row in rows:
        try:
            measured.append(_measured(stored[row]["image"], measure))
        except Exception:  # PIL raises OSError, SyntaxError, DecompressionBombError and more
            continue
    if not measured:
        raise ValueError(f"None of {len(rows)} images of the dataset can be read. {damaged_message(dataset, rows)}")
    return measured


def _measured(image: Any, measure: Callable[[Any], Any]) -> Any:
    if not isinstance(image, dict):
        return measure(np.asarray(image))
    with PILImage.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as file:
        return measure(file)


def _size(image: Any) -> tuple[int, int]:
    """Height and width of a PIL image or an array."""
    return oriented_size(image) if isinstance(image, PILImage.Image) else _channels_last(image).shape[:2]


def oriented_size(image: PILImage.Image) -> tuple[int, int]:
    """Height and width of an image that may not be decoded yet, turned as its EXIF data says."""
    width, height = image.size
    # A PNG file is decoded to its end for its EXIF data, which hardly any has
    is_turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(_ORIENTATION, 1) >= 5
    return (width, height) if is_turned else (height, width)


def draw_rows(num_rows: int, max_samples: int | None, seed: int) -> list[int]:
    """Which rows a limited number of samples are: all rows in their order, if there are no more.

    Else they are drawn by `seed` as by `dataset.shuffle(seed=seed)`, so data sorted by class gives images of all
    classes.
    """
    if max_samples is None or max_samples >= num_rows:
        return list(range(num_rows))
    return np.random.default_rng(seed).permutation(num_rows)[:max_samples].tolist()


def own_rows(dataset: Dataset) -> np.ndarray:
    """The rows of a dataset as they were numbered before `select`, `shuffle`, `train_test_split` and the like."""
    indices = dataset._indices  # there is no public way to them
    return np.arange(len(dataset)) if indices is None else indices.column(0).to_numpy()


def damaged_message(dataset: Dataset, rows: list[int], mode: str = "RGB") -> str:
    """Says which images cannot be read and why, by their files and rows.

    The rows are those of the dataset as it was loaded, before `shuffle`, `train_test_split` or `select`. (`select` of
    a contiguous range leaves no trace of where it began.)
    """
    own = own_rows(dataset)
    stored = undecoded(dataset)
    described = []
    for row in rows[:_SHOWN]:
        image = stored[row]["image"]
        path = image.get("path") if isinstance(image, dict) else None
        described.append((f"row {own[row]}" + (f" ({path!r})" if path else ""), _reason(dataset, row, mode)))
    if len(rows) == 1:
        return "The image in {} cannot be read: {}.".format(*described[0])
    listed = "; ".join(f"{name}: {reason}" for name, reason in described)
    more = f"; and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"{len(rows)} of {len(dataset)} images cannot be read: {listed}{more}."


def _reason(dataset: Dataset, row: int, mode: str) -> str:
    try:
        to_pil(read_images(dataset, [row])[0], mode)
    except Exception as error:  # PIL raises OSError, SyntaxError, DecompressionBombError and more
        return reason_of(error)
    return "it could not be read a moment ago"


def reason_of(error: Exception) -> str:
    """Why an image cannot be read, for a message."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, UnidentifiedImageError):  # whose text names a memory address
        return "it is not an image of a known format"
    return str(error).strip().rstrip(".") or type(error).__name__


def undecoded(dataset: Dataset) -> Dataset:
    """Gives image files as `{"bytes", "path"}`."""
    if isinstance(dataset.features["image"], ImageFeature):
        return dataset.cast_column("image", ImageFeature(decode=False))
    return dataset
