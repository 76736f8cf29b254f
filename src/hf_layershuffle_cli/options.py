# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands share, and what they stand for. Nothing heavy is imported at module level."""

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


DatasetName = Annotated[
    str | None,
    typer.Option(
        "--dataset_name",
        help="digits, a folder (Parquet, one folder a class, IDX, save_to_disk) or a Hub dataset id. Defaults to the "
        "one that the model's training.json names, if it can be found.",
    ),
]
DatasetConfigName = Annotated[
    str | None, typer.Option("--dataset_config_name", help="Configuration of a Hub dataset.")
]
EvalSplit = Annotated[
    str | None,
    typer.Option(
        "--eval_split", help="Split to evaluate on. Defaults to validation, then test, then a part of train."
    ),
]
ImageColumn = Annotated[str | None, typer.Option("--image_column_name", help="Defaults to the one found.")]
LabelColumn = Annotated[str | None, typer.Option("--label_column_name", help="Defaults to the one found.")]
MaxSamples = Annotated[int | None, typer.Option("--max_samples", help="Use only so many images, drawn by --seed.")]
SkipDamaged = Annotated[
    bool, typer.Option("--skip_damaged", help="Leave out images that cannot be read, instead of stopping at them.")
]
BatchSize = Annotated[int, typer.Option("--batch_size", help="Images a batch.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random; at least 0.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps, ... Defaults to the best there is.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the weights: float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub model.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust_remote_code", help="Run the code that a model or its image processor brings, if you trust it."
    ),
]
SPACE_NEEDED = 2**20  # bytes; more than reports and pictures take


@dataclass
class LoadedModel:
    name: str
    model: object
    image_processor: object


def load_model(
    name_or_path: str,
    device: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The classifier, as a LayerShuffle model on its device in evaluation mode, and its image processor."""
    import torch

    from hf_layershuffle.checkpoints.image_processors import load_image_processor
    from hf_layershuffle.checkpoints.loading import load_classifier
    from hf_layershuffle.layerwise import check_evaluable

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"`dtype` is '{dtype}'; it must be one of {', '.join(dtypes)}.")
    check_model(name_or_path, revision)
    hub = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
    model = load_classifier(name_or_path, dtype=dtypes[dtype], **hub)
    image_processor = load_image_processor(name_or_path, **hub)
    check_evaluable(model.config, image_processor)
    return LoadedModel(name_or_path, model.to(choose_device(device)).eval(), image_processor)


def check_model(name_or_path: str, revision: str | None = None) -> None:
    """Says that there is no such model, before the readers of its files do in lines of their own.

    Raises:
        `OSError`: if it is neither a folder, nor a Hub id of a model that can be had.
    """
    from hf_layershuffle.checkpoints.hub_errors import check_hub_model
    from hf_layershuffle.checkpoints.locations import is_local

    if Path(name_or_path).is_dir():
        return
    if is_local(name_or_path):
        raise OSError(
            f"There is no model folder '{name_or_path}'; pass a folder that `save_pretrained` wrote or a Hub id."
        )
    check_hub_model(name_or_path, revision)


def choose_device(device: str | None):
    """The device of that name, or the best there is.

    Raises:
        `ValueError`: if there is no such device.
    """
    import torch

    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"`device` is '{device}', which is not usable here: {str(error).splitlines()[0]}") from error


def dataset_of(models: list[str], dataset_name: str | None, revision: str | None = None) -> str:
    """The dataset of that name; without one, the dataset that all models were trained on, if it can be found.

    Raises:
        `ValueError`: if their `training.json` names none, several, or one that is not here; the message says what it
            names.
    """
    if dataset_name is not None:
        return dataset_name
    named = {model: trained_on(model, revision) for model in models}
    names = set(named.values())
    say = "Say which dataset to take by --dataset_name: digits, a folder or a Hub dataset id."
    if len(names) > 1:
        found = ", ".join(f"'{model}': {name or 'none'}" for model, name in named.items())
        raise ValueError(f"The models' training.json do not name one and the same dataset ({found}). {say}")
    name = names.pop()
    if not name:
        raise ValueError(f"'{models[0]}' has no training.json that names the dataset it was trained on. {say}")
    if name == "digits" or Path(name).expanduser().is_dir():
        return name
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise ValueError(
        f"'{models[0]}' was trained on '{name}' (training.json), which is neither a folder here nor a Hub dataset id "
        f"such as org/name. {say}"
    )


def trained_on(model: str, revision: str | None = None) -> str | None:
    """The dataset that a model's `training.json` names, in its folder or on the Hub; None if there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    from hf_layershuffle.hub.folder_records import TRAINING_FILE, read_json

    path = Path(model, TRAINING_FILE)
    if not Path(model).is_dir():
        try:
            path = Path(hf_hub_download(model, TRAINING_FILE, revision=revision))
        except EntryNotFoundError:  # also where the cache, offline, has none
            return None
    record = read_json(path) or {}
    name = record.get("dataset") if isinstance(record, dict) else None
    return name if isinstance(name, str) and name else None


def load_split(model, split: str, dataset_name: str, **kwargs):
    """The split "train" or "test" (the one to evaluate on) with the columns `image` and `label`, its labels as the
    model numbers its classes. `kwargs` are those of `load_image_datasets`."""
    from hf_layershuffle.data.datasets import load_image_datasets, match_labels

    class_names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
    splits = load_image_datasets(dataset_name, class_names=class_names, **kwargs)
    return match_labels(splits[split], model.config, dataset_name)


def load_evaluation_split(model, dataset_name: str, **kwargs):
    """[`load_split`] of the images to evaluate on."""
    return load_split(model, "test", dataset_name, **kwargs)


def without_damaged(data, loaded: LoadedModel, max_samples: int | None = None, seed: int = 0):
    """The images that can be read, of all or of so many as `seed` draws; a warning names the others."""
    from hf_layershuffle.data import as_dataloader

    draw = {"max_samples": max_samples, "seed": seed, "num_channels": loaded.model.config.num_channels}
    return as_dataloader(data, loaded.image_processor, skip_damaged=True, **draw).dataset.dataset


def parse_layers(text: str, name: str) -> list[int]:
    """Layer indices such as "0,2,5".

    Raises:
        `ValueError`: if it is something else.
    """
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise ValueError(f"`{name}` is '{text}'; it must be layer indices such as 0,2,5.") from None


@contextmanager
def new_folder(output_dir: Path):
    """A temporary folder that becomes `output_dir` at the end, so that nothing half-written is ever there.

    Raises:
        `ValueError`: if `output_dir` is there and not an empty folder.
    """
    from hf_layershuffle.common.files import remove_leftovers, replaced_folder

    output_dir = Path(output_dir)
    check_can_be_written(output_dir)
    remove_leftovers(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"The output folder '{output_dir}' is there already and not empty; choose another --output_dir."
        )
    with replaced_folder(output_dir) as folder:
        yield folder


def short_name(name_or_path: str) -> str:
    """For tables and file names: a folder's last part, or a Hub id."""
    path = Path(name_or_path)
    return path.resolve().name if path.is_dir() else name_or_path


def print_table(table) -> None:
    """As wide as the terminal; into a file, as wide as the table."""
    from rich.console import Console

    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(width=160, markup=False)
    console.print(table)


def distinct_names(names_or_paths: list[str]) -> list[str]:
    """Short names, or the names as they were given if two short ones were the same.

    Raises:
        `ValueError`: if a model is given twice.
    """
    if len(set(names_or_paths)) < len(names_or_paths):
        raise ValueError(f"A model is given twice: {', '.join(names_or_paths)}.")
    names = [short_name(name) for name in names_or_paths]
    return names if len(set(names)) == len(names) else list(names_or_paths)


def check_can_be_written(output_dir: Path) -> None:
    """Finds before any work that an output folder cannot be made or written, and leaves nothing behind.

    Raises:
        `ValueError`: if it, or what it is to stand in, is a file.
        `OSError`: if nothing can be written there, or the disk is full.
    """
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(
            f"The output folder '{output_dir}' cannot be made: '{there}' is a file; choose another --output_dir."
        )
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(SPACE_NEEDED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"The output folder '{output_dir}' cannot be written ({error.strerror or error}); choose another "
            "--output_dir, or make room."
        ) from error


@contextmanager
def shown_before(table, output_dir: Path):
    """Prints the table, then saves what is in the block: what was computed is seen even where it cannot be saved.

    Raises:
        `OSError`: if it cannot.
    """
    print_table(table)
    try:
        yield
    except OSError as error:
        raise OSError(f"The numbers above could not be saved in '{output_dir}': {error}") from error
    print(f"Saved to {output_dir}")


def claim(context: typer.Context, *folders: Path, **kwargs) -> None:
    """Claims folders for this process until the command ends; see [`~hf_layershuffle.common.claims.claimed_folder`].

    Raises:
        `ValueError`: if another process writes into one of them.
    """
    from hf_layershuffle.common.claims import claimed_folder

    for folder in dict.fromkeys(folders):
        context.with_resource(claimed_folder(folder, **kwargs))


def check_output_dir(folder: Path, holds: str) -> Path:
    """Refuses an output folder that holds anything but an earlier output of the same kind, told by the file
    `holds`."""
    folder = Path(folder)
    check_can_be_written(folder)
    is_used = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if is_used and not any(folder.rglob(holds)):
        raise ValueError(
            f"The output folder '{folder}' is not empty and holds no '{holds}'; choose another --output_dir."
        )
    return folder
