# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""How well a model works in other orders and with layers missing: one pass over the data for all orders.

Orders that begin alike share the computation of their beginning: they form a tree whose edges are layers, and each batch
walks it once, depth first. So all k-layer prefixes of an order cost one order, and memory holds one batch of hidden
states a level, however many orders there are.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..checkpoints.checks import check_finite
from ..checkpoints.identity import describe_model, weights_digest
from ..common.checks import check_integers
from ..common.environment import describe_environment
from ..common.progress import silenceable
from ..data.datasets import as_dataloader
from ..layerwise import LayerwiseClassifier, as_layerwise, check_evaluable
from ..models.execution_order import check_execution_order
from .fingerprint import data_digest, processor_digest
from .order_plans import plan_orders
from .order_tree import Tallies, distinct_tree, mark_positions, run_tree
from .report import RobustnessReport
from .statistics import OrderGroup, OrderScore, PositionPrediction


logger = logging.getLogger(__name__)


@silenceable
def score_execution_orders(
    model,
    data,
    execution_orders: Sequence[Sequence[int]],
    *,
    image_processor=None,
    batch_size: int = 64,
    max_samples: int | None = None,
    seed: int = 0,
    description: str = "Evaluating",
    progress: bool = True,
) -> list[OrderScore]:
    """Accuracy and loss of a model in each of some execution orders, in one pass over the data.

    The numbers are those of `model(pixel_values, execution_order=order)`, one order at a time.

    Args:
        model: A LayerShuffle, ViT or DeiT image classifier, or a [`LayerwiseClassifier`] or like object.
        data: A `datasets.Dataset` with the columns `image` and `label` (needs `image_processor`), whose classes are matched
            with the model's by name (see [`match_labels`]), a sequence of
            `{"pixel_values", "labels"}` items, or a DataLoader of such batches.
        execution_orders: Layer indices; subsets and repeats allowed.
        image_processor: A transformers image processor.
        batch_size (`int`): Images a batch; not for a DataLoader.
        max_samples (`int`, *optional*): Only so many images, drawn by `seed`; not for a DataLoader.
        seed (`int`): Of that draw, at least 0.
        description, progress: Of the progress bar.

    Raises:
        `TypeError`: if the model or the data is of another type.
        `ValueError`: if an order, a label or an argument is not valid, a class is unknown to the model, or there is no image.
    """
    parts = as_layerwise(model)
    orders = [check_execution_order(order, parts.num_layers) for order in execution_orders]
    loader = _loader(parts, data, image_processor, batch_size, max_samples, seed)
    distinct, tree = distinct_tree(orders)
    tallies = run_tree(parts, loader, tree, len(distinct), description=description, progress=progress)
    scores = _scores(tallies, list(distinct), parts.num_labels)
    return [scores[distinct[tuple(order)]] for order in orders]


@silenceable
def evaluate_robustness(
    model,
    data,
    *,
    image_processor=None,
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

    Measured are the sequential, the reversed and `num_orders` random orders; models of k = 1 … L layers (the first k of
    each random order, `num_subsets` random subsets and the evenly spaced one in sequential order); the sequential order
    without each layer, and with each neighbouring pair swapped; and what position heads know. Use
    `model.to(device, dtype)` before the call to choose both.

    Args:
        model: A LayerShuffle, ViT or DeiT image classifier (see [`score_execution_orders`]).
        data, image_processor, batch_size, max_samples, progress: As for [`score_execution_orders`].
        num_orders (`int`): Arbitrary orders, at least 1.
        num_subsets (`int`): Random subsets of each number of layers, at least 1.
        seed (`int`): Draws orders, subsets and, with `max_samples`, images; at least 0.
        model_name, dataset_name (`str`): For the report. `model_name` defaults to the configuration's `name_or_path`.
        progress_file (`str` or `os.PathLike`, *optional*): Where to keep the sums now and then, and on Ctrl-C; a call with the same
            arguments that finds it goes on from there. Removed at the end.

    Raises:
        `TypeError`, `ValueError`: as in [`score_execution_orders`]; also if a weight is NaN or infinite. Outputs that are
            not numbers count as wrong, and are warned of.
    """
    check_integers(num_orders=(num_orders, 1), num_subsets=(num_subsets, 1), seed=(seed, 0))
    parts = as_layerwise(model)
    config, num_layers = parts.model.config, parts.num_layers
    model_name = model_name or config.name_or_path or type(model).__name__
    check_finite(f"'{model_name}'", parts.model.state_dict().items())
    loader = _loader(parts, data, image_processor, batch_size, max_samples, seed)
    belongs_to = {"image_processor": processor_digest(image_processor), "data": data_digest(loader)}

    plan = plan_orders(num_layers, num_orders, num_subsets, seed)
    distinct, tree = distinct_tree([order for orders in plan.values() for order in orders])
    if config.position_predictor:
        for order in plan["arbitrary"]:
            mark_positions(tree, order)
    key = json.dumps([weights_digest(parts.model), str(parts.model.dtype), belongs_to, batch_size, list(distinct)])
    tallies = run_tree(
        parts, loader, tree, len(distinct), description=f"Evaluating {model_name}", progress=progress,
        progress_file=progress_file, key=key,
    )  # fmt: skip

    scores = _scores(tallies, list(distinct), parts.num_labels)
    found = {name: [scores[distinct[tuple(order)]] for order in orders] for name, orders in plan.items()}
    pruning = {
        method: [OrderGroup.of(found[f"{method} {k}"], seed) for k in range(1, num_layers + 1)]
        for method in ("arbitrary", "random", "evenly_spaced")
    }
    positions = (tallies.position_correct, tallies.position_total)
    report = RobustnessReport(
        model=model_name,
        dataset=dataset_name,
        num_images=tallies.num_images,
        num_classes=parts.num_labels,
        num_layers=num_layers,
        num_orders=num_orders,
        num_subsets=num_subsets,
        seed=seed,
        sequential=found["sequential"][0],
        reversed=found["reversed"][0],
        arbitrary=OrderGroup.of(found["arbitrary"], seed),
        pruning=pruning,
        leave_one_out=found["leave_one_out"],
        neighbour_swaps=found["neighbour_swaps"],
        position_prediction=PositionPrediction.of(*positions) if config.position_predictor else None,
        config=describe_model(parts.model) | belongs_to,
        environment=describe_environment(parts.model),
    )
    if progress_file is not None:
        Path(progress_file).unlink(missing_ok=True)
    return report


def _loader(parts, data, image_processor, batch_size: int, max_samples: int | None, seed: int):
    # An object that is only like a `LayerwiseClassifier` need not have a configuration
    config = parts.model.config if isinstance(parts, LayerwiseClassifier) else None
    if config is not None:
        check_evaluable(config, image_processor)
    sizes = {"batch_size": batch_size, "max_samples": max_samples, "seed": seed, "num_channels": parts.num_channels}
    return as_dataloader(data, image_processor, config=config, **sizes)


def _scores(tallies: Tallies, orders: list[tuple], num_labels: int) -> list[OrderScore]:
    n = tallies.num_images
    if not np.isfinite(tallies.loss).all():
        logger.warning(
            "The model's outputs are not finite in %d of %d execution orders; images without an answer count as wrong. "
            "Try --dtype float32.",
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
