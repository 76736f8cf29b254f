# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Where a model looks under different execution orders: attention rollout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.image_size import as_pair, patch_size_of
from ..checkpoints.loading import implementations_of
from ..layerwise import LayerwiseClassifier, as_layerwise
from ..models.execution_order import check_execution_order


MAX_SPECIAL_TOKENS = 16  # CLS and registers


@dataclass(frozen=True)
class AttentionMaps:
    """How much of each image patch reaches the CLS token, by attention rollout.

    Args:
        maps: Fractions of shape `(num_images, num_orders, rows, columns)`; with the special tokens' share, which is
            not shown, those of an image and order sum to 1.
        predicted: Class predicted for each image in each order; integers of shape `(num_images, num_orders)`.
        execution_orders: The orders.
        labels: Class of each image, or None.
        images: The images, in [0, 1], of shape `(num_images, height, width, channels)`; not saved with a report.
    """

    maps: np.ndarray
    predicted: np.ndarray
    execution_orders: list[list[int]]
    labels: np.ndarray | None = None
    images: np.ndarray | None = None


def attention_rollout(
    model: PreTrainedModel | LayerwiseClassifier,
    pixel_values: torch.Tensor,
    execution_orders: Sequence[Sequence[int]],
    *,
    labels: Sequence[int] | torch.Tensor | np.ndarray | None = None,
) -> AttentionMaps:
    """Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928, section 3) of images under several orders.

    The attention of each layer, mean over heads, is averaged with the identity for the residual connection. The
    matrices are multiplied in the order in which the layers run. The model computes attention eagerly meanwhile,
    whatever its attention implementation. Memory holds `batch_size * heads * tokens**2` floats, so pass a few images
    at a time.

    Args:
        model: A LayerShuffle, ViT or DeiT image classifier, or a [`LayerwiseClassifier`].
        pixel_values: Images of shape `(num_images, num_channels, height, width)`, of any size that the model takes.
        execution_orders: Orders as layer indices. Subsets and repeats are allowed.
        labels: Classes of the images, for the picture.

    Raises:
        `ValueError`: if an order is not valid or there is none, the attention does not give its weights, or the tokens
            are not those of a grid of patches.
    """
    parts = as_layerwise(model)
    orders = [check_execution_order(order, parts.num_layers) for order in execution_orders]
    if not orders:
        raise ValueError("`execution_orders` is empty; pass at least one order.")
    rows_columns = _patch_grid(parts, pixel_values)
    num_patches = rows_columns[0] * rows_columns[1]
    maps = []
    predicted = []
    with parts.evaluation_mode(), torch.no_grad(), _recorded_attention(parts) as attention:
        embedded = parts.embed(pixel_values.to(parts.device))
        _check_tokens(parts, embedded.shape[1], rows_columns)
        for order in orders:
            hidden_states = embedded
            rollout = torch.eye(embedded.shape[1], device=parts.device)
            for position, index in enumerate(order):
                hidden_states, _ = parts.run_layer(hidden_states, index, position)
                # (num_images, heads, tokens, tokens) -> over heads
                weights = _checked_weights(parts, attention["weights"], embedded).float().mean(1)
                rollout = (0.5 * weights + 0.5 * torch.eye(weights.shape[-1], device=weights.device)) @ rollout
            # From CLS, past the special tokens; a family without a CLS token takes the mean of all
            answer = rollout[:, 0] if rollout.shape[1] > num_patches else rollout.mean(1)
            to_patches = answer[:, -num_patches:]
            maps.append(to_patches.unflatten(-1, rows_columns).cpu().numpy())
            predicted.append(parts.classify(hidden_states).argmax(-1).cpu().numpy())
    return AttentionMaps(
        maps=np.stack(maps, axis=1),
        predicted=np.stack(predicted, axis=1),
        execution_orders=orders,
        labels=None if labels is None else np.asarray(labels),
        images=_displayable(pixel_values),
    )


@contextmanager
def _recorded_attention(parts: LayerwiseClassifier) -> Iterator[dict[str, Any]]:
    """Yields a dict whose "weights" are, after each `run_layer`, what its attention gives beside its output."""
    recorded: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        recorded["weights"] = output[1] if isinstance(output, tuple) and len(output) > 1 else None

    implementations = implementations_of(parts.model.config)
    handles = [attention_of(layer).register_forward_hook(hook) for layer in parts.layers]
    try:
        parts.model.set_attn_implementation("eager")  # the others do not return the weights
        yield recorded
    finally:
        parts.model.set_attn_implementation(implementations[""])
        parts.model.config._attn_implementation = implementations  # those of towers may be others
        for handle in handles:
            handle.remove()


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a layer, which gives its output and the weights.

    Raises:
        `ValueError`: if there is none of a name that is known.
    """
    for name in ("attention", "self_attn", "attn"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise ValueError(f"{type(layer).__name__} has no module named attention, self_attn or attn to look into.")


_NO_MAPS = "so there are no attention maps of it."


def _patch_grid(parts: LayerwiseClassifier, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of patches of these images."""
    size = patch_size_of(parts.model.config)
    if size is None or pixel_values.ndim != 4:
        name, shape = type(parts.model).__name__, tuple(pixel_values.shape)
        raise ValueError(f"{name} does not divide inputs of shape {shape} into a grid of patches, {_NO_MAPS}")
    height, width = as_pair(size)
    return pixel_values.shape[-2] // height, pixel_values.shape[-1] // width


def _check_tokens(parts: LayerwiseClassifier, num_tokens: int, grid: tuple[int, int]) -> None:
    """Refuses tokens other than a few special ones and then one for each patch."""
    if not 0 <= num_tokens - grid[0] * grid[1] <= MAX_SPECIAL_TOKENS:
        name = type(parts.model).__name__
        raise ValueError(f"{name} has {num_tokens} tokens for {grid[0]} x {grid[1]} patches, {_NO_MAPS}")


def _checked_weights(parts: LayerwiseClassifier, weights: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    num_images, num_tokens = hidden_states.shape[:2]
    shape = tuple(weights.shape) if isinstance(weights, torch.Tensor) else ()
    if len(shape) != 4 or (shape[0], *shape[2:]) != (num_images, num_tokens, num_tokens):
        raise ValueError(f"The attention of {type(parts.model).__name__} does not give its weights, {_NO_MAPS}")
    return weights


def _displayable(pixel_values: torch.Tensor) -> np.ndarray:
    """Images stretched to [0, 1] one by one, as the normalisation is not known, with the channels last."""
    values = pixel_values.float().cpu()
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return ((values - low) / (high - low).clamp_min(1e-6)).movedim(1, -1).numpy()
