# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What each layer adds to the residual stream at each position, over random execution orders."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..common.checks import check_integers
from ..common.progress import silenceable
from ..evaluation.order_plans import balanced_execution_orders
from ..layerwise import LayerwiseClassifier, as_layerwise, batches_for, inputs_on_device, labels_on_device


# x is a token's hidden state before a layer, and f(x) the one after it. f(x) - x is the sum of what attention, MLP and
# (with a depth embedding) depth projection add. Norms and cosines are means over an image's tokens. Relative norms
# divide two such means, since a single token may be zero, as DeiT's distillation token is in a fresh model.
PARTS = {"update": "f(x) − x", "attention": "attention(x)", "mlp": "MLP(x)", "depth": "depth projection(x)"}
QUANTITIES = {
    **{f"{name}_norm": f"‖{formula}‖ / ‖x‖" for name, formula in PARTS.items()},
    **{f"{name}_size": f"‖{formula}‖" for name, formula in PARTS.items()},
    "stream_size": "‖x‖",
    "cosine": "cosine of f(x) − x and x",
    "logit_change": "true-class logit after the layer minus before it",
    "log_probability_change": "true-class log-probability after the layer minus before it, in nats",
}


@dataclass(frozen=True)
class LayerContributions:
    """What layers add to the residual stream, by layer and position: the `QUANTITIES`.

    Those of the depth projection are there with a depth embedding only. Those of attention and MLP are there where
    their sum is what the layer adds.

    Args:
        mean, std: Mean and population standard deviation of each quantity, over images and random orders. The arrays
            have the shape `(num_layers, num_layers)`: layers × positions.
        sequential_mean, sequential_std: The same for layer i at position i in sequential order, over images. The
            arrays have the shape `(num_layers,)`.
        counts: Number of (image, order) pairs behind each mean, of the shape of `mean`.
        num_images: Number of images in the data.
        execution_orders: The random orders.
    """

    mean: dict[str, np.ndarray]
    std: dict[str, np.ndarray]
    sequential_mean: dict[str, np.ndarray]
    sequential_std: dict[str, np.ndarray]
    counts: np.ndarray
    num_images: int
    execution_orders: list[list[int]]

    def by_position(self, quantity: str) -> np.ndarray:
        """Mean of a quantity at each position, over the layers in random orders; of shape `(num_layers,)`."""
        return np.average(self.mean[quantity], axis=0, weights=self.counts)

    def by_layer(self, quantity: str) -> np.ndarray:
        """Mean of a quantity of each layer, over the positions in random orders; of shape `(num_layers,)`."""
        return np.average(self.mean[quantity], axis=1, weights=self.counts)

    def away_from_home(self, quantity: str = "update_size") -> np.ndarray:
        """Each layer's mean at other positions than its own in random orders, divided by that in sequential order.

        Below 1 for "update_size", the layer does less where it does not stand in the checkpoint: it switches itself
        off. (Not so for "update_norm", since ‖x‖ grows with the position.) Shape `(num_layers,)`.
        """
        away = self.counts * (1 - np.eye(len(self.counts)))
        return np.average(self.mean[quantity], axis=1, weights=away) / self.sequential_mean[quantity]

    def least_over_most(self, quantity: str = "update_size") -> np.ndarray:
        """Each layer's mean at the position where it is least, divided by that where it is most.

        Near 0 for "update_size", the layer is switched off at some position; near 1, it does as much everywhere. Shape
        `(num_layers,)`.
        """
        return self.mean[quantity].min(axis=1) / self.mean[quantity].max(axis=1)


# The modules of a layer whose output is added to the hidden states, by the names that families give them, and the
# parameter by which some multiply it
_PART_NAMES = (
    ("depth", ("depth_projection",), ""),
    ("attention", ("layer_scale1", "attention", "self_attn", "attn"), "lambda_1"),
    ("mlp", ("layer_scale2", "mlp", "ffn"), "lambda_2"),
)


@contextmanager
def recorded_updates(parts: LayerwiseClassifier) -> Iterator[dict[str, torch.Tensor]]:
    """Yields a dict that holds, after each `run_layer`, what the parts of that layer added to the residual stream.

    The keys are "attention", "mlp" and, with a depth embedding, "depth"; the values have the shape of the hidden
    states, and their sum is the layer's update, where the family adds them up.
    """
    updates: dict[str, torch.Tensor] = {}

    def recorder(name: str, scale: torch.Tensor | None) -> Callable[[nn.Module, tuple, torch.Tensor | tuple], None]:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            added = output[0] if isinstance(output, tuple) else output
            updates[name] = added if scale is None else added * scale

        return hook

    handles = []
    for layer in parts.layers:
        for name, modules, scale in _PART_NAMES:
            module = next((getattr(layer, each) for each in modules if getattr(layer, each, None) is not None), None)
            if module is not None:
                handles.append(module.register_forward_hook(recorder(name, getattr(layer, scale, None))))
    try:
        yield updates
    finally:
        for handle in handles:
            handle.remove()


@silenceable
def layer_contributions(
    model: PreTrainedModel | LayerwiseClassifier,
    data: datasets.Dataset | Dataset | DataLoader | Sequence,
    *,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    num_orders: int = 32,
    seed: int = 0,
    batch_size: int = 64,
    max_samples: int | None = None,
    progress: bool = True,
) -> LayerContributions:
    """Measures what each layer adds at each position, over random orders and in sequential order.

    It passes over the data once, and costs a forward pass of every image an order. Memory does not grow with the
    number of images: it holds one batch of hidden states, and the quantities of one batch in all orders.

    Args:
        model: A classifier of images or texts, or a [`LayerwiseClassifier`].
        data, processing_class, image_processor, batch_size, max_samples: As for [`evaluate_robustness`].
        num_orders: Number of random orders, at least 1. It is rounded up to a multiple of the number of layers (see
            [`balanced_execution_orders`]).
        seed: Seed of the orders, at least 0.

    Raises:
        `ValueError`: if an argument or a label is not valid, or there is no image.
    """
    check_integers(num_orders=(num_orders, 1), seed=(seed, 0))
    parts = as_layerwise(model)
    processing_class = chosen_processing_class(processing_class, image_processor)
    loader = batches_for(parts, data, processing_class, batch_size=batch_size, max_samples=max_samples, seed=seed)
    orders = balanced_execution_orders(parts.num_layers, num_orders, seed)
    names: list[str] = []
    sums = np.zeros(())
    sequential = list(range(parts.num_layers))
    num_images = 0
    with parts.evaluation_mode(), torch.no_grad(), recorded_updates(parts) as updates:
        for batch in tqdm(loader, desc="Measuring layers' updates", unit="batch", disable=not progress):
            labels = labels_on_device(parts, batch["labels"])
            embedded = parts.embed(inputs_on_device(parts, batch))
            names = names or _measured_quantities(parts, embedded, updates)
            measured = [
                _measure_order(parts, embedded, labels, order, updates, names) for order in (sequential, *orders)
            ]
            values = torch.stack(measured).cpu().double().numpy()  # (orders, positions, quantities, batch_size)
            # Sums and sums of squares over images; the first row is the sequential order
            sums = sums + np.stack((values.sum(-1), (values**2).sum(-1)))
            num_images += len(labels)
    return _summarize(sums, names, num_images, orders)


def _measured_quantities(
    parts: LayerwiseClassifier, embedded: torch.Tensor, updates: dict[str, torch.Tensor]
) -> list[str]:
    """The quantities that a family has.

    Those of attention and MLP are left out where a family does not add them up, as one that normalises after adding.
    """
    # Where a layer runs with its MLP, if there is such a position
    position = next((each for each in range(parts.num_layers) if each not in parts.model._skipped_mlps), 0)
    update = parts.run_layer(embedded, 0, position)[0].float() - embedded.float()
    added_up = sum((part.float() for part in updates.values()), torch.zeros_like(update))
    measured = {"update", *updates}
    if (added_up - update).norm() > 0.01 * (update.norm() + embedded.float().norm()):
        measured -= {"attention", "mlp"}
    left_out = PARTS.keys() - measured
    return [name for name in QUANTITIES if not name.startswith(tuple(f"{part}_" for part in left_out))]


def _measure_order(
    parts: LayerwiseClassifier,
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    order: Sequence[int],
    updates: dict[str, torch.Tensor],
    names: Collection[str],
) -> torch.Tensor:
    """Quantities of shape `(positions, quantities, batch_size)`."""
    rows = []
    scores = _true_class_scores(parts, hidden_states, labels)
    for position, index in enumerate(order):
        before = hidden_states
        updates.clear()
        hidden_states, _ = parts.run_layer(before, index, position)
        previous_scores = scores
        scores = _true_class_scores(parts, hidden_states, labels)
        update = hidden_states.float() - before.float()
        mean = parts.mean_over_tokens
        row = {"stream_size": mean(before.float().norm(dim=-1))}
        for name in PARTS:
            if f"{name}_size" not in names:
                continue
            # A layer that runs without its MLP adds nothing by it
            part = update if name == "update" else updates.get(name, torch.zeros_like(update))
            row[f"{name}_size"] = mean(part.float().norm(dim=-1))
            row[f"{name}_norm"] = row[f"{name}_size"] / row["stream_size"]
        row["cosine"] = mean(torch.cosine_similarity(update, before.float(), dim=-1))
        row["logit_change"], row["log_probability_change"] = scores - previous_scores
        rows.append(torch.stack([row[name] for name in names]))
    return torch.stack(rows)


def _true_class_scores(parts: LayerwiseClassifier, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logit and log-probability of each image's class: shape `(2, batch_size)`."""
    logits = parts.classify(hidden_states).float()
    return torch.stack((logits, logits.log_softmax(-1))).gather(-1, labels.expand(2, -1)[..., None])[..., 0]


def _summarize(sums: np.ndarray, names: list[str], num_images: int, orders: list[list[int]]) -> LayerContributions:
    num_layers = sums.shape[2]
    positions = np.arange(sums.shape[2])
    by_layer = np.zeros((2, num_layers, num_layers, len(names)))
    counts = np.zeros((num_layers, num_layers), dtype=np.int64)
    for order, order_sums in zip(orders, sums[:, 1:].swapaxes(0, 1)):
        by_layer[:, order, positions] += order_sums
        counts[order, positions] += num_images
    mean, std = _moments(by_layer, counts[..., None])
    sequential_mean, sequential_std = _moments(sums[:, 0], num_images)
    return LayerContributions(
        mean=_by_name(mean, names),
        std=_by_name(std, names),
        sequential_mean=_by_name(sequential_mean, names),
        sequential_std=_by_name(sequential_std, names),
        counts=counts,
        num_images=num_images,
        execution_orders=orders,
    )


def _by_name(values: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    return {name: values[..., index] for index, name in enumerate(names)}


def _moments(sums: np.ndarray, counts: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    mean, mean_of_squares = sums / counts
    return mean, np.sqrt(np.maximum(mean_of_squares - mean**2, 0))
