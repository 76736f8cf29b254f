# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Decoded images, kept as uint8: in a memory-mapped file beside the dataset's own cache files, or in memory.

The file is named after all that its content depends on, written under another name and then renamed: it is either
complete or not there, also when two processes decode the same dataset at once. Behind the images it holds one byte an
image: 1 where the image is damaged.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from datasets import Dataset, are_progress_bars_disabled, is_caching_enabled
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ..common.files import remove_leftovers, replaced_file
from .image_fingerprint import fingerprint_images


logger = logging.getLogger(__name__)
FORMAT = 2
CHUNK = 256  # images decoded at a time
MAX_MEMORY_BYTES = 2 * 2**30
_PREFIX = "layershuffle-pixels-"
# Applied to decoded images whenever they are read
_LATER_SETTINGS = ("do_normalize", "do_rescale", "image_mean", "image_std", "rescale_factor")
Decode = Callable[[list[int]], tuple[torch.Tensor, list[int]]]


class DamagedImagesError(ValueError):
    """Some images cannot be read: those of `rows`."""

    def __init__(self, rows: list[int]):
        super().__init__(f"{len(rows)} images cannot be read")
        self.rows = rows


def load_pixels(
    dataset: Dataset,
    decode: Decode,
    image_shape: tuple[int, int, int],
    settings: dict,
    *,
    max_bytes: int,
    keep_damaged: bool = False,
    description: str = "Decoding images",
) -> tuple[torch.Tensor, list[int]] | None:
    """All images of a dataset, decoded now or by an earlier run.

    Args:
        decode: Gives the images of a list of rows as uint8 of shape `(rows, *image_shape)`, and those of the rows that
            cannot be read, in whose place there may be any pixels.
        image_shape: Channels, height and width.
        settings: All else that the pixels depend on, such as the settings of the image processor.
        max_bytes: The most bytes to keep in a file. In memory it is at most 2 GiB.
        keep_damaged: Whether to return damaged images with the others.
        description: Text beside the progress bar, which `datasets.disable_progress_bars()` switches off.

    Returns:
        The images as uint8 of shape `(len(dataset), *image_shape)`, and the rows of damaged ones. None if they are too
        large.

    Raises:
        `DamagedImagesError`: if there are damaged images, of which all are looked for, and `keep_damaged` is false.
    """
    nbytes = len(dataset) * math.prod(image_shape)
    if nbytes > max_bytes:
        return None
    shape = (len(dataset), *image_shape)
    path = cache_path(dataset, {**settings, "shape": shape})
    is_damaged = np.zeros(len(dataset), dtype=np.uint8)
    chunks = _decode_all(decode, is_damaged, image_shape, keep_damaged, description)
    if path is not None and not _is_complete(path, nbytes + len(dataset)):
        path = _write(path, nbytes, chunks, is_damaged)
    if path is not None:
        # Mapped privately: only the pages that are read take memory, and processes share them
        pixels = torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8).view(shape)
        is_damaged = np.fromfile(path, dtype=np.uint8, offset=nbytes)
    elif nbytes > MAX_MEMORY_BYTES:
        return None
    else:
        pixels = torch.empty(shape, dtype=torch.uint8)
        start = 0
        for chunk in chunks:
            pixels[start : start + len(chunk)] = chunk
            start += len(chunk)
    damaged = np.flatnonzero(is_damaged).tolist()
    if damaged and not keep_damaged:
        raise DamagedImagesError(damaged)
    return pixels, damaged


def cache_path(dataset: Dataset, settings: dict) -> Path | None:
    """Where the pixels of a dataset belong; None for a dataset that lies in memory, or if caching is switched off.

    The name tells what is in the images (see [`fingerprint_images`]), not when they were written.
    """
    if not dataset.cache_files or not is_caching_enabled():
        return None
    settings = {name: value for name, value in settings.items() if name not in _LATER_SETTINGS}
    settings |= {"format": FORMAT, "transformers": transformers.__version__, "pillow": PIL.__version__}
    key = Hasher.hash((fingerprint_images(dataset), json.dumps(settings, sort_keys=True, default=str)))
    return Path(dataset.cache_files[0]["filename"]).parent / f"{_PREFIX}{key}.uint8"


def _is_complete(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


def _decode_all(
    decode: Decode, is_damaged: np.ndarray, image_shape: tuple, keep_damaged: bool, description: str
) -> Iterator[torch.Tensor]:
    """Images in chunks. Fills `is_damaged`, and raises at the end where damaged images are not wanted."""
    count = len(is_damaged)
    with tqdm(total=count, desc=description, unit="image", disable=are_progress_bars_disabled()) as progress:
        for start in range(0, count, CHUNK):
            indices = list(range(start, min(start + CHUNK, count)))
            pixels, damaged = decode(indices)
            is_damaged[damaged] = 1
            if tuple(pixels.shape[1:]) != tuple(image_shape):
                raise ValueError(unequal_sizes(image_shape, tuple(pixels.shape[1:])))
            yield pixels
            progress.update(len(indices))
    if is_damaged.any() and not keep_damaged:
        raise DamagedImagesError(np.flatnonzero(is_damaged).tolist())


def unequal_sizes(one: tuple[int, ...], another: tuple[int, ...]) -> str:
    return (
        f"Images come out of the image processor as {list(one)} and as {list(another)}; it must resize all to one "
        "size: set its `do_resize` and `size`, or its `do_center_crop` and `crop_size`."
    )


def _write(path: Path, nbytes: int, chunks: Iterator[torch.Tensor], is_damaged: np.ndarray) -> Path | None:
    """Returns the path, or None, with nothing decoded, where no file of this size can be written."""
    with ExitStack() as stack:
        try:
            remove_leftovers(path.parent)
            if shutil.disk_usage(path.parent).free < nbytes + 2**30:
                return None
            partial = stack.enter_context(replaced_file(path))
        except OSError as error:  # a folder that belongs to another user, or a file system that can only be read
            logger.info("Decoded images are kept in memory, not beside the dataset: %s", error)
            return None
        with open(partial, "wb") as file:
            for chunk in chunks:
                file.write(chunk.contiguous().numpy().data)
            file.write(is_damaged.tobytes())
    return path
