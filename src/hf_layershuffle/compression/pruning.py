# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Shorter models: which layers to keep, and a model that has only these."""

import copy
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..common.paths import public_name
from ..common.progress import silenceable
from ..evaluation.order_plans import evenly_spaced_layers
from ..evaluation.robustness import score_execution_orders
from ..layerwise import as_layerwise, batches_for
from ..models.configuration_layershuffle import lists_by_layer, set_num_layers
from ..models.early_exit import all_layers
from ..models.exit_rule import forget_exits
from ..models.layer_controller import forget_layer_controller
from ..models.layer_lists import check_places, find_layers, layers_of_config, number_layers
from ..models.layer_program import same_kind_of_list


def prune_layers(model: PreTrainedModel, keep: Sequence[int] | torch.Tensor | np.ndarray) -> PreTrainedModel:
    """A model of the same class that has only the layers `keep`, in that order.

    It computes the logits of `model(..., execution_order=keep)` in its sequential order, and saves, loads, trains and
    publishes as any model. `config.pruned_from` records the layers and where they come from. Where it has a depth
    embedding or position heads, they know `len(keep)` positions. A stored evaluation order of particular layers
    becomes `"sequential"`.

    Args:
        model: A LayerShuffle model, or a plain one, also one whose layers were cut by hand. It is not changed, and
            shares no weights with the result.
        keep: Layer indices, each at most once, in the order in which they shall run.

    Raises:
        `ValueError`: if `keep` is empty or no list, holds a layer twice or one that does not exist, or if the model is
            of another type or holds adapters, or has layers that depend on where they stand.
    """
    _check_model(model)
    path = find_layers(model, any_depth=True)
    num_layers = len(_layers_at(model, path))
    kept = _check_layers(keep, num_layers)
    pruned = copy.deepcopy(model)
    old_layers = _layers_at(pruned, path)
    layers: Any = same_kind_of_list(old_layers, [old_layers[layer] for layer in kept])
    pruned.set_submodule(path, layers)
    depth_embedding = getattr(pruned, "_depth_embedding", None)
    if depth_embedding is not None:
        _keep_rows(depth_embedding, len(kept))
        depth_embedding.num_embeddings = len(depth_embedding.weight)
    number_layers(layers)
    for layer in layers:
        position_head: Any = getattr(layer, "position_head", None)
        if position_head is not None:
            _keep_rows(position_head.dense, len(kept))
            position_head.dense.out_features = len(position_head.dense.weight)
    forget_layer_controller(pruned)
    pruned.config.pruned_from = _describe_origin(model.config, num_layers, kept)
    _shorten_config(pruned.config, kept)
    rebuilt = layers_of_config(type(pruned), pruned.config, path)
    check_places(_layers_at(model, path), enumerate(kept), rebuilt)
    return pruned


def _layers_at(model: PreTrainedModel, path: str) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(path))


def _check_model(model: object) -> None:
    if isinstance(model, nn.Module) and any(type(each).__module__.startswith("peft.") for each in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} holds adapters of PEFT, which belong to the layers of the whole model; "
            "prune `peft_model.merge_and_unload()` instead."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`model` is a {type(model).__name__}; pass a model of transformers, such as a LayerShuffle one."
        )


def _check_layers(keep: Any, num_layers: int) -> list[int]:
    layers = keep.tolist() if hasattr(keep, "tolist") else keep  # of a tensor or an array
    is_list = isinstance(layers, (list, tuple)) and len(layers) > 0
    if not is_list or not all(isinstance(layer, Integral) and not isinstance(layer, bool) for layer in layers):
        raise ValueError(f"`keep` is {keep!r}; pass a non-empty list of layer indices from 0 to {num_layers - 1}.")
    layers = [int(layer) for layer in layers]
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"`keep` holds layer {layer}: {layers}; this model has the layers 0 to {num_layers - 1}.")
        if layers.count(layer) > 1:
            raise ValueError(
                f"`keep` holds layer {layer} more than once: {layers}; a pruned model has each layer at most once."
            )
    return layers


def _describe_origin(config: PreTrainedConfig, num_layers: int, keep: list[int]) -> dict:
    """The origin of a pruned model: which model, its number of layers, and which were kept.

    Pruned again, a model still names the layers of the first.
    """
    earlier = getattr(config, "pruned_from", None)
    if earlier is not None:
        return {**earlier, "layers": [earlier["layers"][layer] for layer in keep]}
    return {"model": public_name(config.name_or_path), "num_layers": num_layers, "layers": keep}


def _keep_rows(module: nn.Module, num_rows: int) -> None:
    """Keeps the first rows of a depth embedding or position head, which has a row for each position."""
    for name, parameter in list(module.named_parameters()):
        rows = nn.Parameter(parameter.detach()[:num_rows].clone(), requires_grad=parameter.requires_grad)
        setattr(module, name, rows)


def _shorten_config(config: PreTrainedConfig, kept: list[int]) -> None:
    forget_exits(config)
    if not isinstance(getattr(config, "execution_order", "sequential"), str):
        config.execution_order = "sequential"
    if getattr(config, "shuffle_window", None) is not None:
        config.shuffle_window = min(config.shuffle_window, len(kept))
    lists = {name: [values[layer] for layer in kept] for name, values in lists_by_layer(config).items()}
    set_num_layers(config, len(kept), lists)


def layers_for_speedup(num_layers: int, speedup: float) -> list[int]:
    """The first, the last and evenly spaced layers between them, as many as run `speedup` times faster than all.

    This is Unified Layer Skipping (Liu et al. 2024, arXiv 2404.06954).

    Args:
        num_layers: Number of layers of the model.
        speedup: Factor of at least 1 and at most `num_layers`. `num_layers / speedup` layers are kept, rounded.

    Raises:
        `ValueError`: if `speedup` is out of range.
    """
    if not 1 <= speedup <= num_layers:
        raise ValueError(f"`speedup` is {speedup}; it must be from 1 to {num_layers}, the model's number of layers.")
    return evenly_spaced_layers(num_layers, max(1, round(num_layers / speedup)))


@silenceable
def search_layers(
    model: PreTrainedModel,
    data: datasets.Dataset | Dataset | DataLoader | Sequence,
    num_kept: int,
    *,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> list[int]:
    """Drops greedily, one at a time, the layer whose absence costs least loss on a calibration set.

    Layers run with their MLPs, whatever the configuration's `skipped_mlps` says, as they do in a pruned model.

    Args:
        model: A classifier of images or texts.
        data: The calibration set. Use training images or texts, not those on which the pruned model will be judged.
        num_kept: Number of layers to keep, from 1 to the model's number.
        processing_class, image_processor: As for [`score_execution_orders`].
        kwargs: `batch_size`, `max_samples` and `seed`, as for [`score_execution_orders`].

    Returns:
        The kept layers, ascending.

    Raises:
        `ValueError`: if `num_kept` is out of range.
    """
    num_layers = len(_layers_at(model, find_layers(model)))
    if isinstance(num_kept, bool) or not isinstance(num_kept, int) or not 1 <= num_kept <= num_layers:
        raise ValueError(
            f"`num_kept` is {num_kept!r}; it must be an integer from 1 to {num_layers}, the model's layers."
        )
    # One model taken apart and one loader for all rounds, which decodes the images once
    parts = as_layerwise(model)
    loader = batches_for(parts, data, chosen_processing_class(processing_class, image_processor), **kwargs)
    keep = list(range(num_layers))
    with all_layers(parts.model, with_mlps=True):  # a pruned model runs all of them
        for _ in tqdm(range(num_layers - num_kept), desc="Dropping layers", unit="layer", disable=not progress):
            candidates = [keep[:i] + keep[i + 1 :] for i in range(len(keep))]
            scores = score_execution_orders(parts, loader, candidates, progress=False)
            # A loss that is not a number is the worst one; `min` alone would keep whatever it met first
            keep = min(scores, key=lambda score: score.loss if math.isfinite(score.loss) else math.inf).execution_order
    return keep
