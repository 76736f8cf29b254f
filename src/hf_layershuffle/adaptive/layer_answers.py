# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a classifier answers after each layer of an order, and how sure it is: all that leaving early depends on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..common.progress import silenceable
from ..data.dataloading import LabelledData
from ..layerwise import (
    LayerwiseClassifier,
    as_layerwise,
    batches_for,
    check_evaluable,
    inputs_on_device,
    labels_on_device,
)
from ..models.execution_order import ExecutionOrder, check_execution_order
from ..models.exit_rule import CRITERIA, HALTING, ExitRule, confidence
from ..models.halting_head import mean_and_first_token


@dataclass(frozen=True, repr=False)
class LayerAnswers:
    """Answers to labelled examples after each layer. From them the outcome of every rule follows without another run.

    Args:
        order: The layers, in the order in which they ran.
        labels: Class of each example: int64 of shape `(num_examples,)`.
        answers: Class answered after each layer: int64 of shape `(num_examples, positions)`; -1 where the outputs are
            not numbers, which counts as wrong.
        confidences: By criterion of [`ExitRule`], how sure each answer is: float32 of the same shape. "halting" is
            there if the model has a halting head.
    """

    order: tuple[int, ...]
    labels: np.ndarray
    answers: np.ndarray
    confidences: dict[str, np.ndarray]

    @property
    def is_right(self) -> np.ndarray:
        """Whether each answer is right: booleans of shape `(num_examples, positions)`."""
        return self.answers == self.labels[:, None]

    def __repr__(self) -> str:
        accuracies = ", ".join(f"{value:.4f}" for value in self.is_right.mean(0))
        return f"LayerAnswers({len(self.labels):,} examples, order {list(self.order)}: accuracies {accuracies})"

    def at(self, rows: np.ndarray) -> "LayerAnswers":
        """Those of some examples, by their numbers."""
        sure = {name: values[rows] for name, values in self.confidences.items()}
        return LayerAnswers(self.order, self.labels[rows], self.answers[rows], sure)

    def num_layers_run(self, rule: ExitRule) -> np.ndarray:
        """How many layers each example runs through by a rule: int64 of shape `(num_examples,)`, from 1."""
        leaves = self._in_a_row() >= rule.patience if rule.patience is not None else self._is_sure(rule)
        leaves[:, -1] = True
        return leaves.argmax(1) + 1

    def is_right_by(self, rule: ExitRule) -> np.ndarray:
        """Whether each example's answer is right by a rule: booleans of shape `(num_examples,)`."""
        return self.is_right_at(self.num_layers_run(rule))

    def drawn_exits(self, num_draws: int, seed: int = 0) -> np.ndarray:
        """How many layers each example runs through where it leaves by a coin of the halting head's λ after each.

        That is PonderNet's way of leaving (arXiv 2107.05407), here as a control. A coin after each layer is the same
        as one number drawn from [0, 1) as the threshold of an example.

        Args:
            num_draws: How often all examples are drawn, at least 1.
            seed: Seed of the draws, at least 0.

        Returns:
            int64 of shape `(num_draws, num_examples)`, from 1.
        """
        thresholds = np.random.default_rng(seed).random((num_draws, len(self.labels), 1), dtype=np.float32)
        leaves = self.halting > thresholds
        leaves[..., -1] = True
        return leaves.argmax(-1) + 1

    def is_right_at(self, num_layers_run: np.ndarray) -> np.ndarray:
        """Whether the answers after some layers are right: booleans of the shape of `num_layers_run`, `(...,
        num_examples)`."""
        is_right = np.broadcast_to(self.is_right, (*num_layers_run.shape, self.is_right.shape[1]))
        return np.take_along_axis(is_right, num_layers_run[..., None] - 1, axis=-1)[..., 0]

    @property
    def halting(self) -> np.ndarray:
        """The probability of having left after each layer, float32 of shape `(num_examples, positions)`.

        Raises:
            `ValueError`: if the model has no halting head.
        """
        if HALTING not in self.confidences:
            raise ValueError(f"These answers are of a model without a halting head, so there is no '{HALTING}'.")
        return self.confidences[HALTING]

    def _is_sure(self, rule: ExitRule) -> np.ndarray:
        sure, threshold = self.confidences[rule.criterion], np.float32(rule.threshold)
        return sure > threshold if rule.criterion == HALTING else sure >= threshold

    def _in_a_row(self) -> np.ndarray:
        """Layers in a row with the answer given after each."""
        counts = np.ones_like(self.answers)
        for position in range(1, counts.shape[1]):
            is_same = self.answers[:, position] == self.answers[:, position - 1]
            counts[:, position] = np.where(is_same, counts[:, position - 1] + 1, 1)
        return counts


@silenceable
def answers_after_layers(
    model: PreTrainedModel | LayerwiseClassifier,
    data: LabelledData,
    execution_orders: Sequence[ExecutionOrder] | None = None,
    *,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    batch_size: int = 64,
    max_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[LayerAnswers]:
    """Runs a classifier through execution orders and notes its answer after every layer.

    Args:
        model: A classifier of images or texts that chooses one class (see [`score_execution_orders`]).
        data, processing_class, image_processor, batch_size, max_samples, seed, progress: As there.
        execution_orders: Lists of layer indices; all must be equally long. Defaults to the sequential order.

    Returns:
        The answers in each order, of the same examples in the same sequence.

    Raises:
        `TypeError`, `ValueError`: as in [`score_execution_orders`].
    """
    parts = as_layerwise(model)
    orders = checked_orders(execution_orders, parts.num_layers)
    processing_class = chosen_processing_class(processing_class, image_processor)
    check_evaluable(parts.model.config, processing_class)
    loader = batches_for(parts, data, processing_class, batch_size=batch_size, max_samples=max_samples, seed=seed)
    labels: list[torch.Tensor] = []
    found: list[list[torch.Tensor]] = [[] for _ in orders]
    with torch.no_grad(), parts.evaluation_mode():
        for batch in tqdm(loader, desc="Answers after each layer", unit="batch", disable=not progress):
            labels.append(labels_on_device(parts, batch["labels"]).cpu())
            embedded = parts.embed(inputs_on_device(parts, batch))
            for order, answers in zip(orders, found):
                answers.append(_answers(parts, embedded, order))
    known = torch.cat(labels).numpy()
    return [_table(order, known, torch.cat(answers).numpy()) for order, answers in zip(orders, found)]


def checked_orders(orders: Sequence[ExecutionOrder] | None, num_layers: int) -> list[list[int]]:
    """Execution orders of equal length, or the sequential one.

    Raises:
        `ValueError`: if they are none.
    """
    given = [list(range(num_layers))] if orders is None else list(orders)
    if len(given) == 0 or isinstance(orders, str) or any(np.ndim(order) != 1 for order in given):
        raise ValueError(f"`execution_orders` is {orders!r}; it must be a list of lists of layer indices.")
    found = [check_execution_order(order, num_layers) for order in given]
    lengths = sorted({len(order) for order in found})
    if len(lengths) > 1:
        raise ValueError(f"`execution_orders` have {lengths[0]} to {lengths[-1]} layers; all must be equally long.")
    return found


def _answers(parts: LayerwiseClassifier, hidden_states: torch.Tensor, order: list[int]) -> torch.Tensor:
    """float32 of shape `(batch_size, positions, 1 + criteria)`: the class, and how sure it is, after each layer."""
    after = []
    head: Any = getattr(parts.model, "halting_head", None)
    log_stays = torch.zeros(len(hidden_states), device=hidden_states.device)
    for position, index in enumerate(order):
        before = hidden_states
        hidden_states, _ = parts.run_layer(hidden_states, index, position)
        logits = parts.classify(hidden_states)
        sure = [confidence(logits, criterion) for criterion in CRITERIA]
        if head is not None:
            pooled = [mean_and_first_token(states, parts.attention_mask) for states in (before, hidden_states)]
            log_stays = log_stays + head.log_stays(*pooled)
            sure.append(-log_stays.expm1())
        answers = torch.where(logits.isnan().any(-1), -1, logits.argmax(-1))
        after.append(torch.stack([answers.float(), *sure], dim=-1))
    return torch.stack(after, dim=1).cpu()


def _table(order: list[int], labels: np.ndarray, found: np.ndarray) -> LayerAnswers:
    criteria = (*CRITERIA, HALTING)[: found.shape[-1] - 1]
    sure = {criterion: found[..., index] for index, criterion in enumerate(criteria, start=1)}
    return LayerAnswers(tuple(order), labels, found[..., 0].astype(np.int64), sure)
