# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Which MLPs a model can do without, by how little they change the hidden states (FFN-SkipLLM, arXiv 2404.03865)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..common.checks import check_integers, check_number
from ..common.progress import silenceable
from ..data.dataloading import LabelledData
from ..layerwise import LayerwiseClassifier, as_layerwise, batches_for, inputs_on_device
from ..models.execution_order import ExecutionOrder
from ..models.mlp_skipping import check_against_order, without_mlp
from .exit_calibration import orders_of
from .layer_answers import checked_orders


@contextmanager
def without_mlps(model: PreTrainedModel, positions: Sequence[int] | None) -> Iterator[None]:
    """Context in which a model leaves out the MLPs at some positions, in evaluation. Attention runs.

    It sets `config.skipped_mlps` for a time, for all threads.

    Args:
        model: A LayerShuffle model.
        positions: Positions in the execution order, from 0. None for a context in which all MLPs run.

    Raises:
        `ValueError`: if they are no distinct positions of the configuration's execution order, or a layer has no MLP
            that is known.
    """
    free: Any = model
    config = free.config
    if not hasattr(config, "skipped_mlps"):
        raise ValueError(f"{type(model).__name__} has no free layer order; make it so by `free_order(model)`.")
    if positions is not None and (isinstance(positions, str) or not isinstance(positions, Iterable)):
        raise ValueError(f"`positions` is {positions!r}; pass a list of positions in the execution order, or None.")
    kept = config.skipped_mlps
    order = config.execution_order
    try:
        config.skipped_mlps = None if positions is None else list(positions)
        check_against_order(config.skipped_mlps, len(free.free_layers) if isinstance(order, str) else len(order))
        if positions:
            without_mlp(next(iter(free.free_layers.children())))  # refuses before a forward pass does
        yield
    finally:
        config.skipped_mlps = kept


@dataclass(frozen=True)
class MlpSimilarities:
    """How alike hidden states are with and without the MLP of the layer that gives them.

    Args:
        execution_orders: The orders that ran.
        similarities: Mean cosine similarity over examples and tokens, in [-1, 1], at each position of each order:
            float64 of shape `(orders, positions)`.
        num_layers: Layers of the model.
        num_examples: Examples behind each mean.
    """

    execution_orders: list[list[int]]
    similarities: np.ndarray
    num_layers: int
    num_examples: int

    @property
    def by_position(self) -> np.ndarray:
        """Mean over the orders: of shape `(positions,)`."""
        return self.similarities.mean(0)

    @property
    def by_layer_and_position(self) -> np.ndarray:
        """Of shape `(num_layers, positions)`; NaN where a layer ran at a position in no order."""
        layers = np.array(self.execution_orders)
        found = np.full((self.num_layers, layers.shape[1]), np.nan)
        for layer, position in {(each, at) for order in self.execution_orders for at, each in enumerate(order)}:
            found[layer, position] = self.similarities[layers[:, position] == layer, position].mean()
        return found

    def most_similar(
        self, num_skipped: int | None = None, *, min_similarity: float | None = None, keep: int = 1
    ) -> list[int]:
        """The positions whose MLPs change the hidden states least.

        Args:
            num_skipped: How many.
            min_similarity: Instead of it: all whose similarity is above this, in [-1, 1].
            keep: The MLPs at the first and at the last so many positions are never chosen, at least 0.

        Returns:
            Positions in ascending order.

        Raises:
            `ValueError`: unless one of the two is given, or if there are not so many.
        """
        if (num_skipped is None) == (min_similarity is None):
            raise ValueError(
                f"`num_skipped` is {num_skipped} and `min_similarity` is {min_similarity}; give one of them."
            )
        allowed = skippable_positions(self.similarities.shape[1], keep)
        if num_skipped is None:
            least = check_number("min_similarity", min_similarity or 0.0, -1, 1)
            return [each for each in allowed if self.by_position[each] > least]
        check_num_skipped(num_skipped, allowed, keep)
        return sorted(sorted(allowed, key=lambda each: -self.by_position[each])[:num_skipped])


def skippable_positions(num_positions: int, keep: int = 1) -> list[int]:
    """All positions but the first `keep` and the last `keep`."""
    check_integers(keep=(keep, 0))
    return list(range(keep, num_positions - keep))


def check_num_skipped(num_skipped: int, allowed: Sequence[int], keep: int) -> None:
    """Checks a number of MLPs to leave out.

    Raises:
        `ValueError`: if it is none, or above the number of those allowed.
    """
    check_integers(num_skipped=(num_skipped, 0))
    if num_skipped > len(allowed):
        raise ValueError(
            f"`num_skipped` is {num_skipped}; it must be at most {len(allowed)}, since the MLPs at the first and the "
            f"last {keep} positions are kept (`keep`)."
        )


def random_skipped_mlps(
    num_positions: int, num_skipped: int, num_draws: int, *, keep: int = 1, seed: int = 0
) -> list[list[int]]:
    """Random choices of as many MLPs, as a control: lists of positions in ascending order, drawn by `seed`.

    Raises:
        `ValueError`: if a number is out of range.
    """
    check_integers(num_draws=(num_draws, 1), seed=(seed, 0))
    allowed = skippable_positions(num_positions, keep)
    check_num_skipped(num_skipped, allowed, keep)
    generator = np.random.default_rng([seed, num_skipped])
    return [sorted(generator.choice(allowed, num_skipped, replace=False).tolist()) for _ in range(num_draws)]


@silenceable
def mlp_similarities(
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
) -> MlpSimilarities:
    """Measures how alike hidden states are before and after each MLP, by layer and position.

    Each layer runs with and without its MLP. In families that add the MLP last, what it gives without is the hidden
    states before the MLP. Where a norm comes after it, as in BERT, both have it. The next layer gets the hidden states
    with the MLP.

    Args:
        model: A classifier of images or texts.
        data: Calibration data, as for [`score_execution_orders`]; labels do not matter, and a `datasets.Dataset` need
            not have any.
        execution_orders: Lists of layer indices, equally long. Defaults to the configuration's order; if that is
            "arbitrary", to 8 random ones.
        processing_class, image_processor, batch_size, max_samples, seed, progress: As for [`score_execution_orders`].

    Raises:
        `TypeError`, `ValueError`: as in [`score_execution_orders`]; also if a layer has no MLP that is known.
    """
    parts = as_layerwise(model)
    check_integers(seed=(seed, 0))
    given = orders_of(parts, seed) if execution_orders is None else execution_orders
    orders = checked_orders(given, parts.num_layers)
    processing_class = chosen_processing_class(processing_class, image_processor)
    if isinstance(data, Dataset) and not {"label", "labels"} & set(data.column_names):
        data = data.add_column("label", [0] * len(data))  # read with the rest, and not used
    loader = batches_for(parts, data, processing_class, batch_size=batch_size, max_samples=max_samples, seed=seed)
    sums = torch.zeros(len(orders), len(orders[0]), dtype=torch.float64)
    count = 0
    with torch.no_grad(), parts.evaluation_mode(), without_mlps(parts.model, None):
        for batch in tqdm(loader, desc="Hidden states around MLPs", unit="batch", disable=not progress):
            embedded = parts.embed(inputs_on_device(parts, batch))
            found = [_similarities(parts, embedded, order) for order in orders]
            sums += torch.stack(found).sum(-1).double().cpu()
            count += len(embedded)
    return MlpSimilarities(orders, (sums / count).numpy(), parts.num_layers, count)


def _similarities(parts: LayerwiseClassifier, hidden_states: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Of shape `(positions, batch_size)`."""
    found = []
    for position, index in enumerate(order):
        without, _ = parts.run_layer(hidden_states, index, position, with_mlp=False)
        hidden_states, _ = parts.run_layer(hidden_states, index, position)
        cosines = torch.cosine_similarity(without.float(), hidden_states.float(), dim=-1)
        found.append(parts.mean_over_tokens(cosines))
    return torch.stack(found)


def choose_skipped_mlps(
    model: PreTrainedModel | LayerwiseClassifier,
    data: LabelledData,
    num_skipped: int | None = None,
    *,
    min_similarity: float | None = None,
    keep: int = 1,
    **measurement: Any,
) -> list[int]:
    """The MLPs that a model can best do without: those that change its hidden states least, on calibration data.

    Args:
        model, data: As for [`mlp_similarities`].
        num_skipped, min_similarity, keep: As for [`MlpSimilarities.most_similar`].
        measurement: Further arguments of [`mlp_similarities`].

    Returns:
        Positions in the execution order, for `config.skipped_mlps` or [`without_mlps`].

    Raises:
        `TypeError`, `ValueError`: as in both.

    ```python
    >>> model.config.skipped_mlps = ls.choose_skipped_mlps(model, held_out, 4, processing_class=processor)
    ```
    """
    return mlp_similarities(model, data, **measurement).most_similar(
        num_skipped, min_similarity=min_similarity, keep=keep
    )
