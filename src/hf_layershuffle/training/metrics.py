# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Metrics of the kind of `evaluate`, without a download; `evaluate.combine` takes them."""

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction

from ..report import summarize


class Accuracy(evaluate.Metric):
    """Fraction of predictions equal to their references. An [`evaluate.Metric`] that needs no download, unlike
    `evaluate.load("accuracy")`.

    ```python
    >>> from hf_layershuffle import Accuracy

    >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'accuracy': 0.6666666666666666}
    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Fraction of predictions equal to their references, in [0, 1].",
            citation="",
            inputs_description="predictions and references: class indices of shape (num_images,).",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class OrderAccuracy(evaluate.Metric):
    """Accuracy over several execution orders: each image has one predicted class an order.

    Returns `arbitrary_accuracy` (mean over orders), its population standard deviation `..._std`, `..._min`, `..._max`, the
    95 % bootstrap confidence interval of the mean `..._ci_low` and `..._ci_high`, and `order_agreement`: how often two
    orders predict the same class, right or wrong, mean over images and pairs of different orders. Fractions in [0, 1].

    ```python
    >>> from hf_layershuffle import OrderAccuracy

    >>> result = OrderAccuracy().compute(predictions=[[0, 0], [1, 0]], references=[0, 1])  # two images, two orders
    >>> result["arbitrary_accuracy"], result["arbitrary_accuracy_min"], result["order_agreement"]
    (0.75, 0.5, 0.5)
    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy over execution orders, in [0, 1].",
            citation="",
            inputs_description="predictions: class indices of shape (num_images, num_orders); references: (num_images,).",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, seed: int = 0):
        predictions, references = np.asarray(predictions), np.asarray(references)
        summary = vars(summarize((predictions == references[:, None]).mean(axis=0), seed))
        metrics = {f"arbitrary_accuracy_{name}": value for name, value in summary.items() if name != "mean"}
        return {"arbitrary_accuracy": summary["mean"], **metrics, "order_agreement": _agreement(predictions)}


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
    """Metrics for the `compute_metrics` of a `Trainer` or [`LayerShuffleTrainer`].

    Returns:
        `accuracy`: fraction in [0, 1] in the model's evaluation order. With `eval_orders`, also
        `arbitrary_accuracy`, `arbitrary_accuracy_std`, `arbitrary_accuracy_min`: mean, population standard deviation and
        minimum of the accuracy over the arbitrary orders.
    """
    logits, labels, classes_by_order = prediction.predictions, prediction.label_ids, None
    if isinstance(logits, tuple):
        logits, classes_by_order = logits
    metrics = Accuracy(keep_in_memory=True).compute(predictions=logits.argmax(-1), references=labels)
    if classes_by_order is not None:
        over_orders = OrderAccuracy(keep_in_memory=True).compute(predictions=classes_by_order, references=labels)
        metrics |= {
            f"arbitrary_accuracy{name}": over_orders[f"arbitrary_accuracy{name}"] for name in ("", "_std", "_min")
        }
    return metrics
