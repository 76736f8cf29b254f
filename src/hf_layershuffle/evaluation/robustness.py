# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""How well a model works in other orders and with layers missing: one pass over the data for all orders.

Orders that begin alike share the computation of their beginning. They form a tree whose edges are layers, and each
batch walks it once, depth first. So all k-layer prefixes of an order cost one order, and memory holds one batch of
hidden states a level, however many orders there are.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..checkpoints.checks import check_finite
from ..checkpoints.identity import describe_model
from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..checkpoints.tokenizers import input_record
from ..common.checks import check_integers
from ..common.environment import describe_environment
from ..common.progress import silenceable
from ..data.dataloading import LabelledData
from ..layerwise import LayerwiseClassifier, LayerwiseModel, as_layerwise, batches_for, check_evaluable
from ..models.execution_order import ExecutionOrder, check_execution_order
from .fingerprint import data_digest, processing_record
from .order_plans import plan_orders
from .order_tree import Tallies, distinct_tree, mark_positions, run_tree
from .report import RobustnessReport
from .statistics import OrderGroup, OrderScore, PositionPrediction


logger = logging.getLogger(__name__)


@silenceable
def score_execution_orders(
    model: PreTrainedModel | LayerwiseModel,
    data: LabelledData,
    execution_orders: Sequence[ExecutionOrder],
    *,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    batch_size: int = 64,
    max_samples: int | None = None,
    seed: int = 0,
    description: str = "Evaluating",
    progress: bool = True,
) -> list[OrderScore]:
    """Accuracy and loss of a model in each of some execution orders, in one pass over the data.

    The numbers are those of `model(pixel_values, execution_order=order)`, one order at a time.

    Args:
        model: A classifier of images or texts, plain or LayerShuffle, or a [`LayerwiseClassifier`] or like object.
        data: A `datasets.Dataset` with the columns `image` (or `text`) and `label` (needs `processing_class`), a
            sequence of `{"pixel_values", "labels"}` items, or a DataLoader of such batches. The classes of a
            `datasets.Dataset` are matched with the model's by name (see [`match_labels`]).
        execution_orders: Lists of layer indices. Subsets and repeats are allowed.
        processing_class: The image processor or the tokenizer of the model. `image_processor` is another name of this
            argument.
        batch_size: Images or texts a batch. Not for a DataLoader.
        max_samples: How many of them to take, drawn by `seed`; all by default. Not for a DataLoader.
        seed: Seed of that draw, at least 0.
        description: Text beside the progress bar.
        progress: Whether to show the bar.

    Raises:
        `TypeError`: if the model or the data is of another type.
        `ValueError`: if an order, a label or an argument is not valid, a class is unknown to the model, or there is no
            image.
    """
    parts = as_layerwise(model)
    orders = [check_execution_order(order, parts.num_layers) for order in execution_orders]
    processing_class = chosen_processing_class(processing_class, image_processor)
    loader = _loader(parts, data, processing_class, batch_size, max_samples, seed)
    distinct, tree = distinct_tree(orders)
    tallies = run_tree(parts, loader, tree, len(distinct), description=description, progress=progress)
    scores = _scores(tallies, list(distinct), parts.num_labels)
    return [scores[distinct[tuple(order)]] for order in orders]


@silenceable
def evaluate_robustness(
    model: PreTrainedModel | LayerwiseClassifier,
    data: LabelledData,
    *,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    num_orders: int = 32,
    num_subsets: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    max_samples: int | None = None,
    model_name: str | None = None,
    dataset_name: str = "unnamed",
    progress: bool = True,
    progress_file: str | os.PathLike | None = None,
) -> RobustnessReport:
    """What order and missing layers cost a model, measured in one pass over the data.

    It measures the sequential, the reversed and `num_orders` random orders. It measures models of k = 1 … L layers:
    the first k of each random order, and in sequential order `num_subsets` random subsets and the evenly spaced one.
    It measures the sequential order without each layer and with each neighbouring pair swapped, and what position
    heads know. Use `model.to(device, dtype)` before the call to choose both.

    Args:
        model: A classifier of images or texts (see [`score_execution_orders`]).
        data, processing_class, image_processor, batch_size, max_samples, progress: As for [`score_execution_orders`].
        num_orders: Number of arbitrary orders, at least 1.
        num_subsets: Number of random subsets for each number of layers, at least 1.
        seed: Seed of the random orders, subsets and, with `max_samples`, images, at least 0.
        model_name: Name for the report. Defaults to the configuration's `name_or_path`.
        dataset_name: Name for the report.
        progress_file: Where to keep the sums now and then, and on Ctrl-C. A call with the same arguments that finds it
            goes on from there. It is removed at the end.

    Raises:
        `TypeError`, `ValueError`: as in [`score_execution_orders`]; also if a weight is NaN or infinite. Outputs that
            are not numbers count as wrong, and a warning tells of them.
    """
    check_integers(num_orders=(num_orders, 1), num_subsets=(num_subsets, 1), seed=(seed, 0))
    parts = as_layerwise(model)
    config = parts.model.config
    model_name = model_name or config.name_or_path or type(model).__name__
    check_finite(f"'{model_name}'", parts.model.state_dict().items())
    _warn_of_exits(config, model_name)
    processor = chosen_processing_class(processing_class, image_processor)
    loader = _loader(parts, data, processor, batch_size, max_samples, seed)
    belongs_to = processing_record(processor, config) | {"data": data_digest(loader)}
    plan = plan_orders(parts.num_layers, num_orders, num_subsets, seed)
    distinct, tree = distinct_tree([order for orders in plan.values() for order in orders])
    if config.position_predictor:
        for order in plan["arbitrary"]:
            mark_positions(tree, order)
    described = describe_model(parts.model) | input_record(config)
    tallies = run_tree(
        parts, loader, tree, len(distinct), description=f"Evaluating {model_name}", progress=progress,
        progress_file=progress_file,
        key=json.dumps([described, str(parts.model.dtype), belongs_to, batch_size, list(distinct)]),
    )  # fmt: skip
    scores = _scores(tallies, list(distinct), parts.num_labels)
    found = {name: [scores[distinct[tuple(order)]] for order in orders] for name, orders in plan.items()}
    pruning = {
        method: [OrderGroup.of(found[f"{method} {k}"], seed) for k in range(1, parts.num_layers + 1)]
        for method in ("arbitrary", "random", "evenly_spaced")
    }
    known = (tallies.position_correct, tallies.position_total)
    report = RobustnessReport(
        model=model_name,
        dataset=dataset_name,
        num_images=tallies.num_images,
        num_classes=parts.num_labels,
        num_layers=parts.num_layers,
        num_orders=num_orders,
        num_subsets=num_subsets,
        seed=seed,
        sequential=found["sequential"][0],
        reversed=found["reversed"][0],
        arbitrary=OrderGroup.of(found["arbitrary"], seed),
        pruning=pruning,
        leave_one_out=found["leave_one_out"],
        neighbour_swaps=found["neighbour_swaps"],
        position_prediction=PositionPrediction.of(*known) if config.position_predictor else None,
        config=described | belongs_to,
        environment=describe_environment(parts.model),
    )
    if progress_file is not None:
        Path(progress_file).unlink(missing_ok=True)
    return report


def _warn_of_exits(config: Any, name: str) -> None:
    if config.exit_threshold is not None or config.exit_patience is not None:
        logger.warning("The configuration of '%s' lets examples leave early; here all layers run.", name)


def _loader(
    parts: LayerwiseModel,
    data: LabelledData,
    processing_class: ProcessingClass | None,
    batch_size: int,
    max_samples: int | None,
    seed: int,
) -> torch.utils.data.DataLoader:
    if isinstance(parts, LayerwiseClassifier):  # an object that is only like one need not have a configuration
        check_evaluable(parts.model.config, processing_class)
    return batches_for(parts, data, processing_class, batch_size=batch_size, max_samples=max_samples, seed=seed)


def _scores(tallies: Tallies, orders: list[tuple[int, ...]], num_labels: int) -> list[OrderScore]:
    n = tallies.num_images
    if not np.isfinite(tallies.loss).all():
        logger.warning(
            "The model's outputs are not finite in %d of %d execution orders; images without an answer count as "
            "wrong. Try --dtype float32.",
            np.count_nonzero(~np.isfinite(tallies.loss)),
            len(orders),
        )
    return [
        OrderScore(
            list(order),
            float(tallies.correct[i] / n),
            float(tallies.loss[i] / n),
            float(tallies.correct_top5[i] / n) if num_labels > 5 else None,
        )
        for i, order in enumerate(orders)
    ]
