# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Knowledge distillation: a trained classifier's softened answers as targets (Hinton et al., arXiv 1503.02531)."""

import re
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoints.image_size import as_pair, image_size_of, why_not_images_of
from ..checkpoints.loading import CLASSIFIERS
from ..models.auto_classes import auto_class_of
from ..models.configuration_layershuffle import num_channels_of


logger = logging.get_logger(__name__)


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor | None, *, temperature: float
) -> torch.Tensor:
    """Kullback-Leibler divergence of the teacher's probabilities from the model's, both at this temperature.

    It is multiplied by the square of the temperature, which keeps the size of the gradients (arXiv 1503.02531, section
    2).

    Args:
        logits: Logits of the model that is trained, of shape `(batch_size, num_labels)`.
        teacher_logits: Logits of the teacher, of the same shape.
        labels: Classes of shape `(batch_size,)`. Images with -100 are left out, as they are from the class loss.
        temperature: Number by which logits are divided, above 0.

    Returns:
        Losses of shape `(batch_size,)` in float32, in nats. They are 0 for the images that are left out.
    """
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=-1)
    targets = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    divergence = F.kl_div(log_probabilities, targets, reduction="none", log_target=True).sum(-1)
    # Not a product: nothing that comes of an image that is left out may count, not even a number that is not finite
    return temperature**2 * (divergence if labels is None else torch.where(labels != -100, divergence, 0.0))


def check_teacher(teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    """Raises a `ValueError` unless the teacher classifies the same images or texts into the same classes as the model.

    The teacher's weights must be finite.

    Args:
        teacher: The classifier that teaches.
        model: The model to train.
    """
    if not isinstance(teacher, PreTrainedModel) or teacher.main_input_name != model.main_input_name:
        of_texts = model.main_input_name == "input_ids"
        kind, auto_class = ("a text", "SequenceClassification") if of_texts else ("an image", "ImageClassification")
        raise ValueError(
            f"`teacher_model` is a {type(teacher).__name__}; pass {kind} classifier of transformers, such as "
            f"AutoModelFor{auto_class}.from_pretrained(...) gives."
        )
    plain_class = getattr(teacher, "plain_class", type(teacher))
    if teacher.base_model is teacher and auto_class_of(plain_class) not in CLASSIFIERS:
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
    ours: Any = model.config  # which declare their fields with None, and have them
    theirs: Any = teacher.config
    if ours.problem_type not in (None, "single_label_classification") or ours.num_labels < 2:
        raise ValueError(
            "Distillation needs a single label of two classes or more; the model has `problem_type` "
            f"{ours.problem_type!r} and {ours.num_labels} classes."
        )
    _check_same_sizes(teacher, model)
    names, class_names = _class_names(theirs), _class_names(ours)
    shared = set(names) & set(class_names)
    if any(names.index(name) != class_names.index(name) for name in shared):
        raise ValueError(
            f"The teacher has the model's classes in another order: {', '.join(names[:10])} instead of "
            f"{', '.join(class_names[:10])}. Give the model the teacher's `id2label`, and the dataset its labels."
        )
    if names != class_names and not any(re.fullmatch(r"(LABEL_)?\d+", name) for name in (*names, *class_names)):
        logger.warning_once(
            "The teacher's classes are called %s, ... and the model's %s, ...; they are taken to be the same, by "
            "number.",
            ", ".join(names[:3]),
            ", ".join(class_names[:3]),
        )


def _check_same_sizes(teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    ours: Any = model.config
    theirs: Any = teacher.config
    compared = {
        "num_labels": (theirs.num_labels, ours.num_labels),
        "image_size": (image_size_of(theirs), image_size_of(ours)),
        "num_channels": (num_channels_of(theirs), num_channels_of(ours)),
        "vocab_size": (getattr(theirs, "vocab_size", None), getattr(ours, "vocab_size", None)),
    }
    for name, (value, expected) in compared.items():
        if value is not None and expected is not None and as_pair(value) != as_pair(expected):
            if name == "image_size" and _takes(teacher, expected, num_channels_of(ours)):
                continue  # some families interpolate position embeddings by themselves
            raise ValueError(
                f"`{name}` of the teacher is {value} and of the model {expected}; both see the same inputs and answer "
                "for the same classes, so it must be equal."
            )


def _takes(teacher: PreTrainedModel, image_size: Any, num_channels: int | None) -> bool:
    return why_not_images_of(teacher, (num_channels or 3, *as_pair(image_size))) is None


def _class_names(config: Any) -> list[str]:
    return [config.id2label[index] for index in range(config.num_labels)]
