"""Small images, and datasets of them in memory and in files."""

import gzip
import struct

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from hf_layershuffle.data.augmentation_settings import AUGMENTATION_PRESETS, Augmentation


def random_images(count: int, size=(8, 8), mode: str = "RGB", seed: int = 0) -> list[PILImage.Image]:
    rng = np.random.default_rng(seed)
    shape = (*size, 3) if mode == "RGB" else size
    return [PILImage.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode=mode) for _ in range(count)]


def image_dataset(count: int = 10, names=("cat", "dog"), image="image", label="label", **kwargs) -> Dataset:
    features = Features({image: Image(), label: ClassLabel(names=list(names))})
    labels = [index % len(names) for index in range(count)]
    return Dataset.from_dict({image: random_images(count, **kwargs), label: labels}, features=features)


def write_idx(path, array: np.ndarray) -> None:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def processor(size: int = 8, channels: int = 3):
    return ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.4] * channels, image_std=[0.3] * channels
    )


def write_images(folder, *names: str) -> None:
    for name, image in zip(names, random_images(len(names))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)


def in_classes(*classes: str, count: int = 3) -> list[str]:
    return [f"{name}/{index}.png" for name in classes for index in range(count)]


def save(folder, **splits):
    DatasetDict(splits).save_to_disk(folder / "data")
    return str(folder / "data")


AUGMENTATIONS = (*AUGMENTATION_PRESETS, "corruptions")  # the presets, and the one policy that draws pixels


def augmentation_named(name: str, **changes) -> Augmentation:
    """A preset, or a policy and nothing else."""
    if name in AUGMENTATION_PRESETS:
        return Augmentation.from_preset(name, **changes)
    return Augmentation.from_preset("none", policy=name, **changes)
