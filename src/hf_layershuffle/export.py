# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""LayerShuffle models as plain ViT or DeiT models, which run without code of this package."""

import json
from dataclasses import fields
from pathlib import Path

import torch
from transformers import DeiTForImageClassification, PreTrainedModel, ViTForImageClassification

from .card_examples import copy_examples
from .common.files import write_text
from .common.paths import public_name
from .configuration_layershuffle import LayerShuffleConfigMixin
from .data import load_image_processor
from .execution_order import check_execution_order
from .folder_records import EXPORT_FILE, read_license
from .layerwise import as_layershuffle, load_classifier


_PLAIN_CLASSES = {"layershuffle_vit": ViTForImageClassification, "layershuffle_deit": DeiTForImageClassification}
_DROPPED_FIELDS = {each.name for each in fields(LayerShuffleConfigMixin)} | {"model_type", "architectures", "auto_map"}


def to_plain_vit(model: PreTrainedModel, execution_order=None) -> PreTrainedModel:
    """A plain `ViTForImageClassification` (or `DeiT...`) whose layers stand in one fixed order, with the same logits.

    It needs neither this package nor `trust_remote_code`. Layers that the order leaves out are gone, repeated ones are
    copied, and position heads, which change no logit, are dropped. The weights are copies.

    Args:
        model: A LayerShuffle, ViT or DeiT classifier without depth embedding.
        execution_order (`str`, `list[int]` or `torch.LongTensor`, *optional*): `"sequential"` or layer indices, subsets and
            repeats included. Defaults to `model.config.execution_order`.

    Raises:
        `ValueError`: if the model has a depth embedding, or the order is not one fixed valid order.

    ```python
    >>> from hf_layershuffle.export import to_plain_vit
    >>> from hf_layershuffle.layerwise import load_classifier

    >>> plain = to_plain_vit(load_classifier("outputs/digits-layershuffle"), execution_order=[0, 2, 4])
    >>> plain.save_pretrained("digits-vit-3-layers")
    ```
    """
    model = as_layershuffle(model)
    config = model.config
    order = check_exportable(config, execution_order)
    plain_class = _PLAIN_CLASSES[config.model_type]
    kept = {name: value for name, value in config.to_dict().items() if name not in _DROPPED_FIELDS}
    plain_config = plain_class.config_class.from_dict({**kept, "num_hidden_layers": len(order)})
    plain_config._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        plain = plain_class(plain_config)
    plain.load_state_dict(_reordered(model, order), assign=True)
    return plain.train(model.training)


def save_plain_vit(folder, plain_folder, *, source: str, execution_order=None) -> None:
    """Saves the model of `folder` as a plain ViT with its image processor, example images and `export.json`, which records
    its origin and the licence that the folder's card states.

    Args:
        source (`str`): What the plain ViT's card names as its origin: the Hub id of the model.

    Raises:
        `ValueError`: as in [`to_plain_vit`].
    """
    model = load_classifier(str(folder)).eval()
    order = fixed_execution_order(model.config, execution_order)
    to_plain_vit(model, order).save_pretrained(plain_folder)
    processor = load_image_processor(folder)
    processor.save_pretrained(plain_folder)
    export = {"source": public_name(source), "execution_order": order, "license": read_license(folder)}
    write_text(Path(plain_folder) / EXPORT_FILE, json.dumps(export, indent=1) + "\n")
    copy_examples(folder, plain_folder, processor)


def check_exportable(config, execution_order=None) -> list[int]:
    """The layer indices of the plain ViT's order, from the configuration alone.

    Raises:
        `ValueError`: as in [`to_plain_vit`].
    """
    if getattr(config, "depth_embedding", False):
        raise ValueError(
            "A model with `depth_embedding=True` cannot become a plain ViT: each of its layers first adds a projection of "
            "its position's vector and of every token to the hidden states, and a plain ViT layer has no such path. "
            "Publish it with its code files (`trust_remote_code=True`), or train one without depth embedding."
        )
    return fixed_execution_order(config, execution_order)


def fixed_execution_order(config, execution_order=None) -> list[int]:
    """The layer indices of an order that is the same in every forward; None is the configuration's.

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
        return list(range(config.num_hidden_layers))
    return check_execution_order(execution_order, config.num_hidden_layers)


def _reordered(model, order: list[int]) -> dict[str, torch.Tensor]:
    """The plain model's tensors: layer `order[i]` at position i."""
    layers = f"{model.base_model_prefix}.layers."
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(layers)}
    for position, index in enumerate(order):
        for name, tensor in model.base_model.layers[index].state_dict().items():
            if not name.startswith("position_head."):
                tensors[f"{layers}{position}.{name}"] = tensor
    return {name: tensor.clone() for name, tensor in tensors.items()}
