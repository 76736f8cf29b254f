# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Which layers of the sources can stand where in a merged model, and what its configuration says of each."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from ..checkpoints.loading import classes_of
from ..checkpoints.stored_checkpoint import SourceCheckpoint
from ..models.configuration_layershuffle import lists_by_layer, num_layers_of
from ..models.layer_lists import check_places
from .plan import MergePlan


def model_without_numbers(config: PreTrainedConfig) -> Any:
    """The LayerShuffle classifier of a configuration on the meta device."""
    with torch.device("meta"), no_init_weights():
        return classes_of(config.model_type, "The base")[1](config)


def check_layer_places(sources: Mapping[str, SourceCheckpoint], plan: MergePlan, merged_layers: Any) -> None:
    """Refuses a layer at a place where it would compute something else.

    Args:
        sources: The sources by name.
        plan: The plan.
        merged_layers: The layers of the result, without numbers.

    Raises:
        `ValueError`: naming the source and the layer, as in [`check_places`].
    """
    configs = {name: source.config.to_json_string(use_diff=False) for name, source in sources.items()}
    built: dict[str, Any] = {}  # layers by the configuration, which is most often one and the same
    for name, source in sources.items():
        taken = [(place, part) for place, parts in enumerate(plan.layers) for part in parts if part.source == name]
        config = configs[name]
        stays = all(place == part.layer for place, part in taken) and num_layers_of(source.config) == len(plan.layers)
        if stays and config == configs[plan.base_name]:
            continue  # the result's configuration is made of this one, and says the same of these layers
        try:
            if config not in built:
                built[config] = model_without_numbers(source.config).free_layers
            check_places(built[config], [(place, part.layer) for place, part in taken], merged_layers)
        except ValueError as error:
            raise ValueError(f"Source '{name}': {error}") from None


def merged_lists(sources: Mapping[str, SourceCheckpoint], plan: MergePlan) -> dict[str, list]:
    """What the configuration lists of each layer of the result, which is what it says of those they are made of.

    Raises:
        `ValueError`: if a layer is an average of layers of which it says different things.
    """
    lists = {name: lists_by_layer(source.config) for name, source in sources.items()}
    fields = [field for field in lists[plan.base_name] if all(field in of_source for of_source in lists.values())]
    merged: dict[str, list] = {field: [] for field in fields}
    for field, values in merged.items():
        for index, parts in enumerate(plan.layers):
            found = {(part.source, part.layer): lists[part.source][field][part.layer] for part in parts}
            if len(set(found.values())) > 1:
                said = ", ".join(f"layer {layer} of '{source}' is {kind!r}" for (source, layer), kind in found.items())
                raise ValueError(
                    f"`layers[{index}]` averages layers that compute different things (`{field}`): {said}. Average "
                    "layers of one kind."
                )
            values.append(next(iter(found.values())))
    return merged
