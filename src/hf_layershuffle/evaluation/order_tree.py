# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Many orders in one pass over the data: what they begin with in common is computed once."""

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..checkpoints.checks import explained_reading
from ..common.files import replaced_file
from ..layerwise import LayerwiseModel, inputs_on_device, labels_on_device


SAVE_EVERY_BATCHES = 20
MOST_WAITING = 4  # orders whose hidden states are kept to be classified together
logger = logging.getLogger(__name__)


@dataclass
class OrderTree:
    """Execution orders as a tree: a node is reached by running the layers on the way to it."""

    children: dict[int, "OrderTree"] = field(default_factory=dict)
    # Row of the tallies to which a classification after this node counts. Without one, nothing is classified there
    order_index: int | None = None
    # Whether the position heads' predictions on the way to this node are counted, which is so for the arbitrary orders
    counts_positions: bool = False

    @classmethod
    def of(cls, orders: Iterable[Sequence[int]]) -> "OrderTree":
        """A tree in which order i has `order_index` i. The orders must be distinct."""
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
    """Sums over images, of constant size.

    For each order they hold the correct images and the loss, for each layer and position how often the position head
    was right.
    """

    def __init__(self, num_orders: int, num_layers: int):
        self.num_images = 0
        self.num_batches = 0
        self.correct = np.zeros(num_orders, dtype=np.int64)
        self.correct_top5 = np.zeros(num_orders, dtype=np.int64)
        self.loss = np.zeros(num_orders, dtype=np.float64)
        self.position_correct = np.zeros((num_layers, num_layers), dtype=np.int64)
        self.position_total = np.zeros((num_layers, num_layers), dtype=np.int64)

    def save(self, path: Path, key: str) -> None:
        """Writes the sums completely. Where that cannot be, as on a full disk, it warns and the evaluation goes on."""
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


def distinct_tree(orders: Iterable[Sequence[int]]) -> tuple[dict[tuple[int, ...], int], OrderTree]:
    """The distinct orders with their index, and the tree of them."""
    distinct = {order: index for index, order in enumerate(dict.fromkeys(map(tuple, orders)))}
    return distinct, OrderTree.of(distinct)


def mark_positions(tree: OrderTree, order: list[int]) -> None:
    for layer in order:
        tree = tree.children[layer]
        tree.counts_positions = True


def run_tree(
    parts: LayerwiseModel,
    loader: torch.utils.data.DataLoader,
    tree: OrderTree,
    num_orders: int,
    *,
    description: str,
    progress: bool,
    progress_file: str | os.PathLike | None = None,
    key: str = "",
) -> Tallies:
    """Runs all orders of a tree on the data.

    Args:
        num_orders: Orders that the tree holds.
        description: Text beside the progress bar.
        progress: Whether to show the bar.
        progress_file: Where to keep the sums now and then, and on Ctrl-C. What it holds for the same `key` is not run
            again.
        key: What the sums depend on.
    """
    tallies = Tallies(num_orders, parts.num_layers)
    file = None if progress_file is None else Path(progress_file)
    if file is not None and file.exists():
        tallies.load(file, key)
    num_done = tallies.num_batches
    bar = tqdm(total=len(loader), initial=num_done, desc=description, unit="batch", disable=not progress)
    complete = None  # the sums without the batch that is under way, when a stop comes in between
    with bar, parts.evaluation_mode(), torch.no_grad():
        try:
            for number, batch in enumerate(loader):
                if number < num_done:
                    continue
                _score_batch(parts, batch, tree, tallies)
                if file is not None:
                    complete = copy.deepcopy(tallies)
                    if complete.num_batches % SAVE_EVERY_BATCHES == 0:
                        complete.save(file, key)
                bar.update()
        except KeyboardInterrupt:
            if file is not None and complete is not None:
                complete.save(file, key)
            raise
    return tallies


def walk(
    parts: LayerwiseModel,
    tree: OrderTree,
    hidden_states: torch.Tensor,
    note_positions: Callable[[int, int, torch.Tensor], None] | None = None,
    position: int = 0,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Runs all orders of a tree, depth first: what they begin with in common runs once.

    Args:
        hidden_states: Those that the first layer gets, of the batch embedded last.
        note_positions: Called with layer, position and position logits where the tree counts them.
        position: At which the tree begins.

    Returns:
        The `order_index` of each order and the hidden states after its last layer, one by one.
    """
    if tree.order_index is not None:
        yield tree.order_index, hidden_states
    for layer, child in tree.children.items():
        output, position_logits = parts.run_layer(hidden_states, layer, position)
        if child.counts_positions and position_logits is not None and note_positions is not None:
            note_positions(layer, position, position_logits)
        yield from walk(parts, child, output, note_positions, position + 1)


def _score_batch(parts: LayerwiseModel, batch: dict[str, Any], tree: OrderTree, tallies: Tallies) -> None:
    labels = labels_on_device(parts, batch["labels"])
    orders: list[int] = []
    # Results stay on the device until the batch is done, so that nothing waits
    results: list[torch.Tensor] = []
    position_results: list[tuple[int, int, torch.Tensor]] = []

    waiting: list[torch.Tensor] = []  # hidden states to classify, of the last of `orders`

    def classify_waiting() -> None:
        for logits in _classify_together(parts, waiting):
            results.append(_score_logits(logits, labels))
        waiting.clear()

    def note_positions(layer: int, position: int, position_logits: torch.Tensor) -> None:
        position_results.append((layer, position, (position_logits.argmax(-1) == position).sum()))

    for order, hidden_states in walk(parts, tree, parts.embed(inputs_on_device(parts, batch)), note_positions):
        orders.append(order)
        waiting.append(hidden_states)
        if not getattr(parts, "classifies_any_batch", False) or len(waiting) == MOST_WAITING:
            classify_waiting()
    classify_waiting()
    correct, correct_top5, loss = torch.stack(results).cpu().double().numpy().T
    tallies.correct[orders] += correct.astype(np.int64)
    tallies.correct_top5[orders] += correct_top5.astype(np.int64)
    tallies.loss[orders] += loss
    for layer, position, is_right in position_results:
        tallies.position_correct[layer, position] += int(is_right)
        tallies.position_total[layer, position] += len(labels)
    tallies.num_images += len(labels)
    tallies.num_batches += 1


def _classify_together(parts: LayerwiseModel, states: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The logits of each of some hidden states, in one call. Several are given only where the model can."""
    if states:
        yield from parts.classify(torch.cat(states)).split([len(each) for each in states])


def _score_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Correct images, images with the class among the first five, and summed loss: a tensor of shape `(3,)`."""
    logits = logits.float()
    is_answer = ~logits.isnan().any(-1)  # the index of a NaN is no answer, though it may be the label
    is_right = ((logits.argmax(-1) == labels) & is_answer).sum()
    in_top5 = ((logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]) & is_answer[:, None]).sum()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((is_right.float(), in_top5.float(), loss))
