# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what an evaluation or an analysis found, in one style.

Each function returns a [`matplotlib.figure.Figure`] that pyplot does not know of: it needs no display, and goes when
nothing refers to it any more. [`save_figure`] writes it as PNG and SVG. [`Pictures`] are several by name.
"""

from .analysis import (
    analysis_pictures,
    plot_attention_maps,
    plot_embedding,
    plot_layer_position_maps,
    plot_output_similarity,
    plot_position_probe,
    plot_updates_by_position,
)
from .budget import budget_pictures, plot_budget
from .merges import plot_random_merges
from .reports import pictures_of
from .robustness import (
    plot_accuracy_distribution,
    plot_layer_ablation,
    plot_order_distribution,
    plot_pruning_curves,
    robustness_pictures,
    save_report_pictures,
)
from .style import Pictures, save_figure


__all__ = [
    "Pictures",
    "analysis_pictures",
    "budget_pictures",
    "pictures_of",
    "plot_accuracy_distribution",
    "plot_attention_maps",
    "plot_budget",
    "plot_embedding",
    "plot_layer_ablation",
    "plot_layer_position_maps",
    "plot_order_distribution",
    "plot_output_similarity",
    "plot_position_probe",
    "plot_pruning_curves",
    "plot_random_merges",
    "plot_updates_by_position",
    "robustness_pictures",
    "save_figure",
    "save_report_pictures",
]
