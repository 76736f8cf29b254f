# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The outputs of every layer at every position, and what they have in common: a probe and their similarity."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..common.checks import check_integers
from ..common.progress import silenceable
from ..evaluation.order_plans import balanced_execution_orders
from ..layerwise import LayerwiseClassifier, as_layerwise, batches_for, inputs_on_device, rows_of


TOKENS = ("cls", "mean")
MIN_GROUPS = 5
GROUP_SIZE = 16
NUM_RUNS = 2
MIN_IMAGES = 4 * MIN_GROUPS  # the similarity needs four in a group


@dataclass(frozen=True)
class Representations:
    """Outputs of every layer at every position for the same images.

    Each group of images has orders of its own, so that what is learned of some groups and holds for others is owed
    neither to the images nor to the orders. They run twice: in each run in as many orders as layers, which put each
    layer at each position once. So outputs can be compared that do not come from the same forward pass.

    Args:
        cls: The CLS token, or of causal models the last one without padding, which their heads read: float32 of shape
            `(num_images, 2, num_layers, num_layers, hidden_size)`: images × runs × layers × positions.
        mean: Mean of all tokens, which is what a position predictor reads, of the same shape and dtype.
        groups: Group of each image, ascending from 0; integers of shape `(num_images,)`.
    """

    cls: np.ndarray
    mean: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class PositionProbe:
    """How well a linear probe reads from a layer's output the position at which the layer ran.

    It is tested on unseen images and orders.

    Args:
        accuracy, std: Mean and population standard deviation over the folds of each layer, as fractions in [0, 1]. The
            arrays have the shape `(num_layers,)`.
        chance: Accuracy of a guess. All positions are equally frequent.
        num_images, num_folds: Number of images and of folds of the cross-validation.
    """

    accuracy: np.ndarray
    std: np.ndarray
    chance: float
    num_images: int
    num_folds: int


@dataclass(frozen=True)
class Similarity:
    """Linear CKA between the outputs of all (layer, position) pairs in different execution orders.

    Args:
        matrix: Similarities of shape `(num_layers ** 2, num_layers ** 2)`. The row of a pair is
            `layer * num_layers + position`. The diagonal compares the same layer at the same position after different
            layers.
        same_both: Mean over that diagonal.
        same_layer: Mean over pairs of the same layer at two positions.
        same_position: Mean over pairs of two layers at the same position.
        neither: Mean over pairs of two layers at two positions.
        num_images: Number of images behind each number.
    """

    matrix: np.ndarray
    same_both: float
    same_layer: float
    same_position: float
    neither: float
    num_images: int


@silenceable
def collect_representations(
    model: PreTrainedModel | LayerwiseClassifier,
    data: datasets.Dataset | Dataset | DataLoader | Sequence,
    *,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    seed: int = 0,
    max_images: int = 256,
    max_bytes: int = 2**30,
    batch_size: int = 64,
    max_samples: int | None = None,
    progress: bool = True,
) -> Representations:
    """Runs evenly spaced images of the data, in groups of about 16, through twice as many random orders as layers.

    Stores at most `max_bytes` and at most `max_images` images, but never fewer than 20: an image takes
    `16 * num_layers**2 * hidden_size` bytes, so ViT-Base keeps 256 (453 MB) and ViT-Large 113.

    Args:
        model: A classifier of images or texts, or a [`LayerwiseClassifier`].
        data, processing_class, image_processor, batch_size, max_samples: As for [`evaluate_robustness`]; a DataLoader
            needs a dataset with a length, and its sampler says which rows there are.
        seed: Seed of the orders, at least 0.
        max_images: Number of images stored at most, at least 20.
        max_bytes: Bytes stored at most, of more than 20 images.

    Raises:
        `ValueError`: if an argument is not valid, there are fewer than 20 images, or outputs are NaN or infinite.
    """
    check_integers(seed=(seed, 0), max_images=(max_images, MIN_IMAGES))
    parts = as_layerwise(model)
    processing_class = chosen_processing_class(processing_class, image_processor)
    loader = batches_for(parts, data, processing_class, batch_size=batch_size, max_samples=max_samples, seed=seed)
    num_layers = parts.num_layers
    hidden_size = parts.hidden_size
    rows = np.array(rows_of(loader))
    if len(rows) < MIN_IMAGES:
        raise ValueError(f"There are {len(rows)} images; this needs at least {MIN_IMAGES}. Use more of the dataset.")
    affordable = max(MIN_IMAGES, max_bytes // (16 * num_layers**2 * hidden_size))
    num_images = min(len(rows), max_images, affordable)
    chosen = rows[np.linspace(0, len(rows) - 1, num_images).round().astype(int)]
    groups = np.array_split(chosen, max(MIN_GROUPS, num_images // GROUP_SIZE))
    loader = DataLoader(loader.dataset, batch_sampler=[each.tolist() for each in groups], collate_fn=loader.collate_fn)
    orders = np.reshape(
        balanced_execution_orders(num_layers, NUM_RUNS * num_layers * len(groups), seed),
        (len(groups), NUM_RUNS, num_layers, num_layers),
    )
    cls = np.empty((num_images, NUM_RUNS, num_layers, num_layers, hidden_size), dtype=np.float32)
    mean = np.empty_like(cls)
    done = 0
    with parts.evaluation_mode(), torch.no_grad():
        bar = tqdm(loader, desc="Collecting layers' outputs", unit="group", disable=not progress)
        for group_orders, batch in zip(orders, bar):
            embedded = parts.embed(inputs_on_device(parts, batch))
            places = slice(done, done + len(embedded))
            for run, row in np.ndindex(NUM_RUNS, num_layers):
                hidden_states = embedded
                for position, layer in enumerate(group_orders[run, row].tolist()):
                    hidden_states, _ = parts.run_layer(hidden_states, layer, position)
                    cls[places, run, layer, position] = _head_token(parts, hidden_states).float().cpu().numpy()
                    mean[places, run, layer, position] = parts.mean_over_tokens(hidden_states.float()).cpu().numpy()
            if not (np.isfinite(cls[places]).all() and np.isfinite(mean[places]).all()):
                raise ValueError(
                    "The outputs of the model's layers are not finite, so there is nothing to compare; try --dtype "
                    "float32 (`model.float()`)."
                )
            done += len(embedded)
    return Representations(cls, mean, np.repeat(np.arange(len(groups)), [len(each) for each in groups]))


def _head_token(parts: LayerwiseClassifier, hidden_states: torch.Tensor) -> torch.Tensor:
    """The first token, or the last without padding where it alone sees all others: that of the head called `score`."""
    if not hasattr(parts.model, "score"):
        return hidden_states[:, 0]
    mask = parts.attention_mask
    if mask is None or mask.shape != hidden_states.shape[:2]:
        return hidden_states[:, -1]
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
    return hidden_states[torch.arange(len(last), device=mask.device), last]


def probe_position(
    representations: Representations, *, token: str = "mean", num_folds: int = 5, seed: int = 0, progress: bool = True
) -> PositionProbe:
    """Trains a linear probe for each layer that tells the positions apart by the layer's output.

    The probe is linear discriminant analysis with a shrunken covariance (Ledoit and Wolf): exact, without iterations,
    and unlike a least-squares classifier able to tell apart classes that lie along one line, as positions may.

    Args:
        representations: The outputs to read positions from.
        token: "mean" or "cls".
        num_folds: Number of folds into which the groups are divided, at least 2 and at most the number of groups. The
            probe is tested on images and on orders that it has not seen.
        seed: Seed of that division, at least 0.

    Raises:
        `ValueError`: if there are fewer groups than folds, or there is but one position.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import KFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    outputs = tokens_of(representations, token)
    groups = representations.groups
    num_images, num_runs, num_layers, num_positions, hidden_size = outputs.shape
    num_groups = int(groups.max()) + 1
    check_integers(num_folds=(num_folds, 2), seed=(seed, 0))
    if num_groups < num_folds:
        raise ValueError(
            f"There are {num_groups} groups of images for {num_folds} folds; use more images or fewer folds."
        )
    if num_positions < 2:
        raise ValueError("A model of one layer runs it at one position; there is nothing to tell apart.")
    splits = list(KFold(num_folds, shuffle=True, random_state=seed).split(np.arange(num_groups)))
    accuracy = np.empty((num_layers, num_folds))
    for layer in tqdm(range(num_layers), desc="Probing positions", unit="layer", disable=not progress):
        for fold, split in enumerate(splits):
            train, test = (outputs[np.isin(groups, part), :, layer] for part in split)
            (train, train_positions), (test, test_positions) = (
                (each.reshape(-1, hidden_size), np.tile(np.arange(num_positions), len(each) * num_runs))
                for each in (train, test)
            )
            probe = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))
            accuracy[layer, fold] = probe.fit(train, train_positions).score(test, test_positions)
    return PositionProbe(accuracy.mean(1), accuracy.std(1), 1 / num_positions, num_images, num_folds)


def output_similarity(representations: Representations, *, token: str = "cls") -> Similarity:
    """Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) between all (layer, position) pairs' outputs over images.

    Outputs of one run are compared with those of the other, so never a layer's with those of its predecessors, which
    the residual connection would make alike.

    In minibatches (Nguyen et al. 2021, arXiv 2010.15327): the unbiased HSIC of Song et al. (2012), which is the inner
    product of U-centred Gram matrices, is averaged over the groups of images. So what an order does to all images
    alike is not counted, and few images in many dimensions do not look alike; a value may come out slightly below 0.
    Memory: a few times `8 * num_layers**4` bytes.

    Args:
        representations: The outputs to compare.
        token: "cls" or "mean".

    Raises:
        `ValueError`: if a group holds fewer than four images.
    """
    outputs = tokens_of(representations, token)
    groups = representations.groups
    num_images, _, num_layers, num_positions, hidden_size = outputs.shape
    smallest = int(np.bincount(groups).min())
    if smallest < 4:
        raise ValueError(f"A group holds {smallest} images; the similarity of outputs needs at least 4 in each.")
    products = np.zeros(())
    squares = np.zeros(())
    for group in range(int(groups.max()) + 1):
        in_group = outputs[groups == group].reshape(-1, NUM_RUNS, num_layers * num_positions, hidden_size)
        size = len(in_group)
        first, second = (_u_centred_grams(in_group[:, run].swapaxes(0, 1)) for run in range(NUM_RUNS))
        products = products + np.tensordot(first, second, axes=((1, 2), (1, 2))) / (size * (size - 3))
        squares = squares + np.stack([(grams**2).sum((1, 2)) for grams in (first, second)]) / (size * (size - 3))
    norms = np.sqrt(np.maximum(squares, np.finfo(np.float64).tiny))
    matrix = products / np.outer(*norms)
    matrix = (matrix + matrix.T) / 2
    layers, positions = np.divmod(np.arange(len(matrix)), num_positions)
    is_same_layer, is_same_position = (each[:, None] == each for each in (layers, positions))
    return Similarity(
        matrix,
        same_both=_mean_where(matrix, is_same_layer & is_same_position),
        same_layer=_mean_where(matrix, is_same_layer & ~is_same_position),
        same_position=_mean_where(matrix, is_same_position & ~is_same_layer),
        neither=_mean_where(matrix, ~is_same_layer & ~is_same_position),
        num_images=num_images,
    )


def _mean_where(matrix: np.ndarray, chosen: np.ndarray) -> float:
    return float(matrix[chosen].mean())


def _u_centred_grams(vectors: np.ndarray) -> np.ndarray:
    """Gram matrices of shape `(pairs, n, n)` of vectors of shape `(pairs, n, size)`, with n at least 4.

    They are centred so that their inner products estimate HSIC without bias (Székely and Rizzo 2014).
    """
    n = vectors.shape[1]
    vectors = vectors - vectors.mean(1, keepdims=True, dtype=np.float64)
    grams = vectors @ vectors.swapaxes(1, 2)
    diagonal = np.arange(n)
    grams[:, diagonal, diagonal] = 0
    sums = grams.sum(1)
    grams -= (sums[:, :, None] + sums[:, None]) / (n - 2)
    grams += (sums.sum(1) / ((n - 1) * (n - 2)))[:, None, None]
    grams[:, diagonal, diagonal] = 0
    return grams


def tokens_of(representations: Representations, token: str) -> np.ndarray:
    """The outputs of one kind of `TOKENS`.

    Raises:
        `ValueError`: if it is none of them.
    """
    if token not in TOKENS:
        raise ValueError(f"`token` is '{token}'; it must be one of {', '.join(TOKENS)}.")
    return getattr(representations, token)
