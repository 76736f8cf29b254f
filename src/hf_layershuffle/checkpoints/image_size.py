# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The size of the images that a model takes, and models for images of another size."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration_layershuffle import encoder_config


def image_size_of(config: PreTrainedConfig) -> int | tuple[int, int] | None:
    """Pixels of the images that a model takes, by the configuration: of both sides, or height and width.

    None where the configuration does not say it, as of a model for texts.
    """
    size = getattr(encoder_config(config), "image_size", None)
    return tuple(size) if isinstance(size, (list, tuple)) else size


def patch_size_of(config: PreTrainedConfig) -> int | tuple[int, int] | None:
    """Pixels of a patch, as [`image_size_of`]."""
    size = getattr(encoder_config(config), "patch_size", None)
    return tuple(size) if isinstance(size, (list, tuple)) else size


def as_pair(size: int | tuple[int, ...] | list[int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


@torch.no_grad()
def why_not_images_of(model: PreTrainedModel, shape: tuple[int, int, int]) -> str | None:
    """Why a model does not take images of this shape; None if it does.

    Some families take others than their configuration says, since they interpolate position embeddings by themselves.

    Args:
        shape: Channels, height and width.
    """
    images = torch.zeros(1, *shape, device=model.device, dtype=model.dtype)
    was_training = model.training
    model.eval()
    try:
        model(pixel_values=images)
    except (ValueError, RuntimeError, AssertionError) as error:  # as families choose
        return " ".join(str(error).split()).rstrip(".")
    finally:
        model.train(was_training)
    return None


def with_image_size(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The model for images of another size: its position embeddings interpolated once, as its family does it.

    It is a checkpoint like any other then. Its logits are those of the first model with
    `interpolate_pos_encoding=True`.

    Args:
        model: A classifier of images.
        image_size: Pixels of each side; a multiple of the patch.

    Raises:
        `ValueError`: if the patch does not divide the size, or the family cannot change it.
    """
    current, patch = image_size_of(model.config), patch_size_of(model.config)
    if current is None:
        raise ValueError(f"`image_size` is {image_size}, and {type(model).__name__} has none to change; leave it out.")
    if as_pair(current) == (image_size, image_size):
        return model
    if patch is not None and any(image_size % side for side in as_pair(patch)):
        side = as_pair(patch)[0]
        near = max(1, image_size // side) * side
        raise ValueError(
            f"`image_size` is {image_size}, which the patch of {side} pixels does not divide; choose {near} or "
            f"{near + side}."
        )
    config: Any = copy.deepcopy(model.config)
    encoder_config(config).image_size = image_size
    tensors = model.state_dict()
    if hasattr(config, "model_args"):
        config.model_args = {**(config.model_args or {}), "img_size": image_size}
        tensors = _resized_by_timm(model, image_size)
    resized: Any = type(model)._from_config(config, attn_implementation=model.config._attn_implementation)
    with torch.no_grad():
        for name, new in resized.state_dict().items():
            if tensors[name].shape != new.shape:
                tensors[name] = _interpolated(model, name, new.shape, image_size)
    resized.load_state_dict(tensors)
    return resized.to(model.device, model.dtype).train(model.training)


def _resized_by_timm(model: PreTrainedModel, image_size: int) -> dict[str, torch.Tensor]:
    """The tensors of a model of timm, resized by its own function."""
    copied: Any = copy.deepcopy(model)
    if not hasattr(copied.timm_model, "set_input_size"):
        raise ValueError(_cannot(model, image_size))
    copied.timm_model.set_input_size(img_size=(image_size, image_size))
    return copied.state_dict()


def _interpolated(model: PreTrainedModel, name: str, shape: torch.Size, image_size: int) -> torch.Tensor:
    """The tensor of this name for images of another size.

    Raises:
        `ValueError`: if the family has no way to change it.
    """
    old = model.get_parameter(name)
    if name.endswith("relative_position_bias_table"):
        return _interpolated_bias(model.get_submodule(name.rpartition(".")[0]), old, shape)
    path = name
    while path:
        path = path.rpartition(".")[0]
        embeddings: Any = model.get_submodule(path)
        if hasattr(embeddings, "interpolate_pos_encoding"):
            positions, width = shape[-2:]
            images = old.new_zeros(1, positions, width)  # of which the number of tokens is read
            return embeddings.interpolate_pos_encoding(images, image_size, image_size).reshape(shape)
    raise ValueError(_cannot(model, image_size))


def _interpolated_bias(module: nn.Module, table: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Relative position biases of shape `(distances + 3, heads)`, as BEiT interpolates them in its forward.

    The last three are of the class token.
    """
    window: Any = module.window_size
    height, width = (2 * side - 1 for side in window)
    side = round((shape[0] - 3) ** 0.5)
    biases = table[:-3].reshape(1, width, height, -1).permute(0, 3, 1, 2)
    biases = nn.functional.interpolate(biases, size=(side, side), mode="bilinear")
    return torch.cat([biases.permute(0, 2, 3, 1).reshape(side * side, -1), table[-3:]])


def _cannot(model: PreTrainedModel, image_size: int) -> str:
    return (
        f"`image_size` is {image_size}, and {type(model).__name__} takes images of {image_size_of(model.config)} "
        "pixels only, since its family has no way to interpolate position embeddings; leave out --image_size."
    )
