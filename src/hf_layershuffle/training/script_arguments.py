# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `hf-layershuffle train` and examples/train.py."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers.integrations import get_available_reporting_integrations

from .argument_checks import LIMITS
from .arguments import LayerShuffleTrainingArguments
from .augmentation_arguments import AugmentationArguments
from .recipes import PRESETS
from .streaming_arguments import StreamingArguments


HALF_BUDGET_ACCURACY = "half_budget_accuracy"  # of models with a layer controller and no budget
ARBITRARY_METRICS = ("arbitrary_accuracy", "arbitrary_accuracy_std", "arbitrary_accuracy_min")
# What the other values of these arguments would need, which the metrics over execution orders do not have
FIXED = {
    "eval_do_concat_batches": (True, "the metrics are of all images at once"),
    "batch_eval_metrics": (False, "the metrics are of all images at once"),
    "do_predict": (False, "to evaluate a trained model there is `hf-layershuffle evaluate`"),
    "enable_jit_checkpoint": (
        False,
        "SIGTERM stops the training, which goes on from its last checkpoint (--save_steps)",
    ),
    "label_names": (None, "images have one label, the column that --label_column_name names"),
}


@dataclass
class ModelArguments:
    """The flags that are not given keep the checkpoint's value, or the configuration's default."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Values for arguments that are not given. order-free: what brings accuracy under arbitrary order "
            "closest to the plain model's (" + " ".join(PRESETS["order-free"]) + ", and see --initializer_range)."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint of a vision transformer to fine-tune, plain or LayerShuffle: a folder or a Hub id."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub checkpoint."})
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Trained image classifier of any architecture with the same classes and image size: a folder or a "
            "Hub id. The model also learns from its answers. A model from scratch sees pixels normalised as it does. "
            "See --distillation_weight and --distillation_temperature."
        },
    )
    teacher_model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub teacher."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub. Defaults to the logged-in one."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code that an image processor or a teacher brings, if you trust it."},
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start tensors of another shape anew, as the classifier for other classes."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype of the weights that are trained, whatever the checkpoint is stored in: float32 or "
            "bfloat16. Mixed precision, which keeps float32 weights, is --bf16 or --fp16."
        },
    )
    shuffle_mode: str | None = field(
        default=None, metadata={"help": "Training order: none, arbitrary or window. Defaults to arbitrary."}
    )
    shuffle_window: int | None = field(
        default=None, metadata={"help": "Positions by which a layer may move, at least 1; for --shuffle_mode window."}
    )
    depth_embedding: bool | None = field(default=None, metadata={"help": "Tell each layer the position it runs at."})
    depth_embedding_dim: int | None = field(default=None, metadata={"help": "Size of the depth vector (32)."})
    position_predictor: bool | None = field(
        default=None, metadata={"help": "Let each layer predict the position it ran at."}
    )
    position_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the position loss (1.0)."})
    early_exit: str | None = field(
        default=None,
        metadata={
            "help": "pondernet: train exits, by a head that says after each layer how likely an image leaves there, "
            "and by the losses of the answers after all layers. none: take a checkpoint's head out."
        },
    )
    halting_prior: float | None = field(
        default=None, metadata={"help": "Probability in (0, 1) of leaving after each layer by the prior (0.1)."}
    )
    halting_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the divergence from that prior, at least 0 (0.5)."}
    )
    layer_controller: bool | None = field(
        default=None,
        metadata={
            "help": "Train a controller that chooses layers for each image, and nothing else: the weights of "
            "--model_name_or_path are frozen. Takes --num_train_epochs 10 --learning_rate 1e-3. False: take a "
            "checkpoint's controller out."
        },
    )
    layer_budget: int | None = field(
        default=None,
        metadata={"help": "With --layer_controller: layers that each image runs in evaluation (all of them)."},
    )
    layerdrop: float | None = field(
        default=None, metadata={"help": "Probability in [0, 1) of leaving a layer out in training (0.0)."}
    )
    drop_path_rate: float | None = field(
        default=None,
        metadata={
            "help": "Probability in [0, 1) with which an image skips a layer in training: stochastic depth (0.0)."
        },
    )
    execution_order: str | None = field(
        default=None,
        metadata={"help": "Evaluation order: sequential, arbitrary, or layer indices such as 2,0,1 (sequential)."},
    )
    hidden_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout, fraction in [0, 1]. Defaults to the checkpoint's, or to 0."}
    )
    architecture: str | None = field(
        default=None,
        metadata={
            "help": "From scratch: vit, deit, dinov2, dinov2_with_registers, siglip, clip, beit, ijepa or another "
            "model type of transformers with one list of equal layers; or timm/ and one of timm's models, such as "
            "timm/vit_tiny_patch16_224, whose sizes count unless they are given (vit)."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "From scratch: width (64)."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "From scratch: depth (6)."})
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "From scratch: heads. Defaults to one for each 32 of the width."}
    )
    intermediate_size: int | None = field(
        default=None, metadata={"help": "From scratch: width of the MLP. Defaults to 4 times the width."}
    )
    initializer_range: float | None = field(
        default=None,
        metadata={
            "help": "From scratch: standard deviation of the initial weights, above 0. Defaults to 0.02; with "
            "--preset order-free to 0.55 / sqrt(hidden_size), which is 0.02 at a width of 768."
        },
    )
    residual_init_scale: float | None = field(
        default=None,
        metadata={
            "help": "From scratch: factor of the initial output weights of attention and MLP (1.0). With 0, layers "
            "begin by adding nothing."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Pixels of each side. From scratch it defaults to the dataset's, at most 224, as a multiple of "
            "the patch. With a checkpoint it defaults to the checkpoint's; for another one, position embeddings are "
            "interpolated once."
        },
    )
    patch_size: int | None = field(
        default=None,
        metadata={"help": "From scratch: pixels. Defaults to an eighth to a quarter of the image, at most 16."},
    )
    num_channels: int | None = field(
        default=None, metadata={"help": "From scratch: 3 to read all images as RGB, 1 as grey (3)."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})


@dataclass
class DataArguments(AugmentationArguments, StreamingArguments):
    dataset_name: str = field(
        default="digits",
        metadata={"help": "digits, a folder (Parquet, one folder a class, IDX, save_to_disk) or a Hub dataset id."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of images. Defaults to the one found."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of labels. Defaults to the one found."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on. Defaults to validation, then test; train means a part held out of it."
        },
    )
    eval_fraction: float = field(
        default=0.2,
        metadata={
            "help": "Fraction of the training split held out where there is no other split, or --eval_split train."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many images, drawn by seed."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on this many images, drawn by seed."}
    )
    skip_damaged: bool = field(
        default=False, metadata={"help": "Leave out images that cannot be read, instead of stopping at them."}
    )
    max_cached_gib: float = field(
        default=16.0,
        metadata={
            "help": "Decoded images are kept in a file beside the dataset's own cache if they take no more GiB than "
            "this. 0 decodes them whenever they are read."
        },
    )


@dataclass
class ScriptTrainingArguments(LayerShuffleTrainingArguments):
    """transformers' arguments with other defaults: sized for the digits, with ten evaluations and checkpoints a
    run."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Defaults to outputs/<dataset>-<method>, and -<preset> if there is one."}
    )
    baseline: bool = field(
        default=False, metadata={"help": "Also train the same model the plain way, in <output_dir>/baseline."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in an output folder that holds an earlier run."}
    )
    num_train_epochs: float = field(default=60, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images a step and device."})
    orders_per_step: int = field(
        default=1,
        metadata={
            "help": "Execution orders over which each step averages, at least 1. The images of a step and device are "
            "divided into as many micro-batches, each in an order of its own. Gradient accumulation multiplies them."
        },
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images a batch of evaluation and device."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or a fraction of them if below 1."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps, or a fraction of them if below 1."})
    eval_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch."})
    eval_steps: float | None = field(default=0.1, metadata={"help": "Steps, or a fraction of them if below 1."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps, or a fraction of them if below 1."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    eval_orders: int = field(default=4, metadata={"help": "Arbitrary orders of the evaluations during training."})
    final_eval_orders: int = field(
        default=16, metadata={"help": "Arbitrary orders of the table at the end; at least 8."}
    )
    do_train: bool = field(
        default=True, metadata={"help": "False: only evaluate the finished run of the output folder again."}
    )
    do_eval: bool = field(default=True, metadata={"help": "False: train without any evaluation."})
    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads of the CPU. On the CPU, models of at most 1 million parameters default to 1. With more "
            "threads the numbers depend on how many there are, and such models gain little. Other models default to "
            "PyTorch's choice."
        },
    )
    # None until `__post_init__` chooses
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Processes that prepare batches ahead. Defaults to 2 with a GPU, to none on the CPU."},
    )
    dataloader_pin_memory: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Pin batches in memory. Defaults to whether there is an accelerator."}
    )

    def __post_init__(self):
        has_accelerator = torch.accelerator.is_available() and not self.use_cpu
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if has_accelerator else 0
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = has_accelerator
        self._check_values()
        if self.per_device_train_batch_size % self.orders_per_step:
            raise ValueError(
                f"`orders_per_step` is {self.orders_per_step}; it must divide `per_device_train_batch_size`, which is "
                f"{self.per_device_train_batch_size}."
            )
        self.per_device_train_batch_size //= self.orders_per_step
        self.gradient_accumulation_steps *= self.orders_per_step
        if not self.do_eval:
            self.eval_strategy = "no"  # transformers would turn `do_eval` on again
        self.has_default_output_dir = self.output_dir is None
        sends_ahead = self.dataloader_pin_memory and self.accelerator_config is None
        super().__post_init__()
        if sends_ahead:  # pinned batches need no wait for the device
            cast(Any, self.accelerator_config).non_blocking = True
        for name in set(self.report_to or ()) - set(get_available_reporting_integrations()):
            raise ValueError(
                f"`report_to` is '{name}', which is not installed or not known; install it (pip install tensorboard, "
                "trackio or wandb), or use --report_to none."
            )
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
        if num_processes > 1 and self.world_size == 1:
            raise ValueError(
                f"The {num_processes} processes were started for GPUs, of which there are none, and each would train "
                "alone. Launch with --config_file examples/accelerate/ddp_cpu.yaml, and add --use_cpu."
            )

    @property
    def folder(self) -> Path:
        """The output folder, which is chosen by then."""
        if self.output_dir is None:
            raise ValueError("`output_dir` is not chosen yet.")
        return Path(self.output_dir)

    def _check_values(self) -> None:
        for name, (lowest, _) in LIMITS.items():
            value = getattr(self, name, None)
            if value is not None and not lowest <= value < float("inf"):
                raise ValueError(f"`{name}` is {value}; it must be at least {lowest}, and finite.")
        for name, (value, reason) in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be {value}: {reason}.")
        if self.optim.startswith("schedule_free") and self.lr_scheduler_type != "constant":
            schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
            raise ValueError(
                f"`lr_scheduler_type` is '{schedule}', and `optim` is '{self.optim}', which needs no schedule and "
                "warms up by itself; add --lr_scheduler_type constant."
            )
        metrics = ("accuracy", *(ARBITRARY_METRICS if self.eval_orders else ()))
        metrics = ("loss", *(() if self.prediction_loss_only else metrics))
        best = (self.metric_for_best_model or "").removeprefix("eval_")
        if best and best not in (*metrics, HALF_BUDGET_ACCURACY):  # of the last, whether it is measured shows later
            raise ValueError(
                f"`metric_for_best_model` is '{self.metric_for_best_model}'; it must be one of {', '.join(metrics)}."
            )
