# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Trains the network that chooses a program for each example, on a frozen model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoints.identity import skipped_mlps_of, weights_digest
from ..common.checks import check_integers, check_number
from ..data.dataloading import LabelledData
from ..layerwise import LayerwiseClassifier, as_layerwise
from ..models.execution_order import ExecutionOrder
from .program_answers import ProgramAnswers, answers_of_programs, programs_by_length
from .program_predictor import ProgramPredictor


HIDDEN_SIZE = 64
NUM_STEPS = 1000
WEIGHT_DECAY = 1.0
LEARNING_RATE = 3e-3
BATCH_SIZE = 64


def train_program_predictor(
    model: PreTrainedModel | LayerwiseClassifier,
    data: LabelledData,
    programs: Sequence[ExecutionOrder] | None = None,
    *,
    hidden_size: int = HIDDEN_SIZE,
    num_steps: int = NUM_STEPS,
    weight_decay: float = WEIGHT_DECAY,
    seed: int = 0,
    **evaluation: Any,
) -> ProgramPredictor:
    """Trains a [`ProgramPredictor`] on which programs are right for each of some labelled examples.

    The model is frozen. It runs once on the data, by all programs; the predictor then learns from that table.

    Args:
        model: A classifier of images or texts that chooses one class.
        data: Examples that the model was not trained on: on its training data nearly all programs are right. Report on
            others than these.
        programs: The set to choose from. Defaults to [`programs_by_length`] with two layers in common.
        hidden_size: Size of the predictor's hidden layer, at least 1.
        num_steps: Steps of AdamW on batches of 64, at least 1.
        weight_decay: Of AdamW, at least 0.
        seed: Seed of the weights, of the batches and, with `max_samples`, of the examples, at least 0.
        evaluation: Further arguments of [`answers_of_programs`], such as `processing_class`.

    Raises:
        `TypeError`, `ValueError`: as in [`answers_of_programs`]; also if a number is out of range.

    ```python
    >>> predictor = ls.train_program_predictor(model, held_out, processing_class=processor)
    >>> outputs = predictor.run(model, pixel_values, cost_weight=0.05)
    ```
    """
    check_integers(hidden_size=(hidden_size, 1), num_steps=(num_steps, 1), seed=(seed, 0))
    check_number("weight_decay", weight_decay, 0, 100)
    parts = as_layerwise(model)
    depth = parts.num_layers
    if programs is None:
        programs = programs_by_length(depth, num_shared_of(depth))
    answers = answers_of_programs(parts, data, programs, seed=seed, **evaluation)
    return fit(answers, settings_of(parts, hidden_size), num_steps, weight_decay, seed).to(parts.device)


def num_shared_of(num_layers: int) -> int:
    """Layers that programs have in common by default: two, if there are at least two programs then."""
    return max(0, min(2, num_layers - 2))


def settings_of(parts: LayerwiseClassifier, hidden_size: int = HIDDEN_SIZE) -> dict[str, Any]:
    """What a predictor for a model is made with, beside the programs."""
    return {
        "hidden_size": hidden_size,
        "num_layers": parts.num_layers,
        "weights": weights_digest(parts.model),
        "skipped_mlps": skipped_mlps_of(parts.model.config),
    }


@torch.inference_mode(False)
@torch.enable_grad()
def fit(
    answers: ProgramAnswers,
    settings: dict[str, Any],
    num_steps: int = NUM_STEPS,
    weight_decay: float = WEIGHT_DECAY,
    seed: int = 0,
) -> ProgramPredictor:
    """A predictor of this table, trained by binary cross-entropy. The same arguments give the same weights."""
    features, targets = torch.from_numpy(answers.features), torch.from_numpy(answers.is_right).float()
    if not features.isfinite().all():
        raise ValueError(
            "The model's outputs are not finite after the layers that all programs begin with, so nothing can be "
            "learned from them; take an earlier checkpoint, or a wider dtype."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone: another's state would not come back
        predictor = ProgramPredictor(answers.programs, features.shape[1], **settings)
    predictor.mean.copy_(features.mean(0))
    predictor.deviation.copy_(features.std(0, correction=0).clamp(min=1e-6))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    batches: list[torch.Tensor] = []
    for _ in range(num_steps):
        batches = batches or list(torch.randperm(len(features), generator=generator).split(BATCH_SIZE))
        rows = batches.pop()
        loss = nn.functional.binary_cross_entropy_with_logits(predictor(features[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return predictor.eval()


@torch.no_grad()
def cost_weight_for(predictor: ProgramPredictor, features: np.ndarray, max_mean_layers: float) -> float:
    """The least cost weight, of 200 from 0.0001 to 10, with which these examples run through at most so many layers.

    Args:
        features: Of the examples: float32 of shape `(num_examples, num_features)`.
        max_mean_layers: Layers that an example may run through on average. Below the least, the largest weight.
    """
    known = torch.from_numpy(features).to(predictor.mean.device)
    weights = np.geomspace(1e-4, 10, 200)
    for weight in weights:
        if predictor.num_layers_run[predictor.choose(known, float(weight))].float().mean() <= max_mean_layers:
            return float(weight)
    return float(weights[-1])
