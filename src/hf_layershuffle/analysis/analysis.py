# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What each layer does at each position: updates, a position probe, similarity of outputs, attention."""

import logging
from collections.abc import Sequence

import datasets
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..checkpoints.identity import describe_model
from ..checkpoints.processing_classes import ProcessingClass, chosen_processing_class
from ..checkpoints.tokenizers import input_record, takes_texts
from ..common.checks import check_integers
from ..common.environment import describe_environment
from ..common.progress import silenceable
from ..layerwise import LayerwiseClassifier, as_layerwise, batches_for, rows_of
from ..models.execution_order import arbitrary_execution_orders
from .attention import AttentionMaps, attention_rollout
from .contributions import layer_contributions
from .embedding import check_embedding, embed_representations
from .report import AnalysisReport
from .representations import MIN_IMAGES, collect_representations, output_similarity, probe_position


logger = logging.getLogger(__name__)


@silenceable
def analyze(
    model: PreTrainedModel | LayerwiseClassifier,
    data: datasets.Dataset | Dataset | DataLoader | Sequence,
    *,
    processing_class: ProcessingClass | None = None,
    image_processor: ProcessingClass | None = None,
    num_orders: int = 32,
    seed: int = 0,
    batch_size: int = 64,
    max_samples: int | None = None,
    embedding: str = "pca",
    num_attention_images: int = 3,
    model_name: str | None = None,
    dataset_name: str = "unnamed",
    progress: bool = True,
) -> AnalysisReport:
    """What each layer of a model does at each position.

    All images run in `num_orders` orders for [`layer_contributions`]. For the probe, the similarity and the embedding,
    at most 256 of them run in twice as many orders as there are layers; see [`collect_representations`] for the
    memory. For the attention maps, the first `num_attention_images` run in four orders. There are none of texts. There
    are none either, with a warning, where attention does not give its weights, or tokens are not patches.

    Args:
        model: A classifier of images or texts of at least two layers, or a [`LayerwiseClassifier`].
        data, processing_class, image_processor, batch_size, max_samples: As for [`evaluate_robustness`]; at least 20
            images or texts.
        num_orders: Number of random orders, at least 1. It is rounded up to a multiple of the number of layers.
        seed: Seed of the orders, the images that `max_samples` draws, the folds of the probe and the embedding, at
            least 0.
        embedding: "pca", or "umap" (needs the extra `analysis`).
        num_attention_images: Number of images with attention maps, at least 1.
        model_name, dataset_name: Names for the report. `model_name` defaults to the configuration's `name_or_path`.

    Raises:
        `ValueError`: if an argument or a label is not valid, there are too few images or layers, or outputs are NaN or
            infinite.
    """
    check_integers(num_orders=(num_orders, 1), seed=(seed, 0), num_attention_images=(num_attention_images, 1))
    check_embedding(embedding)
    parts = as_layerwise(model)
    of_texts = takes_texts(parts.model.config)
    # Of a video, a token stands for a place in several frames
    is_video = hasattr(parts.model.config, "num_frames")
    if not of_texts and (is_video or parts.model.main_input_name != "pixel_values"):
        raise ValueError(
            f"{type(parts.model).__name__} takes neither images nor texts; analyses are of classifiers of these."
        )
    if parts.num_layers < 2:
        raise ValueError(
            "The model has one layer, which has one position only; analyse a model of at least two layers."
        )
    processing_class = chosen_processing_class(processing_class, image_processor)
    loader = batches_for(parts, data, processing_class, batch_size=batch_size, max_samples=max_samples, seed=seed)
    num_images = len(rows_of(loader))
    if num_images < MIN_IMAGES:
        raise ValueError(
            f"There are {num_images} {'texts' if of_texts else 'images'}; the analysis needs at least {MIN_IMAGES}; "
            "use more of the dataset."
        )
    # What may fail comes before the pass over all images
    attention = None if of_texts else _attention_of_first_images(parts, loader, num_attention_images, seed)
    outputs = collect_representations(parts, loader, seed=seed, progress=progress)
    contributions = layer_contributions(parts, loader, num_orders=num_orders, seed=seed, progress=progress)
    config = parts.model.config
    return AnalysisReport(
        model=model_name or config.name_or_path or type(model).__name__,
        dataset=dataset_name,
        num_images=contributions.num_images,
        num_classes=parts.num_labels,
        num_layers=parts.num_layers,
        seed=seed,
        contributions=contributions,
        probe=probe_position(outputs, seed=seed, progress=progress),
        similarity=output_similarity(outputs),
        embedding=embed_representations(outputs, method=embedding, seed=seed),
        attention=attention,
        config=describe_model(parts.model) | input_record(parts.model.config),
        environment=describe_environment(parts.model),
    )


def _attention_of_first_images(
    parts: LayerwiseClassifier, loader: DataLoader, num_images: int, seed: int
) -> AttentionMaps | None:
    batch = next(iter(loader))
    sequential = list(range(parts.num_layers))
    orders = [sequential, sequential[::-1], *arbitrary_execution_orders(parts.num_layers, 2, seed)]
    labels = torch.as_tensor(batch["labels"])[:num_images].tolist()
    try:
        return attention_rollout(parts, batch["pixel_values"][:num_images], orders, labels=labels)
    except ValueError as error:
        logger.warning("The analysis is without attention maps. %s", error)
        return None
