# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Image classification data: by name, Hub id, Parquet or image folder, or MNIST-style IDX files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers import default_data_collator


IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")
EVALUATION_SPLITS = ("validation", "valid", "val", "test")
_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def load_image_datasets(
    dataset_name: str,
    dataset_config_name: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.2,
    seed: int = 0,
    **load_kwargs,
) -> DatasetDict:
    """Loads a dataset as `{"train", "test"}` with the columns `image` and `label` (a `ClassLabel`).

    Args:
        dataset_name (`str`): `"digits"` (scikit-learn's 1,797 hand-written digits, 8×8, no download), a folder of
            Parquet files, of images in one folder a class, of MNIST-style IDX files (plain or gzipped) or written by
            `save_to_disk`, or a dataset id on the Hub.
        dataset_config_name (`str`, *optional*): Configuration of a Hub dataset.
        image_column, label_column (`str`, *optional*): Found by feature type, then by usual names, if not given.
        train_split (`str`): Split to train on.
        eval_split (`str`, *optional*): Split to evaluate on. Defaults to the first of `validation`, `valid`, `val` and
            `test` that is there; without any, or where it is `train_split`, `eval_fraction` of the training split is
            held out.
        eval_fraction (`float`): Fraction in (0, 1), stratified by class.
        seed (`int`): Seed of the held-out part.
        load_kwargs: Passed to `datasets.load_dataset`.

    Raises:
        `ValueError`: if there is no such dataset, split or column, if a split is empty, or a label outside the classes.
    """
    if not 0 < eval_fraction < 1:
        raise ValueError(f"`eval_fraction` is {eval_fraction}; it must be a fraction in (0, 1).")
    splits = _load_splits(dataset_name, dataset_config_name, load_kwargs)
    if train_split not in splits:
        raise ValueError(f"Dataset '{dataset_name}' has no split '{train_split}'; it has {_names(splits)}.")
    if eval_split is not None and eval_split not in splits:
        raise ValueError(f"Dataset '{dataset_name}' has no split '{eval_split}'; it has {_names(splits)}.")
    if eval_split == train_split:
        eval_split = None
    else:
        eval_split = eval_split or next((name for name in EVALUATION_SPLITS if name in splits), None)

    chosen = {"train": splits[train_split]} | ({"test": splits[eval_split]} if eval_split else {})
    for name, split in chosen.items():
        if len(split) == 0:
            raise ValueError(f"Dataset '{dataset_name}' is empty in the split used for '{name}'.")
    features = chosen["train"].features
    image_column = _find_column(features, image_column, IMAGE_COLUMNS, (Image, Array2D), "image", dataset_name)
    label_column = _find_column(features, label_column, LABEL_COLUMNS, (ClassLabel,), "label", dataset_name)
    chosen = {name: _standard_columns(split, image_column, label_column, name) for name, split in chosen.items()}
    chosen = _with_class_labels(chosen, dataset_name)
    if eval_split is None:
        try:
            held_out = chosen["train"].train_test_split(eval_fraction, seed=seed, stratify_by_column="label")
        except ValueError as error:
            raise ValueError(
                f"Dataset '{dataset_name}' has one split only, and {eval_fraction:.0%} of it cannot be held out for "
                f"evaluation: {error} Give an evaluation split, or more images of each class."
            ) from error
        chosen = {"train": held_out["train"], "test": held_out["test"]}
    return DatasetDict(chosen)


def _names(names) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _load_splits(dataset_name: str, dataset_config_name: str | None, load_kwargs: dict) -> dict[str, Dataset]:
    if dataset_name == "digits":
        return {"train": _load_digits()}
    folder = Path(dataset_name).expanduser()
    if not folder.is_dir() and (dataset_name.startswith((".", "/", "~")) or dataset_name.count("/") > 1):
        raise ValueError(f"There is no dataset folder '{dataset_name}'.")
    if folder.is_dir() and any(folder.glob("*-idx3-ubyte*")):
        return _load_idx_folder(folder)
    try:
        if folder.is_dir() and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists()):
            loaded = load_from_disk(str(folder))
        else:
            loaded = load_dataset(str(folder) if folder.is_dir() else dataset_name, dataset_config_name, **load_kwargs)
    except Exception as error:  # the errors of a dozen readers and of the network share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Dataset '{dataset_name}' cannot be loaded: {reason.rstrip('.!')}. Pass 'digits', a folder of Parquet files, images or "
            "IDX files, or a dataset id on the Hub."
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _load_digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "The dataset 'digits' comes with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    return _array_dataset(pixels, digits.target, [str(name) for name in digits.target_names])


def _load_idx_folder(folder: Path) -> dict[str, Dataset]:
    arrays = {
        split: tuple(_read_idx(_idx_path(folder, name), ndim) for name, ndim in zip(names, (3, 1)))
        for split, names in _IDX_FILES.items()
    }
    for split, (pixels, labels) in arrays.items():
        if len(pixels) != len(labels):
            raise ValueError(f"'{folder}' holds {len(pixels)} images and {len(labels)} labels in its {split} part.")
    num_classes = int(max(labels.max(initial=0) for _, labels in arrays.values())) + 1
    names = [str(index) for index in range(num_classes)]
    return {split: _array_dataset(pixels, labels, names) for split, (pixels, labels) in arrays.items()}


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


def _array_dataset(pixels: np.ndarray, labels: np.ndarray, class_names: list[str]) -> Dataset:
    features = Features({"image": Array2D(pixels.shape[1:], "uint8"), "label": ClassLabel(names=class_names)})
    return Dataset.from_dict({"image": pixels, "label": labels.astype(np.int64)}, features=features)


def _find_column(features, requested, usual_names, feature_types, kind: str, dataset_name: str) -> str:
    if requested is not None:
        if requested not in features:
            raise ValueError(f"Dataset '{dataset_name}' has no column '{requested}'; it has {_names(features)}.")
        return requested
    by_name = [name for name in usual_names if name in features]
    by_type = [name for name, feature in features.items() if isinstance(feature, feature_types)]
    # A usual name of the right type, else the one column of that type, else a usual name
    candidates = [name for name in by_name if name in by_type] or by_type or by_name
    if not candidates:
        raise ValueError(
            f"Dataset '{dataset_name}' has no {kind} column that could be told by its type or name; it has "
            f"{_names(features)}. Name it with `{kind}_column` (--{kind}_column_name)."
        )
    return candidates[0]


def _standard_columns(split: Dataset, image_column: str, label_column: str, name: str) -> Dataset:
    for column in (image_column, label_column):
        if column not in split.features:
            raise ValueError(f"The split used for '{name}' has no column '{column}'; it has {_names(split.features)}.")
    split = split.select_columns([image_column, label_column])
    new_names = {image_column: "image", label_column: "label"}
    return split.rename_columns({old: new for old, new in new_names.items() if old != new})


def _with_class_labels(splits: dict[str, Dataset], dataset_name: str) -> dict[str, Dataset]:
    feature = splits["train"].features["label"]
    if not isinstance(feature, ClassLabel):
        values = set().union(*(split.unique("label") for split in splits.values()))
        if None in values or any(isinstance(value, (float, list, dict)) for value in values):
            raise ValueError(
                f"The label column of dataset '{dataset_name}' holds {sorted(map(repr, values))[0]}; labels are class "
                "names or integers."
            )
        names = sorted(values)
        index_of = {value: index for index, value in enumerate(names)}
        feature = ClassLabel(names=[str(value) for value in names])
        splits = {
            name: split.remove_columns("label").add_column("label", [index_of[value] for value in split["label"][:]])
            for name, split in splits.items()
        }
        splits = {name: split.cast_column("label", feature) for name, split in splits.items()}
    for name, split in splits.items():
        for row, label in enumerate(split["label"][:]):
            if label is None or not 0 <= label < feature.num_classes:
                raise ValueError(
                    f"Row {row} of the split used for '{name}' of dataset '{dataset_name}' has the label {label}; "
                    f"labels are integers from 0 to {feature.num_classes - 1}. Choose another split or label column."
                )
    return splits


def match_labels(dataset: Dataset, config, dataset_name: str = "the dataset") -> Dataset:
    """The dataset with its labels numbered as the model's classes.

    Classes are matched by name. Where the model's classes have no names of their own (`LABEL_0`, ...), or the dataset's
    are mere numbers, they are taken by number.

    Args:
        dataset (`datasets.Dataset`): With a `ClassLabel` column `label`, as from [`load_image_datasets`].
        config: A model's configuration, with `label2id`.

    Raises:
        `ValueError`: if the dataset has a class that the model does not know.
    """
    names = dataset.features["label"].names
    model_names = [str(config.id2label[index]) for index in range(config.num_labels)]
    index_of = {name: index for index, name in enumerate(model_names)}
    unknown = [name for name in names if name not in index_of]
    if not unknown:
        if names == model_names[: len(names)]:
            return dataset
        indices = [index_of[names[label]] for label in dataset["label"][:]]
        dataset = dataset.remove_columns("label").add_column("label", indices)
        return dataset.cast_column("label", ClassLabel(names=model_names))
    is_unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(model_names))
    if (is_unnamed or all(name.isdigit() for name in names)) and len(names) <= len(model_names):
        return dataset
    raise ValueError(
        f"Dataset '{dataset_name}' has the classes {_names(unknown[:5])}{', ...' if len(unknown) > 5 else ''}, which the model "
        f"does not know; it knows {len(model_names)}: {_names(model_names[:10])}. Evaluate it on the dataset it was trained on."
    )


class ImageClassificationDataset(torch.utils.data.Dataset):
    """Normalised images and labels for the Trainer, decoded once and augmented a batch at a time without torchvision.

    Items are `{"pixel_values": float32 tensor (num_channels, height, width), "labels": int}`. Augmentation (a random crop
    of the padded image, a horizontal flip) is a function of `(seed, epoch, index)`: the same after a resume and for any
    number of workers or processes.

    Args:
        dataset (`datasets.Dataset`): With the columns `image` and `label`, as from [`load_image_datasets`].
        image_processor: A transformers image processor; resizes, and gives mean and standard deviation.
        num_channels (`int`): 3 to read all images as RGB, 1 as grey.
        augment (`bool`): Whether to augment.
        crop_padding (`int`): Pixels of black on each side before the random crop, at least 0.
        horizontal_flip (`bool`): Whether to mirror half of the images.
        seed (`int`): Seed of the augmentation.
        max_cached_bytes (`int`): Decoded images are kept in memory as uint8 if they fit into this many bytes;
            otherwise they are decoded whenever they are read.

    Raises:
        `ValueError`: if an image cannot be read (names its row).
    """

    def __init__(
        self,
        dataset: Dataset,
        image_processor,
        *,
        num_channels: int = 3,
        augment: bool = False,
        crop_padding: int = 0,
        horizontal_flip: bool = False,
        seed: int = 0,
        max_cached_bytes: int = 2 * 2**30,
        description: str = "Decoding images",
    ):
        if len(dataset) == 0:
            raise ValueError("The dataset is empty; pass at least one image.")
        if crop_padding < 0:
            raise ValueError(f"`crop_padding` is {crop_padding}; it must be a number of pixels of at least 0.")
        self.dataset = dataset
        self.image_processor = image_processor
        self.mode = {1: "L", 3: "RGB"}.get(num_channels)
        if self.mode is None:
            raise ValueError(f"`num_channels` is {num_channels}; images are read with 1 (grey) or 3 (RGB) channels.")
        self.labels = torch.tensor(dataset["label"][:])
        self.augment, self.crop_padding, self.horizontal_flip, self.seed = augment, crop_padding, horizontal_flip, seed
        # In shared memory, so that workers that outlive an epoch see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._draws = (None, None, None)
        self._pixels = None
        first = self._decode([0])
        if first.nbytes * len(dataset) <= max_cached_bytes:
            self._pixels = self._decode_all(first, description)

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Moves to another draw of the augmentation."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no image {index}; there are {len(self)}.")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        pixels = self._pixels[indices] if self._pixels is not None else self._decode(indices)
        if self.augment:
            pixels = self._augment(pixels, indices)
        pixel_values = self._normalize(pixels)
        return [
            {"pixel_values": image, "labels": label}
            for image, label in zip(pixel_values, self.labels[indices].tolist())
        ]

    def _decode_all(self, first: torch.Tensor, description: str) -> torch.Tensor:
        pixels = torch.empty((len(self), *first.shape[1:]), dtype=torch.uint8)
        with tqdm(total=len(self), desc=description, unit="image") as progress:
            for start in range(0, len(self), 256):
                indices = list(range(start, min(start + 256, len(self))))
                pixels[indices] = self._decode(indices)
                progress.update(len(indices))
        return pixels

    def _decode(self, indices: list[int]) -> torch.Tensor:
        """uint8 of shape `(len(indices), num_channels, height, width)`, of the image processor's size."""
        try:
            images = [self._to_pil(image) for image in self.dataset[indices]["image"]]
        except Exception as error:  # PIL raises OSError, SyntaxError, DecompressionBombError and more
            if len(indices) > 1:
                return torch.cat([self._decode([index]) for index in indices])
            raise ValueError(
                f"The image in row {indices[0]} cannot be read: {error}. Mend or remove it from the dataset."
            ) from error
        channels = {"input_data_format": "channels_first"} if self.mode == "L" else {}
        arrays = [np.asarray(image)[None] if self.mode == "L" else image for image in images]
        decoded = self.image_processor(
            arrays, do_rescale=False, do_normalize=False, return_tensors="pt", **channels
        ).pixel_values
        return decoded.clamp(0, 255).to(torch.uint8)

    def _to_pil(self, image) -> PILImage.Image:
        if image is None:
            raise ValueError("it is missing")
        if not isinstance(image, PILImage.Image):
            image = PILImage.fromarray(np.asarray(image, dtype=np.uint8))
        return image.convert(self.mode)

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        processor = self.image_processor
        values = pixels.float()
        if processor.do_rescale:
            values = values * processor.rescale_factor
        if processor.do_normalize:
            mean = torch.tensor(processor.image_mean, dtype=torch.float32).view(-1, 1, 1)
            std = torch.tensor(processor.image_std, dtype=torch.float32).view(-1, 1, 1)
            values = (values - mean) / std
        return values

    def _augment(self, pixels: torch.Tensor, indices: list[int]) -> torch.Tensor:
        offsets, flips = self._epoch_draws()
        if self.crop_padding > 0:
            padding, (height, width) = self.crop_padding, pixels.shape[-2:]
            padded = torch.nn.functional.pad(pixels, (padding,) * 4)
            crops = zip(padded, offsets[indices].tolist())
            pixels = torch.stack([image[:, top : top + height, left : left + width] for image, (top, left) in crops])
        if self.horizontal_flip:
            pixels = torch.where(torch.from_numpy(flips[indices])[:, None, None, None], pixels.flip(-1), pixels)
        return pixels

    def _epoch_draws(self) -> tuple[np.ndarray, np.ndarray]:
        """Crop offsets of shape `(num_images, 2)` and flips of shape `(num_images,)` of the current epoch."""
        epoch = int(self._epoch)
        if self._draws[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offsets = rng.integers(0, 2 * self.crop_padding + 1, size=(len(self), 2))
            self._draws = (epoch, offsets, rng.random(len(self)) < 0.5)
        return self._draws[1:]


def as_dataloader(
    data, image_processor=None, *, batch_size: int = 64, max_samples: int | None = None, num_channels: int = 3
) -> torch.utils.data.DataLoader:
    """Batches `{"pixel_values", "labels"}`, always in the same order, of anything that holds labelled images.

    Args:
        data: A `datasets.Dataset` with the columns `image` and `label`, as from [`load_image_datasets`] (needs
            `image_processor`); a sequence of `{"pixel_values", "labels"}` items; or a DataLoader, taken as it is.
        image_processor: A transformers image processor.
        batch_size (`int`): Images a batch, at least 1.
        max_samples (`int`, *optional*): Only the first so many images, at least 1. Not for a DataLoader.
        num_channels (`int`): Of the model; for a `datasets.Dataset`.

    Raises:
        `ValueError`: if there is no image, or an argument is out of range or missing.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` is {max_samples}; it must be at least 1.")
    if isinstance(data, torch.utils.data.DataLoader):
        if max_samples is not None:
            raise ValueError("`max_samples` does not apply to a DataLoader; give its dataset instead.")
        if len(data) == 0:
            raise ValueError("The DataLoader is empty; pass at least one image.")
        return data
    if len(data) == 0:
        raise ValueError("The evaluation set is empty; pass at least one image.")
    if isinstance(data, Dataset):
        if image_processor is None:
            raise ValueError("A `datasets.Dataset` of images needs an `image_processor`, as the model's own.")
        data = data.select(range(min(max_samples or len(data), len(data))))
        data = ImageClassificationDataset(data, image_processor, num_channels=num_channels)
    elif max_samples is not None:
        data = torch.utils.data.Subset(data, range(min(max_samples, len(data))))
    return torch.utils.data.DataLoader(data, batch_size=batch_size, collate_fn=default_data_collator)
