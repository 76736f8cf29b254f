# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Which layers of the sources can stand where in a merged model, and of which kinds its layers are."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from ..checkpoints.loading import classes_of
from ..checkpoints.stored_checkpoint import SourceCheckpoint
from ..models.configuration_layershuffle import layer_kinds_of
from ..models.layer_lists import check_places
from .plan import MergePlan


def model_without_numbers(config: PreTrainedConfig) -> Any:
    """The LayerShuffle classifier of a configuration on the meta device."""
    with torch.device("meta"), no_init_weights():
        return classes_of(config.model_type, "The base")[1](config)


def check_layer_places(sources: Mapping[str, SourceCheckpoint], plan: MergePlan) -> None:
    """Refuses a layer at a place where it would compute something else.

    Raises:
        `ValueError`: naming the source and the layer, as in [`check_places`].
    """
    for name, source in sources.items():
        moved = [order for order in _orders_of(name, plan) if order != list(range(len(order)))]
        layers: Any = model_without_numbers(source.config).free_layers if moved else None
        for order in moved:
            try:
                check_places(layers, order, layer_kinds_of(source.config))
            except ValueError as error:
                raise ValueError(f"Source '{name}': {error}") from None


def merged_layer_kinds(sources: Mapping[str, SourceCheckpoint], plan: MergePlan) -> list[str] | None:
    """The kinds of the result's layers, which are those of the layers of which they are made.

    Raises:
        `ValueError`: if a layer is an average of layers of different kinds.
    """
    kinds = {name: layer_kinds_of(source.config) for name, source in sources.items()}
    if None in kinds.values():
        return None
    merged = []
    for index, parts in enumerate(plan.layers):
        found = {(part.source, part.layer): (kinds[part.source] or [])[part.layer] for part in parts}
        if len(set(found.values())) > 1:
            said = ", ".join(f"layer {layer} of '{source}' is '{kind}'" for (source, layer), kind in found.items())
            raise ValueError(
                f"`layers[{index}]` averages layers that compute different things: {said}. Average layers of one kind."
            )
        merged.append(next(iter(found.values())))
    return merged


def _orders_of(name: str, plan: MergePlan) -> list[list[int]]:
    """The layers of a source by position; the position itself where the plan takes none of this source.

    Several such lists, where the plan averages several layers of the source at a position.
    """
    taken = [[part.layer for part in parts if part.source == name] for parts in plan.layers]
    return [
        [layers[number] if number < len(layers) else position for position, layers in enumerate(taken)]
        for number in range(max(map(len, taken), default=0))
    ]
