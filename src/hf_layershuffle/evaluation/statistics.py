# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Scores of execution orders and their statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class OrderScore:
    """How well a model does in one execution order.

    Args:
        execution_order: Layer index at each position.
        accuracy: Fraction in [0, 1] of images classified correctly.
        loss: Mean cross-entropy, in nats an image.
        top5_accuracy: Fraction in [0, 1] of images whose class is among the five likeliest. None for up to five
            classes.
    """

    execution_order: list[int]
    accuracy: float
    loss: float
    top5_accuracy: float | None = None


@dataclass(frozen=True)
class Summary:
    """Summary of a quantity over execution orders.

    `std` is the population standard deviation. `ci_low` and `ci_high` bound a 95 % bootstrap confidence interval (BCa,
    [`scipy.stats.bootstrap`]) of the mean over orders. Of one order, the interval is that order's value.
    """

    mean: float
    std: float
    min: float
    max: float
    ci_low: float
    ci_high: float


def summarize(values: Sequence[float] | np.ndarray, seed: int = 0) -> Summary:
    """Summary of at least one value. `seed` draws the bootstrap's 9,999 resamples."""
    numbers = np.asarray(values, dtype=np.float64)
    low = high = float(numbers.mean())
    if np.ptp(numbers) > 0:
        from scipy.stats import bootstrap

        interval = bootstrap((numbers,), np.mean, rng=np.random.default_rng(seed)).confidence_interval
        low = float(interval.low)
        high = float(interval.high)
    return Summary(float(numbers.mean()), float(numbers.std()), float(numbers.min()), float(numbers.max()), low, high)


@dataclass(frozen=True)
class OrderGroup:
    """Scores in several execution orders of the same kind, and their summaries."""

    scores: list[OrderScore]
    accuracy: Summary
    loss: Summary
    top5_accuracy: Summary | None = None

    @classmethod
    def of(cls, scores: list[OrderScore], seed: int = 0) -> "OrderGroup":
        """Summarizes at least one score."""
        accuracy = summarize([score.accuracy for score in scores], seed)
        loss = summarize([score.loss for score in scores], seed)
        top5 = [score.top5_accuracy for score in scores if score.top5_accuracy is not None]
        return cls(list(scores), accuracy, loss, summarize(top5, seed) if len(top5) == len(scores) else None)


@dataclass(frozen=True)
class PositionPrediction:
    """How often a layer's head knows the position at which the layer ran, over the report's arbitrary orders.

    Where several of these orders begin alike, their common beginning counts once.

    Args:
        accuracy: Fraction in [0, 1], over all images, orders and positions.
        by_layer, by_position: The same for each layer and for each position. NaN where there was nothing to predict.
        correct, total: Counts of correct and of all predictions, layers × positions.
    """

    accuracy: float
    by_layer: list[float]
    by_position: list[float]
    correct: list[list[int]]
    total: list[list[int]]

    @classmethod
    def of(cls, correct: np.ndarray | list[list[int]], total: np.ndarray | list[list[int]]) -> "PositionPrediction":
        """Fractions of counts of shape `(num_layers, num_layers)`: layers × positions."""
        correct = np.asarray(correct)
        total = np.asarray(total)
        with np.errstate(invalid="ignore"):
            by_layer = correct.sum(1) / total.sum(1)
            by_position = correct.sum(0) / total.sum(0)
        return cls(
            float(correct.sum() / total.sum()),
            by_layer.tolist(),
            by_position.tolist(),
            correct.tolist(),
            total.tolist(),
        )


def group_of(values: dict) -> OrderGroup:
    top5 = values.get("top5_accuracy")
    return OrderGroup(
        [score_of(item) for item in values["scores"]],
        Summary(**values["accuracy"]),
        Summary(**with_nan(values["loss"])),
        top5 and Summary(**top5),
    )


def score_of(values: dict) -> OrderScore:
    return OrderScore(**with_nan(values))


def with_nan(values: dict) -> dict:
    """Undoes what [`json_values`] did to a score, since JSON has no NaN. A top-5 accuracy of None stays None."""
    return {
        name: float("nan") if value is None and name != "top5_accuracy" else value for name, value in values.items()
    }


def json_values(value: Any) -> Any:
    """JSON types only, with None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: json_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
