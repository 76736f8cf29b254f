# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Presets of the training command, and the output folder that a run has by default."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig


# Each was measured on a part held out of the training images: docs/results.md
PRESETS = {"order-free": ("--shuffle_mode", "arbitrary", "--orders_per_step", "4", "--residual_init_scale", "0")}
# A model from scratch is sized for the digits
SCRATCH_DEFAULTS: dict[str, Any] = {
    "architecture": "vit",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_channels": 3,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "residual_init_scale": 1.0,
}


def initializer_range_of(hidden_size: int) -> float:
    """Standard deviation of the initial weights that goes with the preset order-free: 0.02 at a width of 768."""
    return round(0.55 / max(hidden_size, 1) ** 0.5, 4)


def method_name(config: PreTrainedConfig) -> str:
    """Name of a method for the default output folder and the table, such as layershuffle-depth.

    Args:
        config: A LayerShuffle configuration.
    """
    parts = {"none": "plain", "arbitrary": "layershuffle", "window": f"window{config.shuffle_window}"}[
        config.shuffle_mode
    ]
    names = [parts] if parts != "plain" or not config.layerdrop else []
    names += ["layerdrop"] if config.layerdrop else []
    names += ["depth"] if config.depth_embedding else []
    names += ["predict"] if config.position_predictor else []
    names += ["pondernet"] if config.halting_head else []
    names += ["controller"] if config.layer_controller else []
    return "-".join(names)


def default_output_dir(dataset_name: str, method: str, preset: str | None) -> str:
    """`outputs/<dataset>-<method>`, with the preset's name at the end, so that two presets do not share a folder."""
    path = Path(dataset_name)
    dataset = path.resolve().name if path.is_dir() else path.name
    return "/".join(("outputs", "-".join(filter(None, (dataset, method, preset)))))
