# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What several execution orders say of the same images: their divergence as a loss, and their mean as a teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..models.configuration_layershuffle import num_layers_of
from ..models.early_exit import all_layers
from ..models.execution_order import arbitrary_execution_orders


def order_divergence(first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Mean of the two Kullback-Leibler divergences between the answers of two forward passes on the same images.

    It is the loss by which R-Drop makes two dropout masks agree (arXiv 2106.14448, section 2). Here two execution
    orders shall agree. Both passes learn.

    Args:
        first, second: Logits of shape `(batch_size, num_labels)`.
        labels: Classes of shape `(batch_size,)`. Images with -100 are left out.

    Returns:
        Losses of shape `(batch_size,)` in float32, in nats. They are 0 for the images that are left out.
    """
    logs = F.log_softmax(first.float(), dim=-1), F.log_softmax(second.float(), dim=-1)
    divergence = ((logs[0].exp() - logs[1].exp()) * (logs[0] - logs[1])).sum(-1) / 2
    return divergence if labels is None else torch.where(labels != -100, divergence, 0.0)


def check_order_consistency(weight: float, model: PreTrainedModel, uses_ddp: bool = False) -> None:
    """Raises a `ValueError` where two forward passes of a model have one order, or choose no class.

    DistributedDataParallel (`uses_ddp`) takes two forward passes a step only if each runs all layers.
    """
    if weight == 0:
        return
    config: Any = model.config
    draws_orders = getattr(config, "shuffle_mode", "none") != "none" or getattr(config, "layerdrop", 0.0)
    if not draws_orders or getattr(config, "layer_controller", False):  # which is trained in that of evaluation
        raise ValueError(
            f"`order_consistency` is {weight}, and the model trains in one order only; set its `shuffle_mode` to "
            "'arbitrary' or 'window' and its `layer_controller` to False, or leave `order_consistency` at 0."
        )
    if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
        raise ValueError(
            f"`order_consistency` is {weight}, and needs a single label of two classes or more; the model has "
            f"`problem_type` {config.problem_type!r} and {config.num_labels} classes. Leave it at 0."
        )
    if uses_ddp and getattr(config, "layerdrop", 0.0) > 0:
        raise ValueError(
            f"`order_consistency` is {weight} and `layerdrop` is {config.layerdrop}, which several processes cannot "
            "train together by DistributedDataParallel; set one to 0, or train in one process or by FSDP2."
        )


class TeacherAnswer:
    """The answer of a teacher: its own, or the mean of what it says in several execution orders.

    The mean is of probabilities, and comes back as logits: their logarithms. Full orders of a trained model agree, so
    their mean says little more than one of them. Orders of fewer layers differ.

    Args:
        teacher: The classifier that teaches.
        num_orders: Number of arbitrary execution orders, at least 0. With 0 it answers in its own order.
        num_layers: Layers of each order; None for all.
        seed: Seed of the orders, which stay the same.

    Raises:
        `ValueError`: if there are orders, and the teacher's layers cannot run in any, or are fewer than `num_layers`.
    """

    def __init__(self, teacher: PreTrainedModel, num_orders: int = 0, num_layers: int | None = None, seed: int = 0):
        self.orders: list[list[int]] = []
        if num_orders == 0:
            if num_layers is not None:
                raise ValueError(
                    f"`teacher_layers` is {num_layers} without `teacher_orders`; say in how many orders the teacher "
                    "answers, such as 4, or leave it out."
                )
            return
        if not hasattr(teacher, "free_layers"):
            raise ValueError(
                f"`teacher_orders` is {num_orders}, and the teacher, a {type(teacher).__name__}, has one order only; "
                "take a teacher that was trained in arbitrary order, or set `teacher_orders` to 0."
            )
        depth = num_layers_of(teacher.config)
        if num_layers is not None and num_layers > depth:
            raise ValueError(
                f"`teacher_layers` is {num_layers}, and the teacher has {depth} layers; choose 1 to {depth}."
            )
        orders = arbitrary_execution_orders(depth, num_orders, seed=seed)
        self.orders = [order[:num_layers] for order in orders]

    def __call__(self, teacher: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Logits of shape `(batch_size, num_labels)`."""
        with all_layers(teacher):
            if not self.orders:
                return teacher(**inputs).logits
            logits = [teacher(**inputs, execution_order=order).logits.float() for order in self.orders]
        return torch.stack([each.log_softmax(-1) for each in logits]).logsumexp(0)
