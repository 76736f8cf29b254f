# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What commands read: models, devices, images and texts. Nothing heavy is imported at module level."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast


if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

    from hf_layershuffle.checkpoints.processing_classes import ProcessingClass


_LOADING: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("dataset_config_name", "train_split", "eval_split"), str),
    **dict.fromkeys(("image_column", "text_column", "text_pair_column", "label_column"), str),
    "eval_fraction": float,
}


@dataclass
class LoadedModel:
    """A model to work on, and what makes its inputs.

    Args:
        name: Its folder or Hub id.
        model: The classifier, as a LayerShuffle model.
        processing_class: The model's image processor or tokenizer.
    """

    name: str
    model: "PreTrainedModel"
    processing_class: "ProcessingClass"

    def batches(self, data: "Dataset", **kwargs: Any) -> "DataLoader":
        """The batches on which the model is evaluated; see [`batches_for`]."""
        from hf_layershuffle.layerwise import as_layerwise, batches_for

        return batches_for(as_layerwise(self.model), data, self.processing_class, **kwargs)


def load_model(
    name_or_path: str,
    device: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The classifier, as a LayerShuffle model on its device in evaluation mode, and what makes its inputs.

    Args:
        name_or_path: Folder or Hub id.
        device: Name of the device. Defaults to the best there is.
        dtype: Dtype of the weights: float32, bfloat16 or float16.
        revision: Branch, tag or commit of a Hub model.
        trust_remote_code: Whether code that the model or its image processor or tokenizer brings may run.

    Raises:
        `ValueError`: if an argument is not valid, or the model is no classifier of several classes.
        `OSError`: if there is no such model, or it cannot be read.
    """
    import torch

    from hf_layershuffle.checkpoints.loading import load_classifier
    from hf_layershuffle.checkpoints.processing_classes import load_processing_class
    from hf_layershuffle.layerwise import check_evaluable

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"`dtype` is '{dtype}'; it must be one of {', '.join(dtypes)}.")
    check_model(name_or_path, revision)
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code} | ({"revision": revision} if revision else {})
    model = load_classifier(name_or_path, dtype=dtypes[dtype], **hub)
    processing_class = load_processing_class(name_or_path, model.config, **hub)
    check_evaluable(model.config, processing_class)
    on_device = cast(Any, model).to(choose_device(device))  # transformers hides what `to` takes
    return LoadedModel(name_or_path, on_device.eval(), processing_class)


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


def choose_device(device: str | None) -> "torch.device":
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
        `ValueError`: if their `training.json` names none, several, or one that is not here. The message says what it
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
    from hf_layershuffle.data.dataset_files import is_found_by_name

    if is_found_by_name(name):
        return name
    raise ValueError(
        f"'{models[0]}' was trained on '{name}' (training.json), which is neither a folder here nor a Hub dataset id "
        f"such as org/name. {say}"
    )


def trained_on(model: str, revision: str | None = None) -> str | None:
    """The dataset that a model's `training.json` names, in its folder or on the Hub; None if there is none."""
    name = training_record(model, revision).get("dataset")
    return name if isinstance(name, str) and name else None


def training_record(model: str, revision: str | None = None) -> dict[str, Any]:
    """A model's `training.json`, in its folder or on the Hub; empty if there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    from hf_layershuffle.hub.folder_records import TRAINING_FILE, read_training

    if model and Path(model).is_dir():
        return read_training(model)
    try:
        return read_training(Path(hf_hub_download(model, TRAINING_FILE, revision=revision)).parent)
    except (EntryNotFoundError, HFValidationError):  # also where the cache, offline, has none
        return {}


def loading_of(model: "PreTrainedModel", dataset_name: str) -> dict[str, Any]:
    """How a model's training loaded this dataset, by the arguments of [`load_split`], where not by default.

    So the part that was held out is evaluated on, and no example of the training.
    """
    from hf_layershuffle.common.paths import public_name

    record = training_record(str(model.config.name_or_path), getattr(model.config, "_commit_hash", None))
    arguments, name = record.get("dataset_arguments"), record.get("dataset")
    # By the last part of a path: what stands before it depends on where a command runs
    is_it = isinstance(name, str) and public_name(name) == public_name(dataset_name)
    if not isinstance(arguments, dict) or not is_it:
        return {}
    return {name: value for name, value in arguments.items() if isinstance(value, _LOADING.get(name, ()))}


def columns_of(image: str | None, text: str | None, text_pair: str | None, label: str | None) -> dict[str, Any]:
    """The options of columns as [`load_split`] takes them."""
    return {"image_column": image, "text_column": text, "text_pair_column": text_pair, "label_column": label}


def load_split(
    model: "PreTrainedModel", split: str, dataset_name: str, *, streaming: bool = False, **kwargs: Any
) -> "Dataset":
    """The images or texts of a split with the columns `image` or `text`, and `label`, numbered as the model's classes.

    Args:
        model: The classifier.
        split: "train", or "test" for the images or texts to evaluate on.
        dataset_name: Name of the dataset.
        streaming: Whether to load the images to evaluate on alone, see [`load_image_stream`].
        kwargs: As for [`load_image_datasets`] and [`load_text_datasets`]. What is None or left out is as the model's
            training had it, if it was on this dataset ([`loading_of`]). Columns of images that are None are left out
            for texts, and the other way round.

    Raises:
        `ValueError`: if a column of texts is given for a model of images, or the other way round.
    """
    from hf_layershuffle.checkpoints.tokenizers import takes_texts
    from hf_layershuffle.data.datasets import load_image_datasets, match_labels
    from hf_layershuffle.data.streamed_splits import load_image_stream
    from hf_layershuffle.data.text_datasets import load_text_datasets

    of_texts = takes_texts(model.config)
    given = {name: value for name, value in kwargs.items() if value is not None}
    kwargs = kwargs | loading_of(model, dataset_name) | given
    for name in ("image_column",) if of_texts else ("text_column", "text_pair_column"):
        value = kwargs.pop(name, None)
        if value is not None:
            kind = "texts" if of_texts else "images"
            raise ValueError(
                f"`{name}` is '{value}', and '{model.config.name_or_path}' is a model of {kind}; leave out "
                f"--{name}_name."
            )
    id2label = cast(dict[int, str], model.config.id2label)
    class_names = [str(id2label[index]) for index in range(len(id2label))]
    if streaming and of_texts:
        raise ValueError("`streaming` is for images; leave out --streaming.")
    if streaming:
        kwargs.pop("eval_fraction", None)  # of a stream nothing is held out
        return match_labels(
            load_image_stream(dataset_name, class_names=class_names, **kwargs).test, model.config, dataset_name
        )
    load = load_text_datasets if of_texts else load_image_datasets
    # A dataset for evaluation alone, such as one of a benchmark, needs no split to train on
    splits = load(dataset_name, class_names=class_names, evaluation_only=split == "test", **kwargs)
    return match_labels(splits[split], model.config, dataset_name)


def load_evaluation_split(
    loaded: LoadedModel,
    dataset_name: str,
    *,
    skip_damaged: bool = False,
    max_samples: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> "Dataset":
    """The images or texts to evaluate on.

    Args:
        loaded: The model.
        dataset_name: Name of the dataset.
        skip_damaged: Whether images that cannot be read, and rows without a text, are left out; see
            [`without_damaged`].
        max_samples, seed: As for [`without_damaged`].
        kwargs: As for [`load_image_datasets`].
    """
    data = load_split(loaded.model, "test", dataset_name, **kwargs)
    return without_damaged(data, loaded, max_samples, seed) if skip_damaged else data


def load_evaluation_splits(models: list[LoadedModel], dataset_name: str, **kwargs: Any) -> list["Dataset"]:
    """The images or texts to evaluate each of the models on, as [`load_evaluation_split`] gives them.

    Raises:
        `ValueError`: where trainings held other parts of the dataset out, or had other labels.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    loadings = {loaded.name: loading_of(loaded.model, dataset_name) | given for loaded in models}
    first, *others = loadings
    for other in others:
        for name in sorted(loadings[first].keys() | loadings[other].keys()):
            values = loadings[first].get(name), loadings[other].get(name)
            if values[0] != values[1]:
                raise ValueError(
                    f"The trainings of '{first}' and '{other}' loaded '{dataset_name}' with `{name}` {values[0]!r} "
                    f"and {values[1]!r} (None: the default), so they cannot be compared on what was held out. "
                    "Evaluate each by itself, or say what counts for all, such as --eval_split test."
                )
    return [load_evaluation_split(loaded, dataset_name, **kwargs) for loaded in models]


def without_damaged(data: "Dataset", loaded: LoadedModel, max_samples: int | None = None, seed: int = 0) -> "Dataset":
    """The images, or texts, that can be read, of all or of as many as `seed` draws. A warning names the others."""
    loader = loaded.batches(data, skip_damaged=True, max_samples=max_samples, seed=seed)
    return cast(Any, loader.dataset).dataset


def check_same_inputs(what: str, other: LoadedModel, loaded: LoadedModel) -> None:
    """Raises a `ValueError` where the inputs of another model, named by `what`, are made in another way."""
    from hf_layershuffle.evaluation.fingerprint import processing_record

    ours, theirs = (processing_record(each.processing_class, each.model.config) for each in (loaded, other))
    if ours != theirs:
        raise ValueError(
            f"The inputs of {what} are made in another way than those of '{loaded.name}' ({theirs} and {ours}); take "
            "one with the same image processor or tokenizer."
        )
