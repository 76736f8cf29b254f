# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""How well a model works in other orders and with layers missing: one pass over the data for all orders.

Orders that begin alike share the computation of their beginning: they form a tree whose edges are layers, and each batch
walks it once, depth first. So all k-layer prefixes of an order cost one order, and memory holds one batch of hidden
states a level, however many orders there are.
"""

import copy
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from .checkpoint_checks import check_finite, explained_reading
from .common.files import replaced_file
from .data import as_dataloader
from .fingerprint import data_digest, processor_digest
from .layerwise import (
    LayerwiseClassifier,
    as_layerwise,
    check_evaluable,
    check_integers,
    describe_model,
    inputs_on_device,
    labels_on_device,
    weights_digest,
)
from .models.execution_order import arbitrary_execution_orders, check_execution_order
from .progress import silenceable
from .report import OrderGroup, OrderScore, PositionPrediction, RobustnessReport, describe_environment


logger = logging.getLogger(__name__)
SAVE_EVERY_BATCHES = 20


@dataclass
class OrderTree:
    """Execution orders as a tree: a node is reached by running the layers on the way to it."""

    children: dict[int, "OrderTree"] = field(default_factory=dict)
    # Rows of the tallies to which a classification after this node counts; without any, it is not classified
    order_index: int | None = None
    # Whether the position heads' predictions on the way to this node are counted, which is so for the arbitrary orders
    counts_positions: bool = False

    @classmethod
    def of(cls, orders: Iterable[Sequence[int]]) -> "OrderTree":
        """Order i of these has `order_index` i; the orders must be distinct."""
        root = cls()
        for index, order in enumerate(orders):
            node = root
            for layer in order:
                node = node.children.setdefault(layer, cls())
            node.order_index = index
        return root

    @property
    def num_nodes(self) -> int:
        """Runs of a layer that one batch needs."""
        return sum(1 + child.num_nodes for child in self.children.values())


class Tallies:
    """Sums over images, of constant size: for each order the correct images and the loss; for each layer and position how
    often the position head was right."""

    def __init__(self, num_orders: int, num_layers: int):
        self.num_images = 0
        self.num_batches = 0
        self.correct = np.zeros(num_orders, dtype=np.int64)
        self.correct_top5 = np.zeros(num_orders, dtype=np.int64)
        self.loss = np.zeros(num_orders, dtype=np.float64)
        self.position_correct = np.zeros((num_layers, num_layers), dtype=np.int64)
        self.position_total = np.zeros((num_layers, num_layers), dtype=np.int64)

    def save(self, path: Path, key: str) -> None:
        """Writes them completely; where that cannot be, as on a full disk, it says so and the evaluation goes on."""
        try:
            with replaced_file(path) as partial, open(partial, "wb") as file:
                np.savez(file, key=key, **vars(self))
        except OSError as error:
            logger.warning("'%s' cannot be written, so a stopped evaluation begins anew: %s", path, error)

    def load(self, path: Path, key: str) -> None:
        """Takes over what was saved, if it can be read and was saved for the same `key`."""
        try:
            with explained_reading(f"'{path}'"), np.load(path) as file:
                saved = {name: file[name] for name in file.files}
                if str(saved["key"]) == key:
                    vars(self).update(
                        {name: saved[name] if saved[name].ndim else int(saved[name]) for name in vars(self)}
                    )
        except (OSError, ValueError) as error:
            logger.warning("The evaluation begins anew: %s", error)


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
    distinct, tree = _distinct_tree(orders)
    tallies = _run(parts, loader, tree, len(distinct), description=description, progress=progress)
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
    distinct, tree = _distinct_tree([order for orders in plan.values() for order in orders])
    if config.position_predictor:
        for order in plan["arbitrary"]:
            _mark_positions(tree, order)
    key = json.dumps([weights_digest(parts.model), str(parts.model.dtype), belongs_to, batch_size, list(distinct)])
    tallies = _run(
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


def plan_orders(num_layers: int, num_orders: int, num_subsets: int, seed: int) -> dict[str, list[list[int]]]:
    """The execution orders of a robustness evaluation, by what they are for. "arbitrary k", "random k" and
    "evenly_spaced k" are those of k layers."""
    sequential = list(range(num_layers))
    arbitrary = arbitrary_execution_orders(num_layers, num_orders, seed)
    plan = {"sequential": [sequential], "reversed": [sequential[::-1]], "arbitrary": arbitrary}
    plan["leave_one_out"] = [sequential[:i] + sequential[i + 1 :] for i in sequential if num_layers > 1]
    plan["neighbour_swaps"] = [[*sequential[:i], i + 1, i, *sequential[i + 2 :]] for i in range(num_layers - 1)]
    for k in range(1, num_layers + 1):
        rng = np.random.default_rng((seed, k))
        plan[f"arbitrary {k}"] = [order[:k] for order in arbitrary]
        plan[f"random {k}"] = [
            np.sort(rng.permutation(num_layers)[:k]).tolist() for _ in range(num_subsets if k < num_layers else 1)
        ]
        plan[f"evenly_spaced {k}"] = [evenly_spaced_layers(num_layers, k)]
    return plan


def evenly_spaced_layers(num_layers: int, num_kept: int) -> list[int]:
    """The first, the last and evenly spaced layers between them, ascending; for one layer, the first."""
    return np.linspace(0, num_layers - 1, num_kept).round().astype(int).tolist()


def _loader(parts, data, image_processor, batch_size: int, max_samples: int | None, seed: int):
    # An object that is only like a `LayerwiseClassifier` need not have a configuration
    config = parts.model.config if isinstance(parts, LayerwiseClassifier) else None
    if config is not None:
        check_evaluable(config, image_processor)
    sizes = {"batch_size": batch_size, "max_samples": max_samples, "seed": seed, "num_channels": parts.num_channels}
    return as_dataloader(data, image_processor, config=config, **sizes)


def _distinct_tree(orders) -> tuple[dict[tuple, int], OrderTree]:
    distinct = {order: index for index, order in enumerate(dict.fromkeys(map(tuple, orders)))}
    return distinct, OrderTree.of(distinct)


def _mark_positions(tree: OrderTree, order: list[int]) -> None:
    for layer in order:
        tree = tree.children[layer]
        tree.counts_positions = True


def _run(parts, loader, tree, num_orders, *, description, progress, progress_file=None, key="") -> Tallies:
    tallies = Tallies(num_orders, parts.num_layers)
    if progress_file is not None and Path(progress_file).exists():
        tallies.load(Path(progress_file), key)
    num_done = tallies.num_batches
    bar = tqdm(total=len(loader), initial=num_done, desc=description, unit="batch", disable=not progress)
    complete = None  # the sums without the batch that is under way, when a stop comes in between
    with bar, parts.evaluation_mode(), torch.inference_mode():
        try:
            for number, batch in enumerate(loader):
                if number < num_done:
                    continue
                _score_batch(parts, batch, tree, tallies)
                if progress_file is not None:
                    complete = copy.deepcopy(tallies)
                    if complete.num_batches % SAVE_EVERY_BATCHES == 0:
                        complete.save(Path(progress_file), key)
                bar.update()
        except KeyboardInterrupt:
            if complete is not None:
                complete.save(Path(progress_file), key)
            raise
    return tallies


def _score_batch(parts, batch, tree: OrderTree, tallies: Tallies) -> None:
    labels = labels_on_device(parts, batch["labels"])
    orders, results, position_results = [], [], []  # stay on the device until the batch is done, so that nothing waits

    def walk(node: OrderTree, hidden_states: torch.Tensor, position: int) -> None:
        if node.order_index is not None:
            orders.append(node.order_index)
            results.append(_score_logits(parts.classify(hidden_states), labels))
        for layer, child in node.children.items():
            output, position_logits = parts.run_layer(hidden_states, layer, position)
            if child.counts_positions:
                position_results.append((layer, position, (position_logits.argmax(-1) == position).sum()))
            walk(child, output, position + 1)

    walk(tree, parts.embed(inputs_on_device(parts, batch)), 0)
    correct, correct_top5, loss = torch.stack(results).cpu().double().numpy().T
    tallies.correct[orders] += correct.astype(np.int64)
    tallies.correct_top5[orders] += correct_top5.astype(np.int64)
    tallies.loss[orders] += loss
    for layer, position, is_right in position_results:
        tallies.position_correct[layer, position] += int(is_right)
        tallies.position_total[layer, position] += len(labels)
    tallies.num_images += len(labels)
    tallies.num_batches += 1


def _score_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Correct images, images with the class among the first five, and summed loss: a tensor of shape `(3,)`."""
    logits = logits.float()
    is_answer = ~logits.isnan().any(-1)  # the index of a NaN is no answer, though it may be the label
    is_right = ((logits.argmax(-1) == labels) & is_answer).sum()
    in_top5 = ((logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]) & is_answer[:, None]).sum()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((is_right.float(), in_top5.float(), loss))


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
