# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as lists of stored tensors: found and checked, while only the headers of their files are read."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils.generic import is_timm_config_dict

from ..common.paths import inside
from ..common.yaml_files import read_json
from ..models.auto_classes import plain_class_name, plain_type_of
from ..models.configuration_layershuffle import LayerShuffleConfigMixin, layershuffle_config_class
from .checks import check_no_adapter, explained_reading
from .loading import classes_of
from .locations import IMAGE_PROCESSOR_FILES, INDEX_FILE, TOKENIZER_FILES, WEIGHTS_FILE, resolve_folder
from .tensor_files import StoredTensor, list_tensors


_PIXEL_DEFAULTS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_PIXEL_SETTINGS = (*_PIXEL_DEFAULTS, "size", "resample", "do_center_crop", "crop_size", "image_mean", "image_std")


@dataclass(frozen=True)
class SourceCheckpoint:
    """A source of a merge.

    Args:
        path: What the plan says.
        revision: The commit of a Hub id.
        tensors: The tensors by their names in the LayerShuffle model.
        image_processor: The settings in each file of an image processor.
        tokenizer: Names of the files of a tokenizer.
    """

    name: str
    path: str
    folder: Path
    revision: str | None
    config: LayerShuffleConfigMixin
    tensors: dict[str, StoredTensor]
    image_processor: dict[str, dict] = field(default_factory=dict)
    tokenizer: list[str] = field(default_factory=list)


def open_source(name: str, path: str, revision: str | None = None, token: str | None = None) -> SourceCheckpoint:
    """Finds a classifier, plain or LayerShuffle, with old or new tensor names, in one file or several.

    Raises:
        `ValueError`: if it is not such a model, or has no safetensors weights.
        `OSError`: if there is none, or a file is truncated or corrupted.
    """
    folder, commit = resolve_folder(name, path, revision, token)
    check_no_adapter(folder)
    with explained_reading(f"Source '{name}'"):
        config = read_config(name, folder)
        stored = [tensor for file in _weight_files(name, folder) for tensor in list_tensors(name, file)]
        renamings = _renamings(name, str(config.plain_model_type), [tensor.name for tensor in stored])
        tensors = {_rename(tensor.name, renamings): tensor for tensor in stored}
    tokenizer = [file for file in TOKENIZER_FILES if (folder / file).is_file() or (folder / file).is_symlink()]
    processor = _read_image_processor(name, folder)
    return SourceCheckpoint(name, path, folder, commit, config, tensors, processor, tokenizer)


def read_config(name: str, folder: Path) -> LayerShuffleConfigMixin:
    """The LayerShuffle configuration of a source."""
    file = folder / "config.json"
    try:
        values = read_json(inside(folder, file.name), dict)
        if is_timm_config_dict(values) and "num_hidden_layers" not in values:
            raise ValueError(
                "it is timm's, which does not say how many layers there are. Load the model by "
                f"`hf_layershuffle.load_classifier('{folder}')`, save it by `save_pretrained`, with its image "
                "processor, and merge that folder"
            )
        model_type = plain_type_of(values["model_type"])
    except FileNotFoundError:
        raise ValueError(f"Source '{name}': '{folder}' holds no config.json, so it is not a saved model.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Source '{name}': '{file}' is not a model's configuration: {_said(error)}") from error
    classes_of(model_type, f"Source '{name}'")
    # Not `from_pretrained`, which for its log writes out each configuration, with a thousand labels, as text
    config_class = layershuffle_config_class(CONFIG_MAPPING[model_type])
    return config_of(config_class, config_class.get_config_dict(folder)[0])


def config_of(config_class: Any, values: dict[str, Any]) -> Any:
    """The configuration that a `config.json` says."""
    # timm's says its classes in words of timm, which `from_dict` reads
    return config_class.from_dict(values) if "model_args" in values else config_class(**values)


def _weight_files(name: str, folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return [inside(folder, WEIGHTS_FILE)]
    if not index.is_file():
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = (
            f" It holds {', '.join(pickles)}: pickles, which may run code when read and are not opened."
            if pickles
            else ""
        )
        raise ValueError(
            f"Source '{name}': '{folder}' holds no '{WEIGHTS_FILE}'.{found} Only safetensors are read; load the model "
            "in transformers and save it again with `save_pretrained`."
        )
    try:
        files = sorted(set(read_json(inside(folder, INDEX_FILE), dict)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"Source '{name}': '{index}' is not an index of safetensors files: {_said(error)}") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"Source '{name}': '{index}' names {file!r}, which is not a safetensors file of its folder."
            )
        if not (folder / file).is_file():
            raise OSError(f"Source '{name}' lacks the file '{file}' that '{index}' names. Copy or download it again.")
    return [inside(folder, file) for file in files]


def check_image_processors(sources: dict[str, SourceCheckpoint]) -> None:
    """Refuses sources that were trained on images prepared in different ways: the result has one way to prepare
    them."""
    settings = {name: _pixel_settings(source) for name, source in sources.items() if source.image_processor}
    for name, other in settings.items():
        first, expected = next(iter(settings.items()))
        for setting in sorted(expected.keys() | other.keys()):
            values = expected.get(setting), other.get(setting)
            if values[0] != values[1]:
                raise ValueError(
                    f"`{setting}` of the image processors is {values[0]!r} in '{first}' and {values[1]!r} in "
                    f"'{name}', and a merged model has one. Choose by `image_processor: <source>` in the plan, or "
                    "merge models of the same images."
                )


def check_tokenizers(sources: dict[str, SourceCheckpoint]) -> None:
    """Refuses sources whose tokenizers have other tokens: their embeddings mean other tokens, too."""
    vocabularies = {name: _vocabulary(source) for name, source in sources.items() if source.tokenizer}
    for name, vocabulary in vocabularies.items():
        first, expected = next(iter(vocabularies.items()))
        if vocabulary != expected:
            raise ValueError(
                f"The tokenizers of '{first}' and '{name}' have other tokens, so the models read other texts; merge "
                "models that were fine-tuned from one checkpoint, or trained with one tokenizer."
            )


def _vocabulary(source: SourceCheckpoint) -> object:
    """What says the ids of a tokenizer's tokens."""
    try:
        if "tokenizer.json" in source.tokenizer:
            stored = read_json(inside(source.folder, "tokenizer.json"), dict)
            return stored.get("model", {}).get("vocab"), stored.get("added_tokens")
        files = [file for file in source.tokenizer if not file.endswith(("_config.json", "_map.json", ".jinja"))]
        return [inside(source.folder, file).read_bytes() for file in files]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"Source '{source.name}': {_said(error)}") from error


def _read_image_processor(name: str, folder: Path) -> dict[str, dict]:
    try:
        return {
            file: read_json(inside(folder, file), dict)
            for file in IMAGE_PROCESSOR_FILES
            if (folder / file).is_file() or (folder / file).is_symlink()
        }
    except ValueError as error:
        raise ValueError(f"Source '{name}': {error}") from error


def _pixel_settings(source: SourceCheckpoint) -> dict:
    """The settings that decide the pixels. Those not written are as in all processors of ViT and DeiT, or unknown."""
    settings = dict(_PIXEL_DEFAULTS)
    for stored in source.image_processor.values():
        stored = stored["image_processor"] if isinstance(stored.get("image_processor"), dict) else stored
        settings |= {name: stored[name] for name in _PIXEL_SETTINGS if stored.get(name) is not None}
    size = settings.get("size")
    return settings | ({"size": {"height": size, "width": size}} if isinstance(size, int) else {})


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else repr(error)


def _renamings(name: str, plain_model_type: str, stored: list[str]) -> list[WeightRenaming]:
    """How transformers renames the tensors of the family's old checkpoints.

    Raises:
        `ValueError`: if it also joins or splits one of those that are stored, as of checkpoints of earlier versions.
    """
    encoder = plain_class_name("AutoModel", plain_model_type) or plain_model_type
    renamings = get_checkpoint_conversion_mapping(encoder) or get_checkpoint_conversion_mapping(plain_model_type) or []
    others = [each for each in renamings if not isinstance(each, WeightRenaming)]
    patterns = [pattern for each in others for pattern in each.source_patterns]
    converted = [tensor for tensor in stored if any(re.search(pattern, tensor) for pattern in patterns)]
    if converted:
        raise ValueError(
            f"Source '{name}' holds the tensor '{converted[0]}', which transformers joins or splits when it loads a "
            f"model of type '{plain_model_type}'. Load the model and save it again with `save_pretrained`."
        )
    return [each for each in renamings if isinstance(each, WeightRenaming)]


def _rename(name: str, renamings: list[WeightRenaming]) -> str:
    """From the tensor names of transformers 4, which plain models still save, to those of the modules."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
