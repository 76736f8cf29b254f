# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Image classification data: by name, Hub id, Parquet or image folder, or MNIST-style IDX files."""

import glob
import gzip
import os
import struct
from pathlib import Path

import numpy as np
import transformers
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers import AutoImageProcessor, ImageProcessingMixin

from .checkpoint_checks import explained_reading
from .image_dataset import ImageClassificationDataset, as_dataloader
from .merge_sources import is_local


__all__ = [
    "ImageClassificationDataset",
    "as_dataloader",
    "load_image_datasets",
    "load_image_processor",
    "match_labels",
]

IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")
EVALUATION_SPLITS = ("validation", "valid", "val", "test")
# Folders that `datasets` takes for splits
_SPLIT_FOLDERS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
_IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
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
    if not folder.is_dir() and is_local(dataset_name):
        raise ValueError(f"There is no dataset folder '{dataset_name}'.")
    if folder.is_dir() and any(folder.glob("*-idx3-ubyte*")):
        return _load_idx_folder(folder)
    try:
        if folder.is_dir() and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists()):
            loaded = load_from_disk(str(folder))
        elif folder.is_dir() and _is_one_folder_a_class(folder):
            # With a pattern, or the names of some files and classes (train, test11.png) would be taken for splits
            load_kwargs = {"data_files": {"train": str(Path(glob.escape(str(folder.resolve())), "**"))}} | load_kwargs
            loaded = load_dataset("imagefolder", drop_labels=False, **load_kwargs)
        else:
            loaded = load_dataset(str(folder) if folder.is_dir() else dataset_name, dataset_config_name, **load_kwargs)
    except Exception as error:  # the errors of a dozen readers and of the network share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Dataset '{dataset_name}' cannot be loaded: {reason.rstrip('.!')}. Pass 'digits', a folder of Parquet files, images or "
            "IDX files, or a dataset id on the Hub."
        ) from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if folder.is_dir() and all(split.info.builder_name == "imagefolder" for split in splits.values()):
        _check_all_images_load(folder, splits)
    return splits


def _image_files(folder: Path) -> list[Path]:
    """Relative to the folder; none of hidden files or folders."""
    paths = (
        Path(parent, name).relative_to(folder)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in _IMAGE_SUFFIXES
    )
    return [path for path in paths if not any(part.startswith(".") for part in path.parts)]


def _is_one_folder_a_class(folder: Path) -> bool:
    """Whether all images lie in subfolders that are not splits, and no other file tells of their labels."""
    if any(folder.glob("**/metadata.*")):
        return False
    images = _image_files(folder)
    classes = {path.parts[0].lower() for path in images}
    return bool(images) and all(len(path.parts) == 2 for path in images) and not classes <= _SPLIT_FOLDERS


def _check_all_images_load(folder: Path, splits: dict[str, Dataset]) -> None:
    images, num_rows = _image_files(folder), sum(len(split) for split in splits.values())
    if num_rows < len(images) and not any(folder.glob("**/metadata.*")):
        raise ValueError(
            f"Only {num_rows} of the {len(images)} images in '{folder}' were found, in the splits {_names(splits)}. Give "
            "each class a folder that holds its images; where there are splits, put these folders into 'train', "
            "'validation' and 'test' and nothing beside them."
        )


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


def load_image_processor(name_or_path: str, **kwargs):
    """The image processor of a model, as `AutoImageProcessor` loads it; also without torchvision, which that class needs
    in transformers before 5.23 although the processors themselves do not.

    Args:
        name_or_path (`str`): Folder or Hub id.
        kwargs: Passed to `from_pretrained`: `revision`, `token`, ... Code that a model brings runs only with
            `trust_remote_code=True`.

    Raises:
        `OSError`: if there is none, or it cannot be read.
        `ValueError`: if it needs code that the model brings.
    """
    folder = Path(name_or_path)
    kwargs = {"trust_remote_code": False} | kwargs
    if folder.is_dir() and not any((folder / name).exists() for name in _PROCESSOR_FILES):
        raise OSError(
            f"The folder '{folder}' holds no image processor ('{_PROCESSOR_FILES[0]}'). Save the one that the model was trained "
            "with there, such as ViTImageProcessor(size={'height': 224, 'width': 224}, image_mean=[0.5, 0.5, 0.5], "
            f"image_std=[0.5, 0.5, 0.5]).save_pretrained('{folder}')."
        )
    try:
        with explained_reading(f"The image processor of '{name_or_path}'"):
            return AutoImageProcessor.from_pretrained(name_or_path, **kwargs)
    except ImportError:
        del kwargs["trust_remote_code"]
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **kwargs)
        name = settings.get("image_processor_type", "ViTImageProcessor").removesuffix("Fast")
        return getattr(transformers, name).from_pretrained(name_or_path, **kwargs)


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
