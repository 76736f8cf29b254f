# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a run that decide its weights, as they are recorded in its output folder when it starts."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..common.paths import public_name
from .augmentation_arguments import AUGMENTATION_ARGUMENTS
from .model_building import Teacher
from .script_arguments import DataArguments, ModelArguments, ScriptTrainingArguments
from .streaming_arguments import STREAMING_ARGUMENTS
from .text_arguments import TextDataArguments


# Beside the configuration of the model
RECORDED_ARGUMENTS = {
    "model": (
        "model_name_or_path",
        "model_revision",
        "teacher_model_name_or_path",
        "teacher_model_revision",
        "dtype",
    ),
    "data": (
        "dataset_name",
        "dataset_config_name",
        "image_column_name",
        "label_column_name",
        "train_split",
        "eval_split",
        "eval_fraction",
        "max_train_samples",
        *AUGMENTATION_ARGUMENTS,
        *STREAMING_ARGUMENTS,
        "skip_damaged",
    ),
    "training": (
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "seed",
        "data_seed",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "weight_decay",
        "optim",
        "optim_args",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "neftune_noise_alpha",
        "ema_decay",
        "layer_lr_decay",
        "label_smoothing_factor",
        "distillation_weight",
        "distillation_temperature",
        "teacher_orders",
        "teacher_layers",
        "order_consistency",
        "bf16",
        "fp16",
        "load_best_model_at_end",
        "metric_for_best_model",
        "dataloader_drop_last",
        "train_sampling_strategy",
    ),
}
_EVALUATIONS = ("eval_strategy", "eval_steps", "eval_delay", "eval_orders", "eval_orders_seed")
# With `load_best_model_at_end`
RECORDED_OF_BEST = {
    "data": ("max_eval_samples",),
    "training": (*_EVALUATIONS, "greater_is_better", "save_strategy", "save_steps"),
}
_OF_TEXTS = ("text_column_name", "text_pair_column_name")
_NOT_OF_TEXTS = ("image_column_name", *AUGMENTATION_ARGUMENTS, *STREAMING_ARGUMENTS)
RECORDED_TEXT_ARGUMENTS = {
    "model": (*RECORDED_ARGUMENTS["model"], "vocab_size", "max_length"),
    "data": (*_OF_TEXTS, *(name for name in RECORDED_ARGUMENTS["data"] if name not in _NOT_OF_TEXTS)),
    "training": RECORDED_ARGUMENTS["training"],
}


def recorded_arguments(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: ScriptTrainingArguments,
    teacher: Teacher | None = None,
    digests: Mapping[str, str | None] | None = None,
) -> dict:
    """The arguments besides the model's configuration that decide the weights, as in [`runs.RUN_FILE`].

    Folders are recorded by name, since they may have moved. Names say little, so there are digests of what they hold,
    too: of the weights of the teacher and of the model that is fine-tuned, and of the examples to train on.

    Args:
        model_args, data_args, args: The arguments of the run.
        teacher: The teacher, if there is one.
        digests: Those of the session's task ([`Task.digests`]).
    """
    given = {"model": vars(model_args), "data": vars(data_args), "training": args.to_dict()}
    recorded = RECORDED_TEXT_ARGUMENTS if isinstance(data_args, TextDataArguments) else RECORDED_ARGUMENTS
    kinds = [*recorded.items(), *(RECORDED_OF_BEST.items() if args.load_best_model_at_end else ())]
    values = {name: given[kind][name] for kind, names in kinds for name in names}
    values |= digests or {}
    for name in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name"):
        values[name] = public_name(values[name])
    if teacher is None or teacher.model is None:
        values["teacher_model_name_or_path"] = None
        values["teacher_weights"] = None
    else:
        values["teacher_weights"] = teacher.weights
    values["num_processes"] = args.world_size
    return json.loads(json.dumps(values))


def stated_arguments(args: DataArguments | TextDataArguments) -> dict[str, Any]:
    """How a run loads its dataset, where that is not by default, by the names of [`load_image_datasets`]."""
    names = {name: name for name in ("dataset_config_name", "train_split", "eval_split", "eval_fraction")}
    names |= {f"{kind}_column_name": f"{kind}_column" for kind in ("image", "text", "text_pair", "label")}
    defaults = {field.name: field.default for field in fields(args)}
    given = {name: getattr(args, name) for name in names if name in defaults}
    return {names[name]: value for name, value in given.items() if value != defaults[name]}
