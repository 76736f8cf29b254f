# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a classifier answers to each example by each of some programs, in one pass over the data.

Another sequence of the layers for each example is the idea of CoLa (arXiv 2507.07996) and PoLar (arXiv 2606.06574).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..common.checks import check_integers
from ..common.progress import silenceable
from ..data.dataloading import LabelledData
from ..evaluation.order_plans import evenly_spaced_layers
from ..evaluation.order_tree import OrderTree, walk
from ..layerwise import (
    LayerwiseClassifier,
    as_layerwise,
    batches_for,
    check_evaluable,
    inputs_on_device,
    labels_on_device,
)
from ..models.execution_order import ExecutionOrder, check_execution_order


Program = tuple[int, ...]


@dataclass(frozen=True, repr=False)
class ProgramAnswers:
    """Answers to labelled examples by each of some programs.

    Args:
        programs: Distinct execution orders.
        labels: Class of each example: int64 of shape `(num_examples,)`.
        answers: Class answered by each program: int64 of shape `(num_examples, programs)`; -1 where the outputs are
            not numbers, which counts as wrong.
        features: What is known of each example after the layers that all programs begin with, see
            [`features_of`]: float32 of shape `(num_examples, num_features)`.
    """

    programs: tuple[Program, ...]
    labels: np.ndarray
    answers: np.ndarray
    features: np.ndarray

    @property
    def is_right(self) -> np.ndarray:
        """Whether each answer is right: booleans of shape `(num_examples, programs)`."""
        return self.answers == self.labels[:, None]

    @property
    def num_layers_run(self) -> np.ndarray:
        """Layers of each program: int64 of shape `(programs,)`."""
        return np.array([len(program) for program in self.programs])

    def __repr__(self) -> str:
        found = ", ".join(f"{list(each)}: {value:.4f}" for each, value in zip(self.programs, self.is_right.mean(0)))
        return f"ProgramAnswers({len(self.labels):,} examples, accuracies {found})"

    def at(self, rows: np.ndarray) -> "ProgramAnswers":
        """Those of some examples, by their numbers."""
        return ProgramAnswers(self.programs, self.labels[rows], self.answers[rows], self.features[rows])


def programs_by_length(num_layers: int, num_shared: int = 2, num_programs: int | None = None) -> list[list[int]]:
    """A small set of programs: the first layers, then evenly spaced ones of those left, in several numbers.

    Args:
        num_layers: Layers of the model, at least 1.
        num_shared: How many layers all programs begin with, from 0 to `num_layers - 1`. A predictor sees what they
            give.
        num_programs: How many programs, from 1 to `num_layers - num_shared`, which is the default.

    Returns:
        Programs of evenly spaced lengths, the shortest first. The last is the sequential order.

    Raises:
        `ValueError`: if a number is out of range.
    """
    check_integers(num_layers=(num_layers, 1))
    if isinstance(num_shared, bool) or not isinstance(num_shared, int) or not 0 <= num_shared < num_layers:
        raise ValueError(f"`num_shared` is {num_shared!r}; it must be an integer from 0 to {num_layers - 1}.")
    left = num_layers - num_shared
    check_integers(num_programs=(left if num_programs is None else num_programs, 1))
    shared = list(range(num_shared))
    lengths = np.linspace(left, 1, min(num_programs or left, left)).round().astype(int)[::-1].tolist()
    return [shared + [num_shared + layer for layer in evenly_spaced_layers(left, count)] for count in lengths]


def checked_programs(programs: Sequence[ExecutionOrder], num_layers: int) -> tuple[Program, ...]:
    """Distinct execution orders as tuples.

    Raises:
        `ValueError`: if one is none, or there are fewer than two different ones.
    """
    if isinstance(programs, str) or any(np.ndim(each) != 1 for each in programs):
        raise ValueError(f"`programs` is {programs!r}; it must be a list of lists of layer indices.")
    found = [tuple(check_execution_order(each, num_layers)) for each in programs]
    if len(set(found)) != len(found) or len(found) < 2:
        raise ValueError(f"`programs` holds {len(found)} programs, {len(set(found))} different; give two or more.")
    return tuple(found)


def shared_beginning(programs: Sequence[Program]) -> Program:
    """The layers that all programs begin with."""
    count = 0
    while all(len(each) > count and each[count] == programs[0][count] for each in programs):
        count += 1
    return programs[0][:count]


def features_of(parts: LayerwiseClassifier, hidden_states: torch.Tensor) -> torch.Tensor:
    """What is known of examples from their hidden states: the mean over tokens, and the logits.

    Returns:
        float32 of shape `(batch_size, hidden_size + num_labels)`.
    """
    mean = parts.mean_over_tokens(hidden_states.float())
    return torch.cat((mean, parts.classify(hidden_states).float()), dim=-1)


@silenceable
def answers_of_programs(
    model: PreTrainedModel | LayerwiseClassifier,
    data: LabelledData,
    programs: Sequence[ExecutionOrder],
    *,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    batch_size: int = 64,
    max_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ProgramAnswers:
    """Runs a classifier by each of some programs, and notes each example's answers and features.

    What programs begin with in common is computed once.

    Args:
        model: A classifier of images or texts that chooses one class (see [`score_execution_orders`]).
        data, processing_class, image_processor, batch_size, max_samples, seed, progress: As there.
        programs: Two or more different execution orders.

    Raises:
        `TypeError`, `ValueError`: as in [`score_execution_orders`].
    """
    parts = as_layerwise(model)
    known = checked_programs(programs, parts.num_layers)
    tree = OrderTree.of(known)
    beginning = shared_beginning(known)
    for layer in beginning:
        tree = tree.children[layer]
    processing_class = chosen_processing_class(processing_class, image_processor)
    check_evaluable(parts.model.config, processing_class)
    loader = batches_for(parts, data, processing_class, batch_size=batch_size, max_samples=max_samples, seed=seed)
    labels, answers, features = [], [], []
    with torch.no_grad(), parts.evaluation_mode():
        for batch in tqdm(loader, desc="Answers of programs", unit="batch", disable=not progress):
            labels.append(labels_on_device(parts, batch["labels"]).cpu())
            embedded = parts.embed(inputs_on_device(parts, batch))
            states = run_layers(parts, embedded, beginning)
            features.append(features_of(parts, states).cpu())
            found = torch.empty(len(known), len(embedded), dtype=torch.int64)
            for index, hidden_states in walk(parts, tree, states, position=len(beginning)):
                logits = parts.classify(hidden_states)
                found[index] = torch.where(logits.isnan().any(-1), -1, logits.argmax(-1)).cpu()
            answers.append(found.T)
    return ProgramAnswers(known, torch.cat(labels).numpy(), torch.cat(answers).numpy(), torch.cat(features).numpy())


def run_layers(
    parts: LayerwiseClassifier, hidden_states: torch.Tensor, program: Sequence[int], start: int = 0
) -> torch.Tensor:
    """Hidden states after the layers of a program, of which the first runs at position `start`."""
    for position, layer in enumerate(program, start=start):
        hidden_states, _ = parts.run_layer(hidden_states, layer, position)
    return hidden_states
