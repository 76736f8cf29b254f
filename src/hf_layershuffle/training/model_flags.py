# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The flags of the configuration that a run's arguments give."""

from typing import Any

from transformers import PreTrainedModel

from ..models.execution_order import parse_execution_order
from .script_arguments import ModelArguments


LAYERSHUFFLE_FLAGS = (
    "shuffle_mode",
    "shuffle_window",
    "depth_embedding",
    "depth_embedding_dim",
    "position_predictor",
    "position_loss_weight",
    "halting_prior",
    "halting_loss_weight",
    "layer_controller",
    "layer_budget",
    "layerdrop",
    "drop_path_rate",
    "execution_order",
)
# The flag without which another flag would do nothing
PARTS = {
    "depth_embedding_dim": "depth_embedding",
    "position_loss_weight": "position_predictor",
    "halting_prior": "halting_head",
    "halting_loss_weight": "halting_head",
    "layer_budget": "layer_controller",
}
EARLY_EXITS = {"none": False, "pondernet": True}  # of --early_exit: whether the model has a halting head
# Those of the plain model
PLAIN: dict[str, Any] = {
    "shuffle_mode": "none",
    "layerdrop": 0.0,
    "depth_embedding": False,
    "position_predictor": False,
    "halting_head": False,
    "layer_controller": False,
    "layer_budget": None,
}


def layershuffle_flags(args: ModelArguments) -> dict:
    """The flags that were given, by their names in the configuration.

    Raises:
        `ValueError`: if the execution order is neither a name nor indices, the early exit is not known, or a layer
            controller has no model to be trained for.
    """
    flags = {name: getattr(args, name) for name in LAYERSHUFFLE_FLAGS if getattr(args, name) is not None}
    if args.execution_order is not None:
        flags["execution_order"] = parse_execution_order(args.execution_order)
    if args.early_exit is not None:
        if args.early_exit not in EARLY_EXITS:
            allowed = " or ".join(map(repr, EARLY_EXITS))
            raise ValueError(f"`early_exit` is {args.early_exit!r}; it must be {allowed}, or be left out.")
        flags["halting_head"] = EARLY_EXITS[args.early_exit]
    if args.layer_controller and args.model_name_or_path is None:
        raise ValueError(
            "`layer_controller` is True, which trains a controller for a trained model; name it: --model_name_or_path."
        )
    return flags


def check_parts(flags: dict, model: PreTrainedModel) -> None:
    """Raises a `ValueError` for a flag that does nothing without another."""
    for name, part in PARTS.items():
        if flags.get(name) is not None and not getattr(model.config, part):
            option = {"halting_head": "early_exit pondernet"}.get(part, part)
            raise ValueError(f"`{name}` is {flags[name]!r} without `{part}`; add --{option}, or leave it out.")
