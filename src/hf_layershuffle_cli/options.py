# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands share, and what they stand for. Nothing heavy is imported at module level."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


DatasetName = Annotated[
    str,
    typer.Option(
        "--dataset_name", help="digits, a folder (Parquet, one folder a class, IDX, save_to_disk) or a Hub dataset id."
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
MaxSamples = Annotated[int | None, typer.Option("--max_samples", help="Use only the first so many images.")]
BatchSize = Annotated[int, typer.Option("--batch_size", help="Images a batch.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything random; at least 0.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps, ... Defaults to the best there is.")
]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the weights: float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub model.")]


@dataclass
class LoadedModel:
    name: str
    model: object
    image_processor: object


def load_model(name_or_path: str, device: str | None = None, dtype: str = "float32", revision: str | None = None):
    """The classifier, as a LayerShuffle model on its device in evaluation mode, and its image processor."""
    import torch
    from transformers import AutoImageProcessor

    from hf_layershuffle.layerwise import load_classifier

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"`dtype` is '{dtype}'; it must be one of {', '.join(dtypes)}.")
    hub = {"revision": revision} if revision else {}
    model = load_classifier(name_or_path, dtype=dtypes[dtype], **hub)
    image_processor = AutoImageProcessor.from_pretrained(name_or_path, **hub)
    return LoadedModel(name_or_path, model.to(choose_device(device)).eval(), image_processor)


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


def load_evaluation_split(model, dataset_name: str, **kwargs):
    """The evaluation split with the columns `image` and `label`, its labels as the model numbers its classes.

    `kwargs` are those of `load_image_datasets`.
    """
    from hf_layershuffle.data import load_image_datasets, match_labels

    return match_labels(load_image_datasets(dataset_name, **kwargs)["test"], model.config, dataset_name)


def short_name(name_or_path: str) -> str:
    """For tables and file names: a folder's last part, or a Hub id."""
    path = Path(name_or_path)
    return path.resolve().name if path.is_dir() else name_or_path


def check_output_dir(folder: Path, holds: str) -> Path:
    """Refuses an output folder that holds anything but an earlier output of the same kind, told by the file `holds`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output folder '{folder}' is a file; choose another --output_dir.")
    if folder.is_dir() and any(folder.iterdir()) and not any(folder.rglob(holds)):
        raise ValueError(
            f"The output folder '{folder}' is not empty and holds no '{holds}'; choose another --output_dir."
        )
    return folder
