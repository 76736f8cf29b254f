# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Merged ("Frankenstein") models (arXiv 2407.04513): a [`MergePlan`] carried out, a piece of a tensor at a time."""

import copy
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from ..checkpoints.image_processors import processor_name_of
from ..checkpoints.loading import classes_of
from ..checkpoints.stored_checkpoint import (
    SourceCheckpoint,
    check_image_processors,
    check_tokenizers,
    config_of,
    open_source,
)
from ..checkpoints.tokenizers import takes_texts
from ..common.files import refuse_second_writer, remove_leftovers, replaced_folder, without_new_folders, write_text
from ..common.paths import inside
from ..common.yaml_files import read_json
from ..models.auto_classes import auto_map_of
from ..models.configuration_layershuffle import encoder_config, num_layers_of, set_num_layers
from ..models.exit_rule import forget_exits
from ..models.layer_controller import forget_layer_controller
from .layer_places import check_layer_places, merged_lists, model_without_numbers
from .merged_tensors import MergedTensor, check_parts, inputs_of, refuse_nonfinite, result_dtypes
from .merged_weights import write_weights
from .plan import PLAN_FILE, MergePlan


logger = logging.getLogger(__name__)
# The fields in which the sources must agree
COMPARED_FIELDS = (
    "model_type",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "image_size",
    "num_channels",
    "vocab_size",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "qkv_bias",
    "depth_embedding",
    "depth_embedding_dim",
    "position_predictor",
    "num_labels",
    "id2label",
)
_SAYS_TYPE = {"image_processor_type", "feature_extractor_type", "image_processor", "auto_map"}
_HINTS = {"position_predictor": " Set `position_heads: false` in the plan to leave the position heads out."}


@dataclass(frozen=True)
class PreparedMerge:
    """A plan whose sources were found and fit together.

    Args:
        plan: The plan, with the revisions resolved.
        sources: The sources by name.
        config: Configuration of the result.
        model: The result on the meta device, without numbers.
        tensors: The tensors of the result, in its order.
    """

    plan: MergePlan
    sources: dict[str, SourceCheckpoint]
    config: PreTrainedConfig
    model: PreTrainedModel
    tensors: list[MergedTensor]

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors)

    def check_values(self, progress: bool = True) -> None:
        """Reads all tensors of which the result is made.

        Raises:
            `ValueError`: if a tensor holds NaN or infinite values.
            `OSError`: if a file cannot be read.
        """
        inputs = {(stored.file, stored.name): stored for tensor in self.tensors for stored, _ in tensor.inputs}
        for stored in tqdm(inputs.values(), desc="Checking tensors", unit="tensor", disable=not progress):
            refuse_nonfinite(stored)


def prepare_merge(plan: MergePlan, token: str | None = None) -> PreparedMerge:
    """Finds the sources and checks everything that can be told without reading the tensors' values.

    Raises:
        `ValueError`: if sources differ in a field where they must agree, or lack a layer or a tensor.
        `OSError`: if a source cannot be found or read.
    """
    sources = {name: open_source(name, source.path, source.revision, token) for name, source in plan.sources.items()}
    plan = plan.model_copy(deep=True)
    for name, source in sources.items():
        plan.sources[name].revision = source.revision
    _check_agreement(sources, plan)
    if plan.image_processor is None:
        check_image_processors(sources)
    check_tokenizers(sources)
    for index, parts in enumerate(plan.layers):
        for part in parts:
            depth = num_layers_of(sources[part.source].config)
            if part.layer >= depth:
                raise ValueError(
                    f"`layers[{index}]` is layer {part.layer} of source '{part.source}', which has {depth} layers, "
                    f"numbered from 0 to {depth - 1}."
                )
    config = _merged_config(sources, plan)
    model = model_without_numbers(config)
    check_layer_places(sources, plan, model.free_layers)
    check_parts(plan, model.state_dict(), model.layers_path)
    inputs = {
        name: inputs_of(name, tuple(t.shape), model.layers_path, plan, sources)
        for name, t in model.state_dict().items()
    }
    dtypes = result_dtypes(inputs)
    tensors = [
        MergedTensor(name, tuple(tensor.shape), dtypes[name], inputs[name])
        for name, tensor in model.state_dict().items()
    ]
    config.dtype = reduce(torch.promote_types, dtypes.values())
    return PreparedMerge(plan, sources, config, model, tensors)


def write_merged_model(
    plan: MergePlan,
    output_dir: str | os.PathLike,
    *,
    max_shard_size: int | str = "5GB",
    token: str | None = None,
    progress: bool = True,
    finish: Callable[[PreparedMerge, Path, str], None] | None = None,
) -> Path:
    """Writes the merged model into a new folder. [`merge`] says more of the arguments.

    Args:
        finish: Called with the merge, the folder while it is being written, and the name that the folder will have.
            What it adds is part of the folder when the folder appears.

    Raises:
        `ValueError`, `OSError`: as in [`prepare_merge`] and [`PreparedMerge.check_values`]. Nothing is left then.
    """
    prepared = prepare_merge(plan, token)
    target = check_output_folder(output_dir, prepared.sources)
    shards = split_into_shards(prepared, max_shard_size)
    with without_new_folders(target.parent), replaced_folder(target) as partial:
        with ThreadPoolExecutor(1, "writes-the-rest") as executor:

            def write_the_rest() -> None:
                _write_the_rest(prepared, partial)
                if finish is not None:
                    finish(prepared, partial, target.name)

            rest = executor.submit(write_the_rest)  # while the system copies
            write_weights(prepared.tensors, shards, partial, progress)
            rest.result()
    return target


def check_output_folder(output_dir: str | os.PathLike, sources: Mapping[str, SourceCheckpoint]) -> Path:
    """The output folder, if it is neither a source nor in use."""
    output_dir = Path(output_dir).expanduser().absolute()
    for name, source in sources.items():
        if output_dir.resolve() == source.folder.resolve():
            raise ValueError(f"The output folder '{output_dir}' is the source '{name}'; choose another.")
    if output_dir.is_symlink() or (output_dir.exists() and not output_dir.is_dir()):
        raise ValueError(f"The output folder '{output_dir}' is a file or a link; choose another.")
    refuse_second_writer(output_dir)
    remove_leftovers(output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(f"The output folder '{output_dir}' is not empty; choose another, or empty it.")
    return output_dir


def split_into_shards(prepared: PreparedMerge, max_shard_size: int | str) -> StateDictSplit:
    """Which file holds which tensor, as [`huggingface_hub.split_torch_state_dict_into_shards`] says it."""
    state_dict = {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in prepared.tensors}
    try:
        if isinstance(max_shard_size, int) and max_shard_size < 1:
            raise ValueError("it must be at least 1")
        return split_torch_state_dict_into_shards(
            state_dict, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ValueError(f"`max_shard_size` is {max_shard_size!r}; pass bytes, or such as '200MB': {error}") from error


def check_configs_agree(configs: Mapping[str, PreTrainedConfig], fields: Iterable[str] = COMPARED_FIELDS) -> None:
    """Refuses configurations that differ in one of `fields`.

    Args:
        configs: The configurations by the names of their models.
        fields: Names of the fields in which they must agree.

    Raises:
        `ValueError`: naming the field and two models.
    """
    (first, config), *others = configs.items()
    for field in fields:
        for name, other in others:
            values = _field(config, field), _field(other, field)
            if values[0] != values[1]:
                raise ValueError(
                    f"`{field}` is {_brief(values[0])} in '{first}' and {_brief(values[1])} in '{name}'; models to "
                    f"merge must agree in it.{_HINTS.get(field, '')}"
                )


def _check_agreement(sources: Mapping[str, SourceCheckpoint], plan: MergePlan) -> None:
    left_out = () if plan.position_heads else ("position_predictor",)
    configs = {name: source.config for name, source in sources.items()}
    check_configs_agree(configs, [field for field in COMPARED_FIELDS if field not in left_out])


def _field(config: PreTrainedConfig, name: str) -> object:
    """A field of a configuration, or of that of its image tower."""
    value = getattr(config, name, None)
    return getattr(encoder_config(config), name, None) if value is None else value


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _merged_config(sources: Mapping[str, SourceCheckpoint], plan: MergePlan) -> PreTrainedConfig:
    base = sources[plan.base_name].config
    num_layers = len(plan.layers)
    values = copy.deepcopy(base.to_dict())
    values.pop("pruned_from", None)  # of the base's layers, not of the result's
    values |= {"merge_plan": plan.to_record()}
    values["position_predictor"] = base.position_predictor and plan.position_heads
    if base.halting_head:
        logger.warning("The halting head of the base knows the hidden states of its own layers alone and is left out.")
        values["halting_head"] = False
    if base.shuffle_window is not None:
        values["shuffle_window"] = min(base.shuffle_window, num_layers)
    config = config_of(type(base), values)
    forget_exits(config)
    forget_layer_controller(config)
    lists = merged_lists(sources, plan)
    if num_layers != num_layers_of(base) or lists:
        set_num_layers(config, num_layers, lists)
    if num_layers != num_layers_of(base) and not isinstance(config.execution_order, str):
        config.execution_order = "sequential"  # the base's is a list of layers that are not those of the result
    config.architectures = [classes_of(base.model_type, "The base")[1].__name__]
    config.auto_map = auto_map_of(config)
    return config


def _write_the_rest(prepared: PreparedMerge, folder: Path) -> None:
    config = prepared.config
    auto_map = dict(config.auto_map)
    # The modeling file and what it imports. The argument is annotated as a dictionary, but takes a configuration
    custom_object_save(prepared.model, folder, config=config)  # type: ignore[arg-type]
    config.auto_map = auto_map
    config.save_pretrained(folder)
    prepared.plan.model_validate(prepared.plan.to_record()).save(folder / PLAN_FILE)
    if takes_texts(config):
        _write_tokenizer(prepared, folder)
        return
    giver = prepared.plan.image_processor or prepared.plan.base_name
    files = prepared.sources[giver].image_processor
    for file, settings in files.items():
        if isinstance(settings, dict) and not _SAYS_TYPE & set(settings):
            # Early versions of transformers told it by the type of the model, which for a merged one tells nothing
            settings = {**settings, "image_processor_type": processor_name_of(config.plain_model_type)}
            write_text(folder / file, json.dumps(settings, indent=2) + "\n")
        else:
            shutil.copyfile(inside(prepared.sources[giver].folder, file), folder / file)
    if not files:
        what = "source" if prepared.plan.image_processor else "base"
        logger.warning("The %s '%s' has no image processor, so the merged model has none.", what, giver)


def _write_tokenizer(prepared: PreparedMerge, folder: Path) -> None:
    """The base's tokenizer, and its class, which is else told by the type of the model."""
    base = prepared.sources[prepared.plan.base_name]
    for file in base.tokenizer:
        shutil.copyfile(inside(base.folder, file), folder / file)
    if not base.tokenizer:
        logger.warning("The base '%s' has no tokenizer, so the merged model has none.", base.name)
        return
    path = folder / "tokenizer_config.json"
    settings = read_json(path, dict) if path.exists() else {}
    tokenizer_class = TOKENIZER_MAPPING_NAMES.get(str(base.config.plain_model_type))
    if settings.get("tokenizer_class") is None and isinstance(tokenizer_class, str):
        write_text(path, json.dumps({**settings, "tokenizer_class": tokenizer_class}, indent=2) + "\n")
