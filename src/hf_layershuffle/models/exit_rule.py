# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""When an answer is sure enough for an example to leave the model early.

This file travels to the Hub beside the weights, so it imports nothing from this package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

CRITERIA = ("probability", "entropy", "margin")
HALTING = "halting"  # that of a trained head, which is not of the logits


@dataclass(frozen=True)
class ExitRule:
    """When an example is sure enough to leave.

    Args:
        threshold: How sure an answer must be, in [0, 1]: an example leaves at the first layer at which it is at least
            as sure. With 0 each leaves after the first layer.
        criterion: What sure means. "probability": the highest class probability (BranchyNet and others). "entropy": 1
            minus the entropy of the probabilities as a fraction of its largest value, the logarithm of the number of
            classes (arXiv 1709.01686). "margin": the difference of the two highest probabilities. "halting": the
            probability, by a model's halting head, of having left by then; an example leaves at the first layer at
            which it is above the threshold (Q-exit with 0.5, arXiv 2204.03276).
        patience: Instead of a threshold: after how many layers in a row with the same answer an example leaves, at
            least 1 (arXiv 2006.04152).

    Raises:
        `ValueError`: if a value is outside of this, or both a threshold and a patience are given.
    """

    threshold: float | None = None
    criterion: str = "probability"
    patience: int | None = None

    def __post_init__(self) -> None:
        for (name, (is_valid, allowed)), value in zip(
            EXIT_FIELDS.items(), (self.threshold, self.criterion, self.patience)
        ):
            if not is_valid(value):
                raise ValueError(f"`{name}` is {value!r}; it must be {allowed}.")
        if self.threshold is not None and self.patience is not None:
            raise ValueError(
                f"`exit_threshold` is {self.threshold} and `exit_patience` is {self.patience}; an example leaves by "
                "one of them: set the other to None."
            )

    def is_sure(self, logits: torch.Tensor) -> torch.Tensor:
        """Whether an answer is sure enough by the threshold: booleans of shape `(batch_size,)`. Not for "halting"."""
        return confidence(logits, self.criterion) >= (0.0 if self.threshold is None else self.threshold)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# For each field: whether a value is valid by itself, and what is allowed
EXIT_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "exit_threshold": (lambda v: v is None or (_is_number(v) and 0 <= v <= 1), "None or a number in [0, 1]"),
    "exit_criterion": (
        lambda v: isinstance(v, str) and v in (*CRITERIA, HALTING),
        f"one of {', '.join(map(repr, (*CRITERIA, HALTING)))}",
    ),
    "exit_patience": (
        lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 1),
        "None or an integer of at least 1",
    ),
}


def without_parts(config_dict: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration without what needs a part of the model that it is now loaded without, with a warning.

    Args:
        config_dict: Fields of the stored configuration.
        given: Fields that are given for it now.
    """
    changed: dict[str, Any] = {}
    if given.get("layer_controller") is False:
        changed["layer_budget"] = None
    if given.get("halting_head") is False and config_dict.get("exit_criterion") == HALTING:
        changed |= {"exit_threshold": None, "exit_criterion": CRITERIA[0]}
    for name, value in changed.items():
        if value is None and config_dict.get(name) is not None and given.get(name) is None:
            logger.warning("`%s` %s is not kept, since what it needs is left out.", name, config_dict[name])
    return {**config_dict, **changed}


def forget_exits(config: Any) -> None:
    """Takes out of a configuration, with a warning, what was chosen for other weights: when examples leave, and which
    MLPs are left out. The criterion goes if its halting head is gone."""
    chosen_by = dict.fromkeys(("exit_threshold", "exit_patience"), "calibrate_exit")
    chosen_by["skipped_mlps"] = "choose_skipped_mlps"
    for name, function in chosen_by.items():
        if getattr(config, name, None) is None:
            continue
        logger.warning(
            "`%s` %s was chosen for other weights and is not kept; `%s` chooses for the new model.",
            name,
            getattr(config, name),
            function,
        )
        setattr(config, name, None)
    if getattr(config, "exit_criterion", None) == HALTING and not config.halting_head:
        config.exit_criterion = CRITERIA[0]


def confidence(logits: torch.Tensor, criterion: str = "probability") -> torch.Tensor:
    """How sure an answer is, by a criterion of [`ExitRule`]: float32 in [0, 1] of shape `logits.shape[:-1]`.

    Args:
        logits: Of shape `(..., num_labels)`, with at least two labels.
        criterion: One of `CRITERIA`.
    """
    probabilities = logits.float().softmax(-1)
    if criterion == "probability":
        return probabilities.amax(-1)
    if criterion == "margin":
        highest = probabilities.topk(2, dim=-1).values
        return highest[..., 0] - highest[..., 1]
    entropy = torch.special.entr(probabilities).sum(-1)
    return (1 - entropy / torch.log(torch.tensor(float(logits.shape[-1])))).clamp(0, 1)
