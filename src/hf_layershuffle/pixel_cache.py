# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Decoded images, kept as uint8: in a memory-mapped file beside the dataset's own cache files, or in memory.

The file is named after all that its content depends on, written under another name and then renamed: it is either complete or
not there, also when two processes decode the same dataset at once.
"""

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL
import torch
import transformers
from datasets import Dataset, are_progress_bars_disabled, is_caching_enabled
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)
FORMAT = 1
CHUNK = 256  # images decoded at a time
MAX_MEMORY_BYTES = 2 * 2**30
# Applied to decoded images whenever they are read
_LATER_SETTINGS = ("do_normalize", "do_rescale", "image_mean", "image_std", "rescale_factor")


def load_pixels(
    dataset: Dataset,
    decode: Callable[[list[int]], torch.Tensor],
    image_shape: tuple[int, int, int],
    settings: dict,
    *,
    max_bytes: int,
    description: str = "Decoding images",
) -> torch.Tensor | None:
    """All images of a dataset, decoded now or by an earlier run.

    Args:
        dataset (`datasets.Dataset`)
        decode: Gives the images of a list of rows as uint8 of shape `(rows, *image_shape)`.
        image_shape (`tuple[int, int, int]`): Channels, height and width.
        settings (`dict`): All else that the pixels depend on, such as those of the image processor.
        max_bytes (`int`): The most bytes to keep, in a file; in memory at most 2 GiB of them.
        description (`str`): Of the progress bar, which `datasets.disable_progress_bars()` switches off.

    Returns:
        `torch.Tensor` of dtype uint8 and shape `(len(dataset), *image_shape)`, or None if that is too large.
    """
    nbytes = len(dataset) * math.prod(image_shape)
    if nbytes > max_bytes:
        return None
    shape = (len(dataset), *image_shape)
    path = cache_path(dataset, {**settings, "shape": shape})
    if path is not None and not _is_complete(path, nbytes):
        path = _write(path, nbytes, _decode_all(len(dataset), decode, description))
    if path is not None:
        # Mapped privately: only the pages that are read take memory, and processes share them
        return torch.from_file(str(path), shared=False, size=nbytes, dtype=torch.uint8).view(shape)
    if nbytes > MAX_MEMORY_BYTES:
        return None
    pixels, start = torch.empty(shape, dtype=torch.uint8), 0
    for chunk in _decode_all(len(dataset), decode, description):
        pixels[start : start + len(chunk)] = chunk
        start += len(chunk)
    return pixels


def cache_path(dataset: Dataset, settings: dict) -> Path | None:
    """Where the pixels of a dataset belong; None for a dataset that lies in memory, or if caching is switched off."""
    if not dataset.cache_files or not is_caching_enabled():
        return None
    settings = {name: value for name, value in settings.items() if name not in _LATER_SETTINGS}
    settings |= {"format": FORMAT, "transformers": transformers.__version__, "pillow": PIL.__version__}
    key = Hasher.hash((dataset._fingerprint, json.dumps(settings, sort_keys=True, default=str)))
    return Path(dataset.cache_files[0]["filename"]).parent / f"layershuffle-pixels-{key}.uint8"


def _is_complete(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


def _decode_all(count: int, decode, description: str) -> Iterator[torch.Tensor]:
    with tqdm(total=count, desc=description, unit="image", disable=are_progress_bars_disabled()) as progress:
        for start in range(0, count, CHUNK):
            indices = list(range(start, min(start + CHUNK, count)))
            yield decode(indices)
            progress.update(len(indices))


def _write(path: Path, nbytes: int, chunks: Iterator[torch.Tensor]) -> Path | None:
    """Returns the path, or None, with nothing decoded, where no file of this size can be written."""
    try:
        if shutil.disk_usage(path.parent).free < nbytes + 2**30:
            return None
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
    except OSError as error:  # a folder that belongs to another user, or a file system that can only be read
        logger.info("Decoded images are kept in memory, not beside the dataset: %s", error)
        return None
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk.contiguous().numpy())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path
