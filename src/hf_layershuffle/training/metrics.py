# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Metrics of the kind of `evaluate`, without a download; `evaluate.combine` takes them."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from ..evaluation.statistics import summarize


class Accuracy(evaluate.Metric):
    """Fraction of predictions equal to their references.

    This is an [`evaluate.Metric`] that needs no download, unlike `evaluate.load("accuracy")`.

    ```python
    >>> from hf_layershuffle import Accuracy

    >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'accuracy': 0.6666666666666666}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fraction of predictions equal to their references, in [0, 1].",
            citation="",
            inputs_description="predictions and references: class indices of shape (num_images,).",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class OrderAccuracy(evaluate.Metric):
    """Accuracy over several execution orders: each image has one predicted class an order.

    Returns `arbitrary_accuracy` (mean over orders), its population standard deviation `..._std`, `..._min`, `..._max`,
    the 95 % bootstrap confidence interval of the mean `..._ci_low` and `..._ci_high`, and `order_agreement`: how often
    two orders predict the same class, right or wrong, mean over images and pairs of different orders. Fractions
    in [0, 1].

    ```python
    >>> from hf_layershuffle import OrderAccuracy

    >>> result = OrderAccuracy().compute(predictions=[[0, 0], [1, 0]], references=[0, 1])  # two images, two orders
    >>> result["arbitrary_accuracy"], result["arbitrary_accuracy_min"], result["order_agreement"]
    (0.75, 0.5, 0.5)
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy over execution orders, in [0, 1].",
            citation="",
            inputs_description="predictions: class indices, (num_images, num_orders); references: (num_images,).",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Sequence, references: Sequence, seed: int = 0) -> dict[str, float]:
        classes, labels = np.asarray(predictions), np.asarray(references)
        summary = vars(summarize((classes == labels[:, None]).mean(axis=0), seed))
        metrics = {f"arbitrary_accuracy_{name}": value for name, value in summary.items() if name != "mean"}
        return {"arbitrary_accuracy": summary["mean"], **metrics, "order_agreement": _agreement(classes)}


def _agreement(predictions: np.ndarray) -> float:
    """`predictions` has shape `(num_images, num_orders)`; 1.0 for one order."""
    num_images, num_orders = predictions.shape
    if num_orders == 1:
        return 1.0
    votes = np.zeros((num_images, predictions.max() + 1), dtype=np.int64)
    np.add.at(votes, (np.arange(num_images)[:, None], predictions), 1)
    same_pairs = (votes * (votes - 1)).sum(axis=1)
    return float(np.mean(same_pairs / (num_orders * (num_orders - 1))))


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics for the `compute_metrics` of a `Trainer` or [`LayerShuffleTrainer`], of the task that the labels tell.

    Returns:
        - One class an image (integer labels): `accuracy`, fraction in [0, 1] in the model's evaluation order. Images
          with the label -100 are left out; nothing is returned if no other is there. Predictions are logits, or the
          classes themselves as integers (`preprocess_logits_for_metrics`).
        - Several classes an image (labels of shape `(num_images, num_labels)`, each 0 or 1): `subset_accuracy`,
          fraction of images with all classes right, and `f1`, over all images and classes (micro). Logits above 0
          count as 1.
        - Regression (other labels): `mse` and `mae`, mean squared and absolute error over images and outputs.
    """
    outputs, labels = _joined(prediction.predictions), _joined(prediction.label_ids)
    if len(outputs) != len(labels):
        raise ValueError(
            f"There are {len(outputs)} predictions and {len(labels)} labels; there must be one each an image."
        )
    # Of classes, that `preprocess_logits_for_metrics` chose
    are_classes = labels.ndim == outputs.ndim == 1 and _are_integers(outputs) and _are_integers(labels)
    if labels.ndim == outputs.ndim > 1 and outputs.shape[-1] > 1 and np.isin(labels, (0, 1)).all():
        return _multi_label_metrics(outputs > 0, labels == 1)
    if not are_classes and (outputs.ndim == 1 or outputs.shape[-1] == 1 or labels.ndim == outputs.ndim):
        errors = outputs.astype(np.float64).reshape(len(labels), -1) - labels.reshape(len(labels), -1)
        return {"mse": float(np.mean(errors**2)), "mae": float(np.mean(np.abs(errors)))}
    is_labelled = labels != -100
    if not is_labelled.any():
        return {}
    classes = outputs if are_classes else outputs.argmax(-1)
    return Accuracy(keep_in_memory=True).compute(predictions=classes[is_labelled], references=labels[is_labelled])


def _joined(values: Any) -> np.ndarray:
    """The first output of a model that gives several; batches joined where the Trainer keeps them apart."""
    if isinstance(values, list):
        return np.concatenate([_joined(batch) for batch in values])
    return _joined(values[0]) if isinstance(values, tuple) else np.asarray(values)


def _are_integers(values: np.ndarray) -> bool:
    return np.issubdtype(values.dtype, np.integer)


def _multi_label_metrics(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    right = (predicted & expected).sum()
    marked = predicted.sum() + expected.sum()
    return {
        "subset_accuracy": float((predicted == expected).all(axis=-1).mean()),
        "f1": float(2 * right / marked) if marked else 1.0,
    }


def order_metrics(classes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean, population standard deviation and minimum of the accuracy over execution orders, fractions in [0, 1].

    `classes` has shape `(num_images, num_orders)`, `labels` `(num_images,)`; images with the label -100 are left out.
    """
    is_labelled = labels != -100
    if not is_labelled.any():
        return {}
    over_orders = OrderAccuracy(keep_in_memory=True).compute(
        predictions=classes[is_labelled], references=labels[is_labelled]
    )
    return {f"arbitrary_accuracy{name}": over_orders[f"arbitrary_accuracy{name}"] for name in ("", "_std", "_min")}
