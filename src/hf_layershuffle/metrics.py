# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Metrics of the kind of `evaluate`, without a download; `evaluate.combine` takes them."""

import datasets
import evaluate
import numpy as np

from .report import summarize


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
