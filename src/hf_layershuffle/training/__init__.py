# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The Trainer, its arguments, callback and metrics."""

from .arguments import LayerShuffleTrainingArguments
from .callback import LayerShuffleCallback
from .metrics import Accuracy, OrderAccuracy, compute_metrics
from .trainer import LayerShuffleTrainer


__all__ = [
    "Accuracy",
    "LayerShuffleCallback",
    "LayerShuffleTrainer",
    "LayerShuffleTrainingArguments",
    "OrderAccuracy",
    "compute_metrics",
]
