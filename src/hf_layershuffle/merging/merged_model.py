# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Merged ("Frankenstein") models (arXiv 2407.04513): a [`MergePlan`] carried out, a piece of a tensor at a time."""

import copy
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm.auto import tqdm
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from ..checkpoints.loading import classes_of
from ..checkpoints.locations import INDEX_FILE
from ..checkpoints.stored_checkpoint import SourceCheckpoint, check_image_processors, open_source
from ..checkpoints.tensor_files import StoredTensor, write_safetensors
from ..common.files import refuse_second_writer, remove_leftovers, replaced_folder, write_text
from ..common.paths import inside
from ..models.auto_classes import auto_map_of
from ..models.configuration_layershuffle import num_layers_of
from .plan import PLAN_FILE, MergePart, MergePlan


logger = logging.getLogger(__name__)
# In all of these the sources must agree
COMPARED_FIELDS = (
    "model_type",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "image_size",
    "num_channels",
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
class MergedTensor:
    """One tensor of the result: a weighted average (weights sum to 1) of stored ones, or one of them as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    inputs: list[tuple[StoredTensor, float]]

    def compute(self) -> Iterator[torch.Tensor]:
        """Its numbers in pieces, each valid until the next."""
        inputs = [stored for stored, _ in self.inputs]
        if all(stored.shape == self.shape for stored in inputs):
            pieces = [stored.chunks() for stored in inputs]
        else:
            pieces = [[_fit_rows(stored.read(), self.shape)] for stored in inputs]
        for values in zip(*pieces):
            yield self._average(values)

    def _average(self, values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if len(values) == 1:
            return values[0].to(self.dtype)
        # In float64, so that an average of equal tensors gives themselves
        total = torch.zeros(values[0].shape, dtype=torch.float64)
        sum_of_weights = math.fsum(weight for _, weight in self.inputs)  # such as 0.9999999, as people round thirds
        for value, (_, weight) in zip(values, self.inputs):
            total.add_(value, alpha=weight / sum_of_weights)
        return total.to(self.dtype)


@dataclass(frozen=True)
class PreparedMerge:
    """A plan whose sources were found and fit together: `plan` with the revisions resolved, `config` and `tensors` of
    the result in its order."""

    plan: MergePlan
    sources: dict[str, SourceCheckpoint]
    config: object
    model: torch.nn.Module  # on the meta device
    tensors: list[MergedTensor]

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors)

    def check_values(self, progress: bool = True) -> None:
        """Reads all that goes into the result.

        Raises:
            `ValueError`: if a tensor holds NaN or infinite values.
            `OSError`: if a file cannot be read.
        """
        inputs = {(stored.file, stored.name): stored for tensor in self.tensors for stored, _ in tensor.inputs}
        for stored in tqdm(inputs.values(), desc="Checking tensors", unit="tensor", disable=not progress):
            if not stored.is_finite():
                raise ValueError(
                    f"Source '{stored.source}': the tensor '{stored.name}' in '{stored.file}' holds NaN or infinite values. Take "
                    "another source or an earlier checkpoint."
                )


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
    for index, parts in enumerate(plan.layers):
        for part in parts:
            depth = num_layers_of(sources[part.source].config)
            if part.layer >= depth:
                raise ValueError(
                    f"`layers[{index}]` is layer {part.layer} of source '{part.source}', which has {depth} layers, numbered "
                    f"from 0 to {depth - 1}."
                )
    config = _merged_config(sources, plan)
    with torch.device("meta"):
        model = classes_of(config.model_type, "The base")[1](config)
    inputs = {
        name: _inputs_of(name, tuple(t.shape), model.layers_path, plan, sources)
        for name, t in model.state_dict().items()
    }
    dtypes = _result_dtypes(inputs)
    tensors = [
        MergedTensor(name, tuple(tensor.shape), dtypes[name], inputs[name])
        for name, tensor in model.state_dict().items()
    ]
    config.dtype = reduce(torch.promote_types, dtypes.values())
    return PreparedMerge(plan, sources, config, model, tensors)


def write_merged_model(
    plan: MergePlan,
    output_dir,
    *,
    max_shard_size: int | str = "5GB",
    token: str | None = None,
    progress: bool = True,
    finish: Callable[[PreparedMerge, Path, str], None] | None = None,
) -> Path:
    """Writes the merged model into a new folder, of which the arguments of [`merge`] say more.

    Args:
        finish: Called with the merge, the folder while it is being written, and the folder's name to be; what it adds is
            part of the folder when that appears.

    Raises:
        `ValueError`, `OSError`: see [`prepare_merge`] and [`PreparedMerge.check_values`]; then nothing is written.
    """
    prepared = prepare_merge(plan, token)
    output_dir = check_output_folder(output_dir, prepared.sources)
    shards = split_into_shards(prepared, max_shard_size)
    prepared.check_values(progress)
    with replaced_folder(output_dir) as partial:
        _write_weights(prepared, shards, partial, progress)
        _write_the_rest(prepared, partial)
        if finish is not None:
            finish(prepared, partial, output_dir.name)
    return output_dir


def check_output_folder(output_dir, sources: dict[str, SourceCheckpoint]) -> Path:
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


def split_into_shards(prepared: PreparedMerge, max_shard_size: int | str):
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


def check_configs_agree(configs: dict[str, object], fields=COMPARED_FIELDS) -> None:
    """Refuses configurations, by the name of their model, that differ in one of `fields`."""
    (first, config), *others = configs.items()
    for field in fields:
        for name, other in others:
            values = getattr(config, field, None), getattr(other, field, None)
            if values[0] != values[1]:
                raise ValueError(
                    f"`{field}` is {_brief(values[0])} in '{first}' and {_brief(values[1])} in '{name}'; models to merge must "
                    f"agree in it.{_HINTS.get(field, '')}"
                )


def _check_agreement(sources: dict[str, SourceCheckpoint], plan: MergePlan) -> None:
    left_out = () if plan.position_heads else ("position_predictor",)
    configs = {name: source.config for name, source in sources.items()}
    check_configs_agree(configs, [field for field in COMPARED_FIELDS if field not in left_out])


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _merged_config(sources: dict[str, SourceCheckpoint], plan: MergePlan):
    base, num_layers = sources[plan.base].config, len(plan.layers)
    values = copy.deepcopy(base.to_dict())
    values.pop("pruned_from", None)  # of the base's layers, not of the result's
    values |= {"merge_plan": plan.to_record()}
    values["position_predictor"] = base.position_predictor and plan.position_heads
    if num_layers != num_layers_of(base) and not isinstance(base.execution_order, str):
        values["execution_order"] = "sequential"  # the base's is a list of layers that are not those of the result
    if base.shuffle_window is not None:
        values["shuffle_window"] = min(base.shuffle_window, num_layers)
    tower = values if hasattr(base, "num_hidden_layers") else values["vision_config"]
    tower["num_hidden_layers"] = num_layers
    config = type(base)(**values)
    config.architectures = [classes_of(base.model_type, "The base")[1].__name__]
    config.auto_map = auto_map_of(config)
    return config


def _inputs_of(
    name: str, shape: tuple[int, ...], layers_path: str, plan: MergePlan, sources
) -> list[tuple[StoredTensor, float]]:
    """What a tensor of the result, `name`, is made of."""
    match = re.match(rf"({re.escape(layers_path)}\.)(\d+)(\..+)", name)
    if match is None:
        part = _part_of(name, encoder=layers_path.partition(".")[0])
        return [(_find(name, shape, sources[p.source]), p.weight) for p in getattr(plan, part)]
    prefix, index, suffix = match.groups()
    parts: list[MergePart] = plan.layers[int(index)]
    return [(_find(f"{prefix}{p.layer}{suffix}", shape, sources[p.source]), p.weight) for p in parts]


def _part_of(name: str, encoder: str) -> str:
    """Which of `PARTS` a tensor outside the layers belongs to, by its name and that of the encoder."""
    path = name.split(".")
    if path[0] != encoder:
        return "classifier"
    if "depth_embedding" in path:
        return "depth_embedding"
    return "embeddings" if any("embed" in word for word in path) else "layernorm"


def _find(name: str, shape: tuple[int, ...], source: SourceCheckpoint) -> StoredTensor:
    stored = source.tensors.get(name)
    if stored is None:
        known = (
            f"The file holds {len(source.tensors)} tensors, but not this one." if source.tensors else "It is empty."
        )
        raise ValueError(
            f"Source '{source.name}' ('{source.path}') lacks the tensor '{name}'. {known} Sources must be complete image "
            "classifiers."
        )
    if stored.dtype is None:
        raise ValueError(
            f"Source '{source.name}': the tensor '{stored.name}' is not of floats of 16 to 64 bits; quantized models cannot be "
            "merged."
        )
    rows_may_differ = "depth_embedding" in name or "position_head.dense" in name
    if "position_head.dense" in name and stored.shape[0] < shape[0]:
        raise ValueError(
            f"The position heads of source '{source.name}' know {stored.shape[0]} positions, but the result has {shape[0]} "
            "layers. Set `position_heads: false` in the plan to leave them out."
        )
    if stored.shape[rows_may_differ:] != shape[rows_may_differ:]:
        raise ValueError(
            f"Source '{source.name}': the tensor '{stored.name}' has shape {stored.shape}; with this configuration it must be "
            f"{shape}. Take a checkpoint whose weights belong to its config.json."
        )
    return stored


def _fit_rows(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Of a tensor with one row a position: the first rows, or the last one repeated. Others stay as they are."""
    if tensor.shape == shape:
        return tensor
    return tensor[torch.arange(shape[0]).clamp(max=len(tensor) - 1)]


def _result_dtypes(inputs: dict[str, list[tuple[StoredTensor, float]]]) -> dict[str, torch.dtype]:
    """For each tensor the widest dtype of its kind, which is its name without the number of the layer."""
    kinds = {name: re.sub(r"\.\d+\.", ".*.", name) for name in inputs}
    widest = {}
    for name, kind in kinds.items():
        dtypes = [stored.dtype for stored, _ in inputs[name]]
        widest[kind] = reduce(torch.promote_types, dtypes, widest.get(kind, dtypes[0]))
    return {name: widest[kind] for name, kind in kinds.items()}


def _write_weights(prepared: PreparedMerge, shards, folder: Path, progress: bool) -> None:
    tensors = {tensor.name: tensor for tensor in prepared.tensors}
    bar = tqdm(total=prepared.num_bytes, desc="Writing", unit="B", unit_scale=True, disable=not progress)
    with bar:
        for file, names in shards.filename_to_tensors.items():
            write_safetensors(folder / file, [tensors[name] for name in names], bar.update)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def image_processor_type(plain_model_type: str) -> str:
    """The image processor that transformers takes for a model type."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES[plain_model_type]
    return (names["torchvision"] if isinstance(names, dict) else names[0]).removesuffix("Fast")


def _write_the_rest(prepared: PreparedMerge, folder: Path) -> None:
    config = prepared.config
    auto_map = dict(config.auto_map)
    custom_object_save(prepared.model, folder, config=config)  # the modeling file and what it imports
    config.auto_map = auto_map
    config.save_pretrained(folder)
    prepared.plan.model_validate(prepared.plan.to_record()).save(folder / PLAN_FILE)
    giver = prepared.plan.image_processor or prepared.plan.base
    files = prepared.sources[giver].image_processor
    for file, settings in files.items():
        if isinstance(settings, dict) and not _SAYS_TYPE & set(settings):
            # Early versions of transformers told it by the type of the model, which for a merged one tells nothing
            settings = {**settings, "image_processor_type": image_processor_type(config.plain_model_type)}
            write_text(folder / file, json.dumps(settings, indent=2) + "\n")
        else:
            shutil.copyfile(inside(prepared.sources[giver].folder, file), folder / file)
    if not files:
        what = "source" if prepared.plan.image_processor else "base"
        logger.warning("The %s '%s' has no image processor, so the merged model has none.", what, giver)
