# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The loss of images that are mixtures of two (mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899)."""

from typing import Any

import torch
from torch.nn import functional as F


def mixed_targets(
    labels: torch.Tensor, mixed_labels: torch.Tensor, weights: torch.Tensor, num_labels: int, smoothing: float = 0.0
) -> torch.Tensor:
    """Target probabilities of mixtures.

    Args:
        labels: Classes of the images themselves, int64 of shape `(batch_size,)`. Images with -100 are left out.
        mixed_labels: Classes of the other images. With -100, the image's own class gets all.
        weights: Weights in [0, 1] of the images themselves, of shape `(batch_size,)`.
        num_labels: Number of classes.
        smoothing: Share in [0, 1] that all classes get alike.

    Returns:
        float32 of shape `(batch_size, num_labels)`. Rows sum to 1, and are 0 for images that are left out.
    """
    weights = torch.where(mixed_labels == -100, 1.0, weights.float())[:, None]
    own, other = (F.one_hot(each.clamp(min=0), num_labels).float() for each in (labels, mixed_labels))
    targets = (1 - smoothing) * (weights * own + (1 - weights) * other) + smoothing / num_labels
    return torch.where((labels != -100)[:, None], targets, 0.0)


def mixed_loss(
    logits: torch.Tensor, labels: torch.Tensor, mixed_labels: torch.Tensor, weights: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """Cross-entropy of mixtures, in nats and float32, of shape `(batch_size,)`. 0 for images that are left out.

    Args:
        logits: Logits of shape `(batch_size, num_labels)`.
        labels, mixed_labels, weights, smoothing: As for [`mixed_targets`].
    """
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    targets = mixed_targets(labels, mixed_labels, weights, logits.shape[-1], smoothing)
    # Not a product alone: nothing that comes of an image that is left out may count, not even what is not finite
    losses = -(targets * log_probabilities).sum(-1)
    return torch.where(labels != -100, losses, 0.0)


def split_mixture(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a model takes of a batch of [`finish_batch`], and how its images are mixed, if they are."""
    mixture: dict[str, torch.Tensor] = {name: inputs[name] for name in ("mixed_labels", "mixing") if name in inputs}
    return {name: each for name, each in inputs.items() if name not in mixture}, mixture
