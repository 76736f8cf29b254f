# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Trained exits: a head that says after each layer whether an example leaves, and the loss that it learns by.

The loss is PonderNet's (arXiv 2107.05407), the head's inputs are PALBERT's (arXiv 2204.03276).

This file travels to the Hub beside the weights: it may import `from .x import y` only.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .layer_program import ConstantCall, Run, StandIn, run_program
from .position_modules import mark
from .row_subsets import NOT_FOR_CLASSES, inputs_of_rows


class HaltingHead(nn.Module):
    """Says after each layer, from the hidden states before and after it, how likely an example leaves there.

    All layers share it. A fresh one says the prior's λ, whatever it sees. So all who have not left leave at the last
    layer, which is more of them than by the truncated prior ([`log_prior`]) of which the loss is.

    Args:
        hidden_size: Size of the hidden states.
        layer_norm_eps: Of the normalisation of its inputs.
        prior: Probability in (0, 1) that a fresh head gives.
    """

    def __init__(self, hidden_size: int, layer_norm_eps: float, prior: float):
        super().__init__()
        self.norm = nn.LayerNorm(4 * hidden_size, eps=layer_norm_eps)
        self.dense = nn.Linear(4 * hidden_size, hidden_size)
        self.activation = nn.GELU()
        self.out = nn.Linear(hidden_size, 1)
        mark(self.out, "starts_at_zero")
        self.out.first_bias = math.log(prior / (1 - prior))  # type: ignore[assignment]  # of the initialisation

    @classmethod
    def of(cls, config: Any, prior: float) -> "HaltingHead":
        """That of an encoder's configuration."""
        return cls(config.hidden_size, getattr(config, "layer_norm_eps", 1e-6), prior)

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Log-odds of leaving, float32 of shape `(...)`.

        Args:
            before, after: Summaries of the hidden states (see [`mean_and_first_token`]), of shape `(..., 2 *
                hidden_size)`.
        """
        joined = self.norm(torch.cat((before, after), dim=-1))
        return self.out(self.activation(self.dense(joined))).squeeze(-1).float()

    def log_stays(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Logarithm of the probability of not leaving there, of the same shape."""
        return F.logsigmoid(-self(before, after))


def mean_and_first_token(hidden_states: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
    """The mean token and the first, joined: what classifiers read, whatever their family.

    Args:
        hidden_states: Of shape `(batch_size, tokens, hidden_size)`.
        attention_mask: Of shape `(batch_size, tokens)`: 0 for padding, which is left out. One of another shape counts
            for nothing.

    Returns:
        Tensor of shape `(batch_size, 2 * hidden_size)`.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != hidden_states.shape[:2]:
        return torch.cat((hidden_states.mean(dim=1), hidden_states[:, 0]), dim=-1)
    weights = attention_mask.to(hidden_states.dtype)[..., None]
    mean = (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    first_token = (attention_mask != 0).int().argmax(dim=1)
    first = hidden_states[torch.arange(len(hidden_states), device=mean.device), first_token]
    return torch.cat((mean, first), dim=-1)


def log_probabilities_of_leaving(logits: torch.Tensor) -> torch.Tensor:
    """Logarithm of `p_i = λ_i ∏_{j<i} (1 - λ_j)`, the probability of leaving at each position (arXiv 2107.05407).

    At the last position λ is 1, whatever the head says, so the probabilities sum to 1.

    Args:
        logits: Log-odds of each λ, float32 of shape `(batch_size, positions)`.
    """
    stays = F.pad(F.logsigmoid(-logits).cumsum(dim=1)[:, :-1], (1, 0))
    is_last = torch.arange(logits.shape[1], device=logits.device) == logits.shape[1] - 1
    # Masked and not cut off, so that the head has a gradient where one layer runs, as other processes expect it
    return stays + F.logsigmoid(logits).masked_fill(is_last, 0.0)


def log_prior(prior: float, num_positions: int) -> torch.Tensor:
    """Logarithm of the geometric distribution over positions, truncated and normalised: float32 `(num_positions,)`.

    Args:
        prior: Probability in (0, 1) of leaving at each position.
        num_positions: How many there are.
    """
    logarithms = math.log(prior) + math.log1p(-prior) * torch.arange(num_positions, dtype=torch.float32)
    return logarithms.log_softmax(dim=0)


def halting_losses(losses: torch.Tensor, log_probabilities: torch.Tensor, prior: float, weight: float) -> torch.Tensor:
    """PonderNet's loss of each example: `Σ p_i · loss_i + weight · KL(p ‖ prior)`, float32 of shape `(batch_size,)`.

    Args:
        losses: Loss of the answer after each layer, of shape `(batch_size, positions)`.
        log_probabilities: As from [`log_probabilities_of_leaving`], of the same shape.
        prior: As for [`log_prior`].
        weight: At least 0 (β of arXiv 2107.05407).
    """
    probabilities = log_probabilities.exp()
    expected = log_prior(prior, log_probabilities.shape[1]).to(log_probabilities.device)
    divergence = (probabilities * (log_probabilities - expected)).sum(dim=1)
    return (probabilities * losses.float()).sum(dim=1) + weight * divergence


def halting_loss(
    layer_logits: torch.Tensor,
    log_probabilities: torch.Tensor,
    labels: torch.Tensor,
    config: Any,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of [`halting_losses`] of cross-entropies over the examples that have a label; 0 if none has.

    Args:
        layer_logits: Class logits after each layer, of shape `(batch_size, positions, num_labels)`.
        log_probabilities: Of shape `(batch_size, positions)`.
        labels: Classes of shape `(batch_size,)`. Examples with -100 are left out.
        config: Has `halting_prior` and `halting_loss_weight`.
        num_items_in_batch: Instead of the number of labels: what the sum is divided by.
    """
    labels = labels.to(layer_logits.device).reshape(-1)
    by_position = F.cross_entropy(
        layer_logits.float().movedim(2, 1), labels[:, None].expand(layer_logits.shape[:2]), reduction="none"
    )
    losses = halting_losses(by_position, log_probabilities, config.halting_prior, config.halting_loss_weight)
    is_counted = labels != -100
    count = is_counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return torch.where(is_counted, losses, 0.0).sum() / torch.as_tensor(count, device=losses.device)


class HaltingRun(Run):
    """A [`Run`] of training, which gives the answer and the probability of leaving after every layer.

    Args:
        model: The model, a classifier with a halting head.
        order: Index of the layer at each position.
        inputs: All inputs of the forward by name.
        forward: The plain forward; takes inputs by name.
    """

    layer_logits: torch.Tensor | None = None  # (batch_size, positions, num_labels), when the forward is done
    halting_log_probabilities: torch.Tensor | None = None  # (batch_size, positions)

    def __init__(self, model: Any, order: list[int], inputs: dict[str, Any], forward: Callable[..., Any]):
        self.hidden_states: list[torch.Tensor] = []  # before the first layer, and after each
        self.gives_tuple = False
        super().__init__(model.free_layers, order, model._depth_embedding, model._dropped_paths, model._skipped_mlps)
        self.model = model
        self.inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_CLASSES}
        self.forward = forward

    def at(self, layer: nn.Module, position: int) -> Any:
        return _NotedCall(super().at(layer, position), self, position)

    def finish(self, logits: torch.Tensor) -> None:
        """Finds both, given the logits after the last layer."""
        states, mask = self.hidden_states, self.inputs.get("attention_mask")
        if logits.ndim != 2 or len(logits) != len(states[0]):
            raise ValueError(
                f"{type(self.model).__name__} gives logits of shape {tuple(logits.shape)} for {len(states[0])} "
                "examples; a halting head is for classifiers that give one answer an example. Set `halting_head` to "
                "False, or take another model."
            )
        pooled = torch.stack([mean_and_first_token(each, mask) for each in states], dim=1)
        self.halting_log_probabilities = log_probabilities_of_leaving(
            self.model.halting_head(pooled[:, :-1], pooled[:, 1:])
        )
        first, others = states[1:-1][:1], states[2:-1]
        by_position = [self._classify(each, is_first=True) for each in first]
        by_position += self._classify(torch.cat(others)).chunk(len(others)) if others else []
        self.layer_logits = torch.stack([*by_position, logits], dim=1)
        self.hidden_states = []

    def _classify(self, hidden_states: torch.Tensor, is_first: bool = False) -> torch.Tensor:
        """Logits of hidden states of the first position or of several others, in one pass of what stands behind the
        layers."""
        if self._needs_all_inputs():
            rows = torch.arange(self._batch_size, device=hidden_states.device)
            repeated = rows.repeat(len(hidden_states) // self._batch_size)
            inputs = inputs_of_rows(self.inputs, repeated, self._batch_size)
            return self._logits(hidden_states, inputs, is_first)
        return self._logits(hidden_states, self._inputs_of_one(), is_first)

    def _logits(self, hidden_states: torch.Tensor, inputs: dict[str, Any], is_first: bool = False) -> torch.Tensor:
        constant = ConstantCall(self.model.free_layers[0], hidden_states, self.gives_tuple)
        # Twice behind the first position, after which DeBERTa-v2 does something more
        with run_program(self.model.free_layers, [constant] * (1 if is_first else 2)):
            return self.forward(self.model, **inputs, return_dict=True).logits

    def _inputs_of_one(self) -> dict[str, Any]:
        return inputs_of_rows(self.inputs, slice(0, 1), self._batch_size)

    @property
    def _batch_size(self) -> int:
        return len(self.hidden_states[0])

    @torch.no_grad()
    def _needs_all_inputs(self) -> bool:
        """Whether the head reads the inputs of all examples once more, as a mask of padding.

        Else the embeddings, which are computed again, are of one example.
        """
        model = self.model
        tensors = {name for name, value in self.inputs.items() if isinstance(value, torch.Tensor)}
        if tensors != {model.main_input_name}:
            return True
        states = self.hidden_states[-1].detach()
        if model._reads_inputs_after_layers is None and len(states) > 1:
            modes = {module: module.training for module in model.modules()}
            model.eval()  # without dropout, of which two passes differ
            try:
                pair = [self._logits(states, inputs) for inputs in (self.inputs, self._inputs_of_one())]
            finally:
                for module, mode in modes.items():
                    module.training = mode
            model._reads_inputs_after_layers = not torch.equal(*pair)
        return model._reads_inputs_after_layers is not False


class _NotedCall(StandIn):
    """A layer whose hidden states are kept for the halting head."""

    def __init__(self, layer: Any, run: HaltingRun, position: int):
        super().__init__(layer)
        self.run = run
        self.position = position

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        if self.position == 0:
            run.hidden_states = [args[0] if args else kwargs["hidden_states"]]
        output = self.layer(*args, **kwargs)
        run.gives_tuple = isinstance(output, (tuple, list))
        run.hidden_states.append(output[0] if run.gives_tuple else output)
        return output
