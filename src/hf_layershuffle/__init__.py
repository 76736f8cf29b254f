# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Vision transformers whose layers run in any order (LayerShuffle, arXiv 2407.04513)."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_layershuffle import LayerShuffleDeiTConfig, LayerShuffleViTConfig
from .evaluation import evaluate_robustness, score_execution_orders
from .execution_order import arbitrary_execution_orders, check_execution_order
from .metrics import Accuracy, OrderAccuracy
from .modeling_layershuffle import (
    LayerShuffleDeiTForImageClassification,
    LayerShuffleDeiTModel,
    LayerShuffleViTForImageClassification,
    LayerShuffleViTModel,
)
from .report import RobustnessReport, compare_reports
from .training import (
    LayerShuffleCallback,
    LayerShuffleTrainer,
    LayerShuffleTrainingArguments,
    compute_metrics,
)


__version__ = "0.1.0"

for _config, _model, _classifier in (
    (LayerShuffleViTConfig, LayerShuffleViTModel, LayerShuffleViTForImageClassification),
    (LayerShuffleDeiTConfig, LayerShuffleDeiTModel, LayerShuffleDeiTForImageClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForImageClassification.register(_config, _classifier)


__all__ = [
    "Accuracy",
    "LayerShuffleCallback",
    "LayerShuffleDeiTConfig",
    "LayerShuffleDeiTForImageClassification",
    "LayerShuffleDeiTModel",
    "LayerShuffleTrainer",
    "LayerShuffleTrainingArguments",
    "LayerShuffleViTConfig",
    "LayerShuffleViTForImageClassification",
    "LayerShuffleViTModel",
    "OrderAccuracy",
    "RobustnessReport",
    "arbitrary_execution_orders",
    "check_execution_order",
    "compare_reports",
    "compute_metrics",
    "evaluate_robustness",
    "score_execution_orders",
]
