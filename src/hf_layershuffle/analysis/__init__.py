# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What each layer does at each position: updates, a position probe, similarity of outputs, attention."""

from ..evaluation.order_plans import balanced_execution_orders
from .analysis import analyze
from .attention import AttentionMaps, attention_rollout
from .contributions import PARTS, QUANTITIES, LayerContributions, layer_contributions, recorded_updates
from .embedding import EMBEDDINGS, Embedding, check_embedding, embed_representations
from .report import ANALYSIS_FILE, AnalysisReport
from .representations import (
    PositionProbe,
    Representations,
    Similarity,
    collect_representations,
    output_similarity,
    probe_position,
)


__all__ = [
    "ANALYSIS_FILE",
    "AnalysisReport",
    "AttentionMaps",
    "EMBEDDINGS",
    "Embedding",
    "LayerContributions",
    "PARTS",
    "PositionProbe",
    "QUANTITIES",
    "Representations",
    "Similarity",
    "analyze",
    "attention_rollout",
    "balanced_execution_orders",
    "check_embedding",
    "collect_representations",
    "embed_representations",
    "layer_contributions",
    "output_similarity",
    "probe_position",
    "recorded_updates",
]
