# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""LayerShuffle models as plain models of their families, which run without code of this package."""

import copy
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.loading import as_layershuffle
from ..checkpoints.tokenizers import takes_texts
from ..models.auto_classes import plain_type_of
from ..models.classification_heads import HEADS
from ..models.configuration_layershuffle import (
    LayerShuffleConfigMixin,
    lists_by_layer,
    num_layers_of,
    set_num_layers,
)
from ..models.execution_order import ExecutionOrder, check_execution_order
from ..models.layer_lists import check_places, layers_of_config, number_layers
from ..models.modeling_layershuffle import LayerShuffleMixin
from ..models.position_modules import PositionedLayerMixin, change_class


_DROPPED_FIELDS = {each.name for each in fields(LayerShuffleConfigMixin)} | {"architectures", "auto_map"}


def to_plain_vit(model: PreTrainedModel, execution_order: str | ExecutionOrder | None = None) -> PreTrainedModel:
    """A plain `ViTForImageClassification`, or another of its family, whose layers stand in one fixed order.

    It gives the same logits. It needs neither this package nor `trust_remote_code`. Layers that the order leaves out
    are gone, repeated ones are copied, and position heads, which change no logit, are dropped. The weights are copies.

    Args:
        model: A classifier of any family, without depth embedding.
        execution_order: `"sequential"` or layer indices, subsets and repeats included. Defaults to
            `model.config.execution_order`.

    Raises:
        `ValueError`: if the model has a depth embedding or leaves out MLPs, or the order is not one fixed valid order.

    ```python
    >>> from hf_layershuffle.deployment.plain_vit import to_plain_vit
    >>> from hf_layershuffle.layerwise import load_classifier

    >>> plain = to_plain_vit(load_classifier("outputs/digits-layershuffle"), execution_order=[0, 2, 4])
    >>> plain.save_pretrained("digits-vit-3-layers")
    ```
    """
    free = as_layershuffle(model)
    order = check_exportable(free.config, execution_order)
    configs: dict[int, Any] = {}  # new ones by the id of the old, of all modules that share them
    config = _plain_config(free.config, configs)
    lists = {name: [values[index] for index in order] for name, values in lists_by_layer(config).items()}
    set_num_layers(config, len(order), lists)
    rebuilt = layers_of_config(type(free).plain_class, config, free.layers_path)
    check_places(free.free_layers, enumerate(order), rebuilt)
    plain: Any = copy.deepcopy(free, dict(configs))
    for name in ("halting_head", "layer_controller"):  # which are asked for fewer layers only
        if getattr(plain, name, None) is not None:
            delattr(plain, name)
    layers = plain.free_layers
    # A repeated layer is copied, so that each position has weights of its own
    ordered = [
        copy.deepcopy(free.free_layers[index], dict(configs)) if index in order[:position] else layers[index]
        for position, index in enumerate(order)
    ]
    plain.set_submodule(free.layers_path, _plain_list(layers, map(_plain_layer, ordered)))
    number_layers(plain.free_layers)
    for module in [*plain.modules()]:
        if isinstance(module, LayerShuffleMixin):
            plain_class: Any = type(module).plain_class
            change_class(module, plain_class)
    return plain


def _plain_list(layers: nn.Module, modules: Iterable[nn.Module]) -> nn.Module:
    return nn.Sequential(*modules) if isinstance(layers, nn.Sequential) else nn.ModuleList(modules)


def _plain_layer(layer: nn.Module) -> nn.Module:
    """The layer without its position head, which changes no logit."""
    if isinstance(layer, PositionedLayerMixin):
        plain_class: Any = type(layer).plain_class
        del layer.depth_projection
        del layer.position_head
        change_class(layer, plain_class)
    return layer


def _plain_config(config: Any, copies: dict[int, Any]) -> PreTrainedConfig:
    plain: Any = copy.deepcopy(config, copies)
    plain.__class__ = type(config).__mro__[type(config).__mro__.index(LayerShuffleConfigMixin) + 1]
    for name in _DROPPED_FIELDS - ({"drop_path_rate"} if config.has_own_drop_path else set()):
        plain.__dict__.pop(name, None)
    return plain


def check_exportable(config: PreTrainedConfig, execution_order: str | ExecutionOrder | None = None) -> list[int]:
    """The layer indices of the plain ViT's order, as the configuration alone tells them.

    Raises:
        `ValueError`: as in [`to_plain_vit`].
    """
    if getattr(config, "depth_embedding", False):
        plain = "plain ViT" if not takes_texts(config) else "plain model"
        raise ValueError(
            f"A model with `depth_embedding=True` cannot become a {plain}: each of its layers first adds a "
            f"projection of its position's vector and of every token to the hidden states, and a {plain} layer has "
            "no such path. Publish it with its code files (`trust_remote_code=True`), or train one without depth "
            "embedding."
        )
    if getattr(config, "skipped_mlps", None):
        raise ValueError(
            f"`config.skipped_mlps` is {config.skipped_mlps}, and a layer of a plain model always runs its MLP. Set "
            "it to None, or publish the model with its code files (`trust_remote_code=True`)."
        )
    family = plain_type_of(config.model_type)
    if family in HEADS:
        raise ValueError(
            f"transformers has no image classifier of the family '{family}', so a model of it cannot become a plain "
            "one. Publish it with its code files (`trust_remote_code=True`)."
        )
    return fixed_execution_order(config, execution_order)


def fixed_execution_order(config: PreTrainedConfig, execution_order: str | ExecutionOrder | None = None) -> list[int]:
    """The layer indices of an order that is the same in every forward. None stands for the configuration's order.

    Raises:
        `ValueError`: if the order is `"arbitrary"`, or not valid.
    """
    if execution_order is None:
        execution_order = getattr(config, "execution_order", "sequential")  # a plain model has none
    if isinstance(execution_order, str) and execution_order == "arbitrary":
        raise ValueError(
            "`execution_order` is 'arbitrary', another one in each forward; a plain model has one fixed order. Pass "
            "'sequential' or a list of layer indices."
        )
    if isinstance(execution_order, str) and execution_order == "sequential":
        return list(range(num_layers_of(config)))
    return check_execution_order(execution_order, num_layers_of(config))
