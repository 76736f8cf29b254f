# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Accuracy in any order and with layers missing."""

from .order_plans import evenly_spaced_layers, plan_orders
from .robustness import evaluate_robustness, score_execution_orders


__all__ = ["evaluate_robustness", "evenly_spaced_layers", "plan_orders", "score_execution_orders"]
