# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Datasets that are arrays: scikit-learn's digits, and folders of MNIST-style IDX files."""

import gzip
import struct
from pathlib import Path

import numpy as np
from datasets import Array2D, ClassLabel, Dataset, Features, Value


_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def load_digits_dataset() -> Dataset:
    """scikit-learn's 1,797 hand-written digits of 8 × 8 pixels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "The dataset 'digits' comes with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    names = [str(name) for name in digits.target_names]
    return _array_dataset(pixels, digits.target, ClassLabel(names=names))


def load_idx_folder(folder: Path) -> dict[str, Dataset]:
    """The splits of a folder of MNIST-style IDX files, plain or gzipped. Labels are integers."""
    arrays = {
        split: tuple(_read_idx(_idx_path(folder, name), ndim) for name, ndim in zip(names, (3, 1)))
        for split, names in _IDX_FILES.items()
    }
    for split, (pixels, labels) in arrays.items():
        if len(pixels) != len(labels):
            raise ValueError(f"'{folder}' holds {len(pixels)} images and {len(labels)} labels in its {split} part.")
    return {split: _array_dataset(pixels, labels, Value("int64")) for split, (pixels, labels) in arrays.items()}


def _idx_path(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise ValueError(f"The IDX folder '{folder}' lacks the file '{name}' (or '{name}.gz').")


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads unsigned bytes from an IDX file (the format of MNIST): two zeros, type 8, `ndim`, the sizes, the data."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
        magic, *shape = struct.unpack_from(f">{1 + ndim}I", content)
        if magic != 0x0800 + ndim:
            raise ValueError(f"it starts with {magic:#010x}, not {0x0800 + ndim:#010x}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise ValueError(f"'{path}' is not a complete IDX file of {ndim}-dimensional bytes: {error}.") from error


def _array_dataset(pixels: np.ndarray, labels: np.ndarray, label_feature: ClassLabel | Value) -> Dataset:
    features = Features({"image": Array2D(pixels.shape[1:], "uint8"), "label": label_feature})
    return Dataset.from_dict({"image": pixels, "label": labels.astype(np.int64)}, features=features)
