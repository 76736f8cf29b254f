# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Vision transformers whose layers run in any order (LayerShuffle, arXiv 2407.04513).

The models are imported at once, to register them with transformers' Auto classes. Everything else is imported when its
name is first used, so that loading a model does not wait for datasets, the Trainer or matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_layershuffle import LayerShuffleDeiTConfig, LayerShuffleViTConfig
from .execution_order import arbitrary_execution_orders, check_execution_order
from .modeling_layershuffle import (
    LayerShuffleDeiTForImageClassification,
    LayerShuffleDeiTModel,
    LayerShuffleViTForImageClassification,
    LayerShuffleViTModel,
)


# A further public name: a line here, the same import for editors below, and an entry in `__all__`
_LAZY_NAMES = {
    "Accuracy": "training",
    "AnalysisReport": "analysis",
    "LayerShuffleCallback": "training",
    "LayerShuffleTrainer": "training",
    "LayerShuffleTrainingArguments": "training",
    "MergePlan": "merge_plan",
    "OrderAccuracy": "training",
    "RandomMergeReport": "random_merges",
    "RobustnessReport": "report",
    "analyze": "analysis",
    "compare_reports": "report",
    "compute_metrics": "training",
    "evaluate_random_merges": "random_merges",
    "evaluate_robustness": "evaluation",
    "example_model": "bundled",
    "layers_for_speedup": "pruning",
    "merge": "merging",
    "prune_layers": "pruning",
    "publish": "publishing",
    "score_execution_orders": "evaluation",
    "search_layers": "pruning",
    "to_plain_vit": "export",
    "write_model_card": "model_card",
}

if TYPE_CHECKING:
    from .analysis import AnalysisReport, analyze
    from .bundled import example_model
    from .evaluation import evaluate_robustness, score_execution_orders
    from .export import to_plain_vit
    from .merge_plan import MergePlan
    from .merging import merge
    from .model_card import write_model_card
    from .pruning import layers_for_speedup, prune_layers, search_layers
    from .publishing import publish
    from .random_merges import RandomMergeReport, evaluate_random_merges
    from .report import RobustnessReport, compare_reports
    from .training import (
        Accuracy,
        LayerShuffleCallback,
        LayerShuffleTrainer,
        LayerShuffleTrainingArguments,
        OrderAccuracy,
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
    "AnalysisReport",
    "LayerShuffleCallback",
    "LayerShuffleDeiTConfig",
    "LayerShuffleDeiTForImageClassification",
    "LayerShuffleDeiTModel",
    "LayerShuffleTrainer",
    "LayerShuffleTrainingArguments",
    "LayerShuffleViTConfig",
    "LayerShuffleViTForImageClassification",
    "LayerShuffleViTModel",
    "MergePlan",
    "OrderAccuracy",
    "RandomMergeReport",
    "RobustnessReport",
    "analyze",
    "arbitrary_execution_orders",
    "check_execution_order",
    "compare_reports",
    "compute_metrics",
    "evaluate_random_merges",
    "evaluate_robustness",
    "example_model",
    "layers_for_speedup",
    "merge",
    "prune_layers",
    "publish",
    "score_execution_orders",
    "search_layers",
    "to_plain_vit",
    "write_model_card",
]


def __getattr__(name: str):
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(import_module(f".{_LAZY_NAMES[name]}", __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_NAMES})
