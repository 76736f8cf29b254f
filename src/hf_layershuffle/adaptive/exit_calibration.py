# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Chooses when examples leave early, for an accuracy that may be lost or a number of layers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..common.checks import check_integers, check_number
from ..data.dataloading import LabelledData
from ..layerwise import LayerwiseClassifier, as_layerwise
from ..models.execution_order import ExecutionOrder, arbitrary_execution_orders
from ..models.exit_rule import CRITERIA, HALTING, ExitRule
from .layer_answers import LayerAnswers, answers_after_layers, checked_orders


NUM_ORDERS = 8
PATIENCE = "patience"


@dataclass(frozen=True)
class ExitCalibration:
    """When examples leave, and what it costs on other examples than those it was chosen on.

    Args:
        exit_threshold, exit_criterion, exit_patience: As in the configuration.
        accuracy: Fraction of right answers where examples leave early.
        accuracy_of_all_layers: The same where all run through all layers.
        accuracy_loss: Their difference. Below 0 where leaving early helps.
        accuracy_loss_interval: Its 95 % interval over examples (Agresti and Min, 2005, for paired answers).
        mean_num_layers: Layers that an example runs through, on average.
        mean_num_layers_interval: Its 95 % interval.
        num_layers: Layers of the order.
        num_chosen_on: Number of examples that the rule was chosen on.
        num_measured_on: Number of the other examples, which the numbers above are of.
        meets_target: Whether the target was met on the examples that the rule was chosen on. Where it cannot be, the
            rule is the one that comes closest.
    """

    exit_threshold: float | None
    exit_criterion: str
    exit_patience: int | None
    accuracy: float
    accuracy_of_all_layers: float
    accuracy_loss: float
    accuracy_loss_interval: tuple[float, float]
    mean_num_layers: float
    mean_num_layers_interval: tuple[float, float]
    num_layers: int
    num_chosen_on: int
    num_measured_on: int
    meets_target: bool

    def apply(self, model: PreTrainedModel) -> None:
        """Writes the rule into a model's configuration, which `save_pretrained` keeps, instead of another rule or of
        a `layer_budget`.

        Raises:
            `ValueError`: if the model has no free layer order, so that none of its examples would leave early.
        """
        config: Any = model.config
        if not hasattr(config, "exit_threshold"):
            raise ValueError(f"{type(model).__name__} has no free layer order; make it so by `free_order(model)`.")
        config.layer_budget = None
        config.exit_threshold = config.exit_patience = None
        config.exit_criterion = self.exit_criterion
        config.exit_threshold, config.exit_patience = self.exit_threshold, self.exit_patience

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def calibrate_exit(
    model: PreTrainedModel | LayerwiseClassifier,
    data: LabelledData,
    *,
    max_accuracy_loss: float | None = None,
    max_mean_layers: float | None = None,
    criterion: str = "probability",
    execution_orders: Sequence[ExecutionOrder] | None = None,
    seed: int = 0,
    **evaluation: Any,
) -> ExitCalibration:
    """The rule by which examples run through fewest layers at a given loss of accuracy, or lose least at a given
    depth.

    Take data that the model was not trained on, and other data than you report on. Half of it, drawn by `seed`, is for
    choosing; what the rule costs is measured on the other half.

    Args:
        model: A classifier of images or texts that chooses one class.
        data: As for [`score_execution_orders`]: at least two examples.
        max_accuracy_loss: Fraction of all answers that may be lost, in [0, 1], such as 0.005 for half a point.
        max_mean_layers: Instead of it: how many layers an example may run through on average, from 1.
        criterion: "probability", "entropy", "margin" or "halting" (see [`ExitRule`]), or "patience".
        execution_orders: The orders that the model will run in. Defaults to the configuration's; if that is
            "arbitrary", to 8 random ones.
        seed: Seed of the halves and the random orders, at least 0.
        evaluation: Further arguments of [`answers_after_layers`].

    Raises:
        `TypeError`, `ValueError`: as in [`answers_after_layers`]; also unless one of the two limits is given.

    ```python
    >>> found = ls.calibrate_exit(model, held_out, processing_class=processor, max_accuracy_loss=0.005)
    >>> found.apply(model)  # examples leave early from now on
    ```
    """
    if (max_accuracy_loss is None) == (max_mean_layers is None):
        raise ValueError(
            f"`max_accuracy_loss` is {max_accuracy_loss} and `max_mean_layers` is {max_mean_layers}; give one of them."
        )
    criteria = (*CRITERIA, HALTING, PATIENCE)
    if criterion not in criteria:
        raise ValueError(f"`criterion` is {criterion!r}; it must be one of {', '.join(criteria)}.")
    check_integers(seed=(seed, 0))
    parts = as_layerwise(model)
    if criterion == HALTING and getattr(parts.model, "halting_head", None) is None:
        raise ValueError(f"`criterion` is '{HALTING}', and the model has no halting head; train one, or take another.")
    orders = checked_orders(orders_of(parts, seed) if execution_orders is None else execution_orders, parts.num_layers)
    depth = len(orders[0])
    if max_accuracy_loss is not None:
        check_number("max_accuracy_loss", max_accuracy_loss, 0, 1)
    if max_mean_layers is not None:
        check_number("max_mean_layers", max_mean_layers, 1, depth)
    tables = answers_after_layers(parts, data, orders, seed=seed, **evaluation)
    rows = np.random.default_rng(seed).permutation(len(tables[0].labels))
    if len(rows) < 2:
        raise ValueError("There is one example; give at least two, to choose by some and to measure on others.")
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    rule, meets = best_rule([table.at(first) for table in tables], criterion, max_accuracy_loss, max_mean_layers)
    return _measured([table.at(second) for table in tables], rule, len(first), meets)


def orders_of(parts: LayerwiseClassifier, seed: int) -> list[list[int]]:
    """The orders in which a model runs by its configuration: one, or 8 random ones if that is "arbitrary"."""
    order = parts.model.config.execution_order
    if order == "arbitrary":
        return arbitrary_execution_orders(parts.num_layers, NUM_ORDERS, seed=seed)
    return [list(range(parts.num_layers)) if isinstance(order, str) else list(order)]


def best_rule(
    tables: list[LayerAnswers],
    criterion: str,
    max_accuracy_loss: float | None = None,
    max_mean_layers: float | None = None,
) -> tuple[ExitRule, bool]:
    """The rule that does best on these answers at one of two limits (see [`calibrate_exit`]), and whether it meets
    it."""
    right_at_end = np.mean([table.is_right[:, -1].mean() for table in tables])
    outcomes = []
    for rule in _candidates(tables, criterion):
        loss = right_at_end - np.mean([table.is_right_by(rule).mean() for table in tables])
        layers = np.mean([table.num_layers_run(rule).mean() for table in tables])
        outcomes.append((float(loss), float(layers), rule))
    limit = max_accuracy_loss if max_accuracy_loss is not None else max_mean_layers
    limited = itemgetter(0) if max_accuracy_loss is not None else itemgetter(1)
    by_other = itemgetter(1, 0) if max_accuracy_loss is not None else itemgetter(0, 1)
    allowed = [each for each in outcomes if limited(each) <= (limit or 0.0) + 1e-12]
    best = min(allowed, key=by_other) if allowed else min(outcomes, key=limited)
    return best[2], bool(allowed)


def _candidates(tables: list[LayerAnswers], criterion: str) -> list[ExitRule]:
    depth = tables[0].answers.shape[1]
    if criterion == PATIENCE:
        return [ExitRule(patience=count) for count in range(1, depth + 1)]
    values = np.concatenate([table.confidences[criterion].ravel() for table in tables]).astype(np.float64)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        raise ValueError("The model's outputs are not finite after any layer, so nothing can be chosen by them.")
    found = np.quantile(values, np.linspace(0, 1, 401)).clip(0, 1)
    # Few digits: a configuration is read by people. The tails matter most
    near_one = 1 - np.geomspace(1e-4, 0.1, 31)
    thresholds = sorted({0.0, *np.round(found, 4).tolist(), *np.round(near_one, 5).tolist(), 1.0})
    return [ExitRule(threshold, criterion) for threshold in thresholds]


def _measured(tables: list[LayerAnswers], rule: ExitRule, num_chosen_on: int, meets: bool) -> ExitCalibration:
    # By example, over orders: the same example in several orders is not several examples
    early = np.mean([table.is_right_by(rule) for table in tables], axis=0)
    whole = np.mean([table.is_right[:, -1] for table in tables], axis=0)
    layers = np.mean([table.num_layers_run(rule) for table in tables], axis=0)
    return ExitCalibration(
        exit_threshold=rule.threshold,
        exit_criterion=rule.criterion,
        exit_patience=rule.patience,
        accuracy=float(early.mean()),
        accuracy_of_all_layers=float(whole.mean()),
        accuracy_loss=float((whole - early).mean()),
        accuracy_loss_interval=interval_of_mean(whole - early, is_difference=True),
        mean_num_layers=float(layers.mean()),
        mean_num_layers_interval=interval_of_mean(layers),
        num_layers=tables[0].answers.shape[1],
        num_chosen_on=num_chosen_on,
        num_measured_on=len(early),
        meets_target=meets,
    )


def interval_of_mean(values: np.ndarray, is_difference: bool = False) -> tuple[float, float]:
    """95 % interval of a mean over examples.

    Of differences of two paired answers, which may all be 0, it is that of Agresti and Min: as if there were two
    examples more, half of one for each of the four outcomes (both right, both wrong, only one of them).
    """
    count = len(values) + 2 * is_difference
    mean = values.sum() / count
    variance = ((values**2).sum() + is_difference) / count - mean**2
    half = 1.96 * float(np.sqrt(max(variance, 0.0) / count))
    return float(mean - half), float(mean + half)
