# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Values of training arguments that cannot be meant, refused before a folder is made or an image is read."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any


# The lowest and highest value of each number that has no check of its own where it is used. The highest are far above
# what is trained, and low enough that no machine runs out of memory on a mistyped number
LIMITS: dict[str, tuple[float, float]] = {
    "image_size": (1, 4096),
    "patch_size": (1, 4096),
    "num_channels": (1, 1024),
    "vocab_size": (1, 2**24),
    "max_length": (3, 2**20),  # with the special tokens before and after
    "hidden_size": (1, 2**16),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 10_000),
    "num_attention_heads": (1, 2**16),
    "depth_embedding_dim": (1, 2**16),
    "shuffle_window": (1, 10_000),
    "crop_padding": (0, 4096),
    "augmentation_operations": (1, 8),
    "augmentation_magnitude": (0, 10),
    "random_erasing": (0, 1),
    "mixup_alpha": (0, 1000),
    "cutmix_alpha": (0, 1000),
    "mixing_probability": (0, 1),
    "hidden_dropout_prob": (0, 1),
    "position_loss_weight": (0, math.inf),
    "halting_prior": (0, 1),
    "halting_loss_weight": (0, math.inf),
    "layer_budget": (1, 10_000),
    "residual_init_scale": (0, 1000),
    "max_cached_gib": (0, 2**20),
    "max_train_samples": (1, math.inf),
    "num_train_samples": (1, math.inf),
    "shuffle_buffer_size": (0, 10**7),
    "max_eval_samples": (1, math.inf),
    "num_train_epochs": (0, 10**7),
    "per_device_train_batch_size": (1, 2**20),
    "per_device_eval_batch_size": (1, 2**20),
    "gradient_accumulation_steps": (1, math.inf),
    "orders_per_step": (1, math.inf),
    "num_threads": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "seed": (0, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "adam_beta1": (0, math.inf),
    "adam_beta2": (0, math.inf),
    "adam_epsilon": (0, math.inf),
    "final_eval_orders": (8, 10**6),
    "eval_orders": (-math.inf, 10**6),  # `LayerShuffleTrainingArguments` refuses negative numbers
}


def check_numbers(*arguments: Any) -> None:
    """Checks all numbers of dataclasses of arguments: each finite, and those in `LIMITS` between theirs.

    Raises:
        `ValueError`: naming the argument, its value and what is allowed.
    """
    for each in arguments:
        for field in fields(each):
            value = getattr(each, field.name, None)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value):
                raise ValueError(f"`{field.name}` is {value}; it must be a finite number.")
            low, high = LIMITS.get(field.name, (-math.inf, math.inf))
            if value < low:
                raise ValueError(f"`{field.name}` is {value}; it must be at least {low}.")
            if value > high:
                raise ValueError(f"`{field.name}` is {value}; it must be at most {high:,}.")


def check_kinds(values: Mapping[str, object], classes: Iterable[type], where: str) -> None:
    """Checks that a file gives one value to each argument that takes one: no mapping, no list, no date.

    Args:
        values: The file's values by the argument's name. Names that are no arguments are left to the parser.
        classes: The dataclasses of the arguments.
        where: The file, for the message.

    Raises:
        `ValueError`: naming the argument and its value.
    """
    types = {field.name: str(field.type).lower() for each in classes for field in fields(each)}
    types["execution_order"] = "list"  # the indices may be a list in a file
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        is_allowed = all(isinstance(item, (str, bool, int, float, type(None))) for item in items)
        if isinstance(value, dict):
            is_allowed = "dict" in types.get(name, "")
        elif isinstance(value, list):
            is_allowed = is_allowed and "list" in types.get(name, "list")
        if name in types and not is_allowed:
            raise ValueError(f"`{name}` is {_brief(value)} in {where}; it must be one number or text.")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
