# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Knowledge distillation: a trained classifier's softened answers as targets (Hinton et al., arXiv 1503.02531)."""

import re

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor | None, *, temperature: float
) -> torch.Tensor:
    """Kullback-Leibler divergence of the teacher's probabilities from the model's, both at this temperature, times its
    square, which keeps the size of the gradients (arXiv 1503.02531, section 2).

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): Of the model that is trained.
        teacher_logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`)
        labels (`torch.LongTensor` of shape `(batch_size,)` or None): Images with -100 are left out, as of the class
            loss.
        temperature: By which logits are divided, above 0.

    Returns:
        `torch.FloatTensor` of shape `(batch_size,)` in float32, in nats; 0 for the images that are left out.
    """
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=-1)
    targets = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(log_probabilities, targets, reduction="none", log_target=True).sum(-1)
    # Not a product: nothing that comes of an image that is left out may count, not even a number that is not finite
    return temperature**2 * (divergence if labels is None else torch.where(labels != -100, divergence, 0.0))


def check_teacher(teacher, model) -> None:
    """Raises a `ValueError` unless the teacher classifies the same images into the same classes as the model, with
    weights that are finite.

    Args:
        teacher: An image classifier.
        model: The one to train.
    """
    if not isinstance(teacher, PreTrainedModel) or teacher.main_input_name != "pixel_values":
        raise ValueError(
            f"`teacher_model` is a {type(teacher).__name__}; pass an image classifier of transformers, such as "
            "AutoModelForImageClassification.from_pretrained(...) gives."
        )
    if teacher.base_model is teacher:
        raise ValueError(
            f"`teacher_model` is a {type(teacher).__name__}, which has no classifier; pass a whole classifier."
        )
    for name, weight in teacher.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(
                f"`teacher_model` holds numbers that are not finite in '{name}', and would destroy the model; pass a "
                "teacher whose training went well."
            )
    if teacher is model:
        raise ValueError("`teacher_model` is the model to train itself; load a second one from its checkpoint.")
    ours, theirs = model.config, teacher.config
    if ours.problem_type not in (None, "single_label_classification") or ours.num_labels < 2:
        raise ValueError(
            "Distillation needs a single label of two classes or more; the model has `problem_type` "
            f"{ours.problem_type!r} and {ours.num_labels} classes."
        )
    for name in ("num_labels", "image_size", "num_channels"):
        value, expected = getattr(theirs, name, None), getattr(ours, name, None)
        if None not in (value, expected) and _pair(value) != _pair(expected):
            raise ValueError(
                f"`{name}` of the teacher is {value} and of the model {expected}; both see the same images and answer "
                "for the same classes, so it must be equal."
            )
    names, expected = ([config.id2label[index] for index in range(config.num_labels)] for config in (theirs, ours))
    shared = set(names) & set(expected)
    if any(names.index(name) != expected.index(name) for name in shared):
        raise ValueError(
            f"The teacher has the model's classes in another order: {', '.join(names[:10])} instead of "
            f"{', '.join(expected[:10])}. Give the model the teacher's `id2label`, and the dataset its labels."
        )
    if names != expected and not any(re.fullmatch(r"(LABEL_)?\d+", name) for name in (*names, *expected)):
        logger.warning_once(
            "The teacher's classes are called %s, ... and the model's %s, ...; they are taken to be the same, by "
            "number.",
            *(", ".join(each[:3]) for each in (names, expected)),
        )


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)
