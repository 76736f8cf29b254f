# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A controller that sees an example before its first layer, and says which layers are worth most to it (ADMN, NeurIPS
2025).

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from .position_modules import mark


logger = logging.get_logger(__name__)

NOISE = 0.1  # scale of the Gumbel noise on the scores in training
TEMPERATURE = 1.0  # of the softmax through which gradients flow
MAX_WIDTH = 128


class LayerController(nn.Module):
    """Scores the layers for an example, from the hidden states that the first layer gets.

    It sees their mean and their spread over the tokens, each as the embeddings give them and after a map that each
    token goes through. A fresh one gives all layers the same score.

    Args:
        hidden_size: Size of the hidden states.
        num_layers: Number of layers of the model.
        layer_norm_eps: Of the normalisations.
    """

    def __init__(self, hidden_size: int, num_layers: int, layer_norm_eps: float):
        super().__init__()
        width = min(hidden_size, MAX_WIDTH)
        self.token_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.token_dense = nn.Linear(hidden_size, width)
        self.norm = nn.LayerNorm(2 * (hidden_size + width), eps=layer_norm_eps)
        self.dense = nn.Linear(2 * (hidden_size + width), width)
        self.activation = nn.GELU()
        self.scores = nn.Linear(width, num_layers)
        mark(self.scores, "starts_at_zero")

    @classmethod
    def of(cls, config: Any, num_layers: int) -> "LayerController":
        """The controller that goes with the configuration of an encoder."""
        return cls(config.hidden_size, num_layers, getattr(config, "layer_norm_eps", 1e-6))

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        """Scores, float32 of shape `(batch_size, num_layers)`.

        Args:
            hidden_states: Of shape `(batch_size, tokens, hidden_size)`.
            attention_mask: Of shape `(batch_size, tokens)`: padding, which does not count, is 0. One of another shape
                is not looked at.
        """
        tokens = self.activation(self.token_dense(self.token_norm(hidden_states)))
        features = torch.cat((hidden_states, tokens), dim=-1).float()
        weights = torch.ones_like(features[..., :1])
        if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == features.shape[:2]:
            weights = attention_mask[..., None].to(features.dtype)
        count = weights.sum(dim=1).clamp(min=1)
        mean = (features * weights).sum(dim=1) / count
        spread = ((features - mean[:, None]).square() * weights).sum(dim=1) / count
        seen = torch.cat((mean, (spread + 1e-6).sqrt()), dim=-1).to(hidden_states.dtype)
        return self.scores(self.activation(self.dense(self.norm(seen)))).float()


def choose_layers(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """Which layers have the highest scores: booleans of the shape of `scores`, `budget` of them True in each row.

    Of equal scores, those of the first layers count as higher.

    Args:
        scores: Of shape `(batch_size, positions)`.
        budget: From 1 to the number of positions.
    """
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :budget]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


def straight_through_gates(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """1 for the layers that [`choose_layers`] chooses and 0 for the others, with the gradient of a softmax.

    Args:
        scores: With noise, float32 of shape `(batch_size, positions)`.
        budget: As there.
    """
    soft = (scores / TEMPERATURE).softmax(dim=1)
    return choose_layers(scores, budget) + (soft - soft.detach())


def draw_budget(rng: np.random.Generator, num_positions: int) -> int:
    """A budget for a forward pass in training, uniform from 1 to `num_positions - 1`: all layers are no choice."""
    return int(rng.integers(1, max(num_positions, 2)))


def gumbel_noise(rng: np.random.Generator, batch_size: int, num_positions: int) -> torch.Tensor:
    """The noise on the scores of a forward pass in training, float32 of shape `(batch_size, num_positions)`.

    Processes that train together draw the noise of the whole batch, of which each takes its own rows. So it is the
    same as if one process had all of the batch.
    """
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, count = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_distributed else (0, 1)
    noise = NOISE * rng.gumbel(size=(count, batch_size, num_positions))[rank]
    return torch.from_numpy(noise).float()


def train_controller_only(model: Any) -> None:
    """Freezes all weights of a model but those of its layer controller.

    Raises:
        `ValueError`: if it has none, as an encoder whose classifier has one.
    """
    if getattr(model, "layer_controller", None) is None:
        raise ValueError(
            f"This {type(model).__name__} has no layer controller to train; take a classifier that is made or loaded "
            "with `layer_controller=True`."
        )
    model.requires_grad_(False)
    model.layer_controller.requires_grad_(True)


def forget_layer_controller(owner: Any) -> None:
    """Takes the layer controller out of a model or configuration, with a warning: it was trained for other layers."""
    config = getattr(owner, "config", owner)
    if getattr(config, "layer_controller", False):
        logger.warning(
            "The layer controller was trained for other layers and is not kept; train one for the new model: "
            "`layer_controller=True`."
        )
        config.layer_budget = None
        config.layer_controller = False
    if getattr(owner, "layer_controller", None) is not None and owner is not config:
        del owner.layer_controller
