# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What of a model's folder belongs on the Hub, and whether it is all there."""

import fnmatch
import inspect
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from ..adaptive.budget_report import REPORT_FILE as BUDGET_FILE
from ..checkpoints.checks import check_complete, check_finite, check_model_files, explained_reading
from ..checkpoints.loading import classes_of, is_classifier, saved_class_of
from ..checkpoints.locations import TOKENIZER_FILES
from ..checkpoints.stored_checkpoint import open_source
from ..checkpoints.tokenizers import input_kind
from ..common.paths import check_links
from ..evaluation.report import REPORT_FILE
from ..models.auto_classes import auto_classes_of, is_free_model_type, plain_type_of
from ..models.modeling_layershuffle import LayerShuffleMixin
from .card_text import is_our_example_file
from .folder_records import BUDGET_PICTURE, EXAMPLES_FOLDER, EXPORT_FILE, PICTURES, TRAINING_FILE, read_json


# What belongs to a published model, beside its code. Checkpoints, logs, optimizer states and pickles do not
PUBLISHED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.yaml",
    "*.png",
    "README.md",
    "LICENSE*",
    "CITATION.cff",
    f"{EXAMPLES_FOLDER}/*.png",
    f"{EXAMPLES_FOLDER}/*.json",
    *TOKENIZER_FILES,
    "additional_chat_templates/*.jinja",
)
NOT_PUBLISHED = ("trainer_state.json",)  # nor hidden files
# What is said of the weights, and what goes with them; our examples, too. On the Hub and not in the folder: if the Hub
# has the same weights, the records hold and join the folder; if not, they are of another model, and the commit removes
# them
RECORDS = (
    REPORT_FILE,
    BUDGET_FILE,
    TRAINING_FILE,
    "*_results.json",
    "merge_plan.yaml",
    "random_merges.json",
    "random_merges.png",
    *PICTURES,
    BUDGET_PICTURE,
)
REPLACED = ("*.safetensors", "*.safetensors.index.json", EXPORT_FILE, *RECORDS)
_AGAIN = "Load the model with hf_layershuffle and save it with `save_pretrained`."


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one pattern has as many folders as the name and fits: `*` does not reach into folders."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_record(name: str) -> bool:
    """Whether a file of a model says something of its weights, or goes with what does."""
    return matches(name, RECORDS) or is_our_example_file(name)


def is_replaced(name: str) -> bool:
    """Whether a file on the Hub goes when a model is pushed that has no file of that name.

    That holds for weights, their records and our code.
    """
    return matches(name, REPLACED) or is_our_example_file(name) or name in {path.name for path in package_code()}


def published_files(folder: str | os.PathLike) -> list[str]:
    """The files of a model's folder that [`publish`] pushes, relative to it. To these it adds those of [`added_code`].

    Raises:
        `ValueError`: if one is a link to a file elsewhere.
    """
    folder = Path(folder)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    check_links(folder, [name for name in names if name.endswith((".json", ".py"))])  # which are read now
    code = set(code_files(folder)) if "config.json" in names else set()
    names = [name for name in names if name in code or (matches(name, PUBLISHED) and name not in NOT_PUBLISHED)]
    check_links(folder, names)
    return names


@cache
def package_code() -> tuple[Path, ...]:
    """The files that a model of this package needs to be loaded without the package.

    They are the file of its class, and what that file imports.
    """
    file = inspect.getfile(LayerShuffleMixin)
    return tuple(sorted(Path(path) for path in {file, *get_relative_import_files(file)}))


def code_files(folder: Path) -> list[str]:
    """The names of the code files that the folder's model needs, whether they are there or not.

    They are named by its `auto_map`, and by what these files import.
    """
    auto_map = (read_json(folder / "config.json") or {}).get("auto_map") or {}
    values = [each for value in auto_map.values() for each in (value if isinstance(value, list) else [value])]
    waiting = {str(value).rpartition(".")[0] for value in values if value and "--" not in str(value)} - {""}
    found: set[str] = set()
    while waiting:
        name = f"{waiting.pop()}.py"
        found.add(name)
        if (folder / name).is_file():
            waiting |= {each for each in get_relative_imports(folder / name) if f"{each}.py" not in found}
    return sorted(found)


def added_code(folder: Path) -> tuple[Path, ...]:
    """The package's code files, where a folder's model needs code and has none.

    A run that an earlier version saved keeps its own, so nothing is added then.
    """
    needed = code_files(folder)
    is_ours = is_free_model_type(str((read_json(folder / "config.json") or {}).get("model_type")))
    return package_code() if needed and is_ours and not any((folder / name).exists() for name in needed) else ()


def check_folder(folder: Path) -> None:
    """Says what a folder lacks to be loaded from the Hub.

    Raises:
        `OSError`: if there is no such folder, or a file in it cannot be read.
        `ValueError`: if it lacks something, holds another kind of model, or its weights are not complete or not
            finite.
    """
    with explained_reading(f"'{folder}'"):
        _check_files(folder)
        check_weights(folder)


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(f"There is no folder '{folder}' to publish; pass one that `save_pretrained` wrote.")
    published_files(folder)  # refuses links to files elsewhere, before one of them is read
    check_model_files(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"'{folder}' holds no model: 'config.json' is missing. {_AGAIN}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"'{folder}' holds no safetensors weights, and pickles are not published. {_AGAIN}")
    config = read_json(folder / "config.json") or {}
    model_type = str(config.get("model_type"))
    classes_of(model_type, f"'{folder}'")
    shards = (read_json(folder / "model.safetensors.index.json") or {}).get("weight_map", {}).values()
    code = [] if added_code(folder) else code_files(folder)
    missing = sorted(name for name in {*shards, *code} if not (folder / name).exists())
    if missing:
        raise ValueError(f"'{folder}' is not complete: {', '.join(missing)} is missing. {_AGAIN}")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):  # reads the header and compares the file's length with it
                pass
        except SafetensorError as error:
            raise OSError(f"'{path}' is truncated or corrupted ({error}). {_AGAIN}") from error
    needed = ["AutoConfig", *auto_classes_of(plain_type_of(model_type))] if is_free_model_type(model_type) else []
    lacking = [name for name in needed if name not in config.get("auto_map", {})]
    if lacking:
        raise ValueError(f"'{folder}' cannot be loaded by {', '.join(lacking)}: 'auto_map' lacks it. {_AGAIN}")


def check_weights(folder: Path) -> None:
    """Checks that a folder's weights are all that its model has, and finite.

    They are read a piece at a time. A LayerShuffle model is one of the class that was saved, be it a classifier, an
    encoder, whose pooler may be missing, or a model of another task. A plain model is a classifier.

    Raises:
        `ValueError`: naming the tensors that are missing, unknown or not finite.
    """
    source = open_source(folder.name, str(folder))
    _, model_class = classes_of(source.config.model_type, f"'{folder}'")
    saved_class = saved_class_of(source.config)
    with torch.device("meta"):
        model = cast(PreTrainedModel, model_class(source.config))
        if saved_class is type(model.base_model):
            model = cast(PreTrainedModel, model.base_model)
        elif saved_class is not None:
            model = cast(PreTrainedModel, saved_class(source.config))
    # Of weights that are tied to others, one is saved
    expected, found = set(model.state_dict()) - set(model.all_tied_weights_keys), set(source.tensors)
    prefix = f"{model.base_model_prefix}."
    if not any(name.startswith(prefix) for name in found):  # an encoder saved alone, whose names have none
        expected = {name.removeprefix(prefix) for name in expected}
    kind = "" if saved_class and not is_classifier(saved_class.plain_class) else input_kind(source.config) or "image"
    check_complete(f"'{folder}'", expected - found, found - expected, input_kind=kind)
    check_finite(f"'{folder}'", ((name, t) for name, t in source.tensors.items() if t.dtype is not None))
