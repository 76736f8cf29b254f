# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A digest that tells datasets apart, wherever they lie."""

import json
from collections.abc import Iterator
from typing import cast

import numpy as np
from datasets import ClassLabel, Dataset
from datasets.fingerprint import Hasher

from .image_fingerprint import fingerprint_file
from .image_reading import undecoded


_NUM_EXAMPLES = 16


def split_digest(split: Dataset) -> str:
    """A digest of the classes, of all labels in their order, and of up to 16 examples, evenly spread.

    The same data have the same one in another folder or on another machine. No other example is read, so it is cheap
    for any number of them; a change of a few inputs that leaves the labels as they are may not be noticed.

    Args:
        split: A split with the columns `image`, or `text` and maybe `text_pair`, and `label`.

    Returns:
        16 hexadecimal digits.
    """
    names = cast(ClassLabel, split.features["label"]).names
    labels = np.asarray(split.with_format("numpy", columns=["label"])["label"][:], dtype="<i8")
    return Hasher.hash_bytes([json.dumps(names).encode(), labels.tobytes(), *_examples(split)])


def _examples(split: Dataset) -> Iterator[bytes]:
    stored = undecoded(split) if "image" in split.features else split
    count = min(_NUM_EXAMPLES, len(split))
    for row in np.linspace(0, len(split) - 1, count).round().astype(int).tolist():
        example = stored[row]
        for name in sorted(example.keys() - {"label"}):
            value = example[name]
            if isinstance(value, dict):  # an image: its bytes, or the path to its file
                yield value["bytes"] or fingerprint_file(value["path"]).encode()
            else:
                yield json.dumps(value).encode()
