# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The loss of the answer after each layer, which a halting head weighs."""

import torch

from .distillation import distillation_loss
from .mixed_loss import mixed_loss


def losses_by_layer(
    layer_logits: torch.Tensor,
    labels: torch.Tensor | None,
    mixed_labels: torch.Tensor | None = None,
    mixing: torch.Tensor | None = None,
    *,
    smoothing: float = 0.0,
    teacher_logits: torch.Tensor | None = None,
    teacher_weight: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Losses in nats and float32, of shape `(batch_size, positions)`; 0 for images that are left out.

    Args:
        layer_logits: Class logits after each layer, of shape `(batch_size, positions, num_labels)`.
        labels: Classes of shape `(batch_size,)`. Images with -100 are left out. None if the teacher is all there is.
        mixed_labels, mixing: Of images that are mixtures, as for [`mixed_loss`].
        smoothing: Share in [0, 1] of the target that all classes get alike.
        teacher_logits: Logits of a teacher, of shape `(batch_size, num_labels)`.
        teacher_weight: Share in [0, 1] of the distillation loss, if there is a teacher.
        temperature: As for [`distillation_loss`].
    """
    positions = layer_logits.shape[1]
    logits = layer_logits.flatten(0, 1)

    def each_time(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(positions, dim=0)

    known = None if labels is None else each_time(labels)
    losses = torch.zeros(len(logits), device=logits.device)
    if known is not None:
        other = known if mixed_labels is None else each_time(mixed_labels)
        weights = torch.ones_like(losses) if mixing is None else each_time(mixing)
        losses = mixed_loss(logits, known, other, weights, smoothing)
    if teacher_logits is not None:
        taught = distillation_loss(logits, each_time(teacher_logits), known, temperature=temperature)
        losses = (1 - teacher_weight) * losses + teacher_weight * taught
    return losses.view(-1, positions)
