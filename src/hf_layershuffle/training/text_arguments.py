# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `hf-layershuffle train --task text-classification` and examples/train_text.py."""

from dataclasses import dataclass, field
from typing import Any

from .recipes import PRESETS
from .script_arguments import DataArguments, ModelArguments, ScriptTrainingArguments


# A model from scratch is sized for a few thousand passages
TEXT_SCRATCH_DEFAULTS: dict[str, Any] = {
    "architecture": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "residual_init_scale": 1.0,
}
VOCAB_SIZE = 4000
MAX_LENGTH = 128


def _not_of_texts(default: Any = None) -> Any:
    """A field of images, which is no option here."""
    return field(init=False, default=default)


@dataclass
class TextModelArguments(ModelArguments):
    """Those of images, without their sizes, and those of texts."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Values for arguments that are not given. order-free: "
            + " ".join(PRESETS["order-free"])
            + ", and see --initializer_range."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to fine-tune, with its tokenizer, such as BERT's: a folder or a Hub id."},
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Trained text classifier of any architecture with the same classes: a folder or a Hub id. The "
            "model also learns from its answers. A model from scratch gets its tokenizer, and a checkpoint must have "
            "the same. See --distillation_weight and --distillation_temperature."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a tokenizer or a teacher brings, if you trust it."}
    )
    hidden_dropout_prob: float | None = field(
        default=None, metadata={"help": "Dropout, fraction in [0, 1]. Defaults to the checkpoint's, or to 0.1."}
    )
    architecture: str | None = field(
        default=None,
        metadata={"help": "From scratch: bert, roberta, distilbert, electra, modernbert, ... (bert)."},
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": f"From scratch: tokens of the tokenizer that is trained ({VOCAB_SIZE})."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a text at most; longer texts are cut off. Defaults to the checkpoint's, or to "
            f"{MAX_LENGTH}."
        },
    )
    image_size: int | None = _not_of_texts()
    patch_size: int | None = _not_of_texts()
    num_channels: int | None = _not_of_texts()


@dataclass
class TextDataArguments(DataArguments):
    """Those of images, without what concerns pixels, and the columns of texts."""

    dataset_name: str = field(
        default="python-docs",
        metadata={
            "help": "python-docs, a CSV, JSON or Parquet file, a folder of them or of save_to_disk, or a Hub dataset "
            "id."
        },
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": "Column of texts. Defaults to the one found."}
    )
    text_pair_column_name: str | None = field(
        default=None, metadata={"help": "Column of second texts, of pairs. Defaults to the one found, if any."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many texts, drawn by seed."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on this many texts, drawn by seed."}
    )
    skip_damaged: bool = field(
        default=False, metadata={"help": "Leave out rows without a text, instead of stopping at them."}
    )
    image_column_name: str | None = _not_of_texts()
    augmentation: str = _not_of_texts("none")
    crop_padding: int | None = _not_of_texts()
    horizontal_flip: bool | None = _not_of_texts()
    resized_crop_scale: list[float] | None = field(init=False, default=None)
    augmentation_policy: str | None = _not_of_texts()
    augmentation_operations: int | None = _not_of_texts()
    augmentation_magnitude: float | None = _not_of_texts()
    random_erasing: float | None = _not_of_texts()
    mixup_alpha: float | None = _not_of_texts()
    cutmix_alpha: float | None = _not_of_texts()
    mixing_probability: float | None = _not_of_texts()
    max_cached_gib: float = _not_of_texts(16.0)
    streaming: bool = _not_of_texts(False)
    num_train_samples: int | None = _not_of_texts()
    shuffle_buffer_size: int = _not_of_texts(1000)


@dataclass
class TextTrainingArguments(ScriptTrainingArguments):
    """Those of images, sized for a few thousand passages."""

    num_train_epochs: float = field(default=10, metadata={"help": "Passes over the training texts."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts a step and device."})
    orders_per_step: int = field(
        default=1,
        metadata={
            "help": "Execution orders over which each step averages, at least 1. The texts of a step and device are "
            "divided into as many micro-batches, each in an order of its own. Gradient accumulation multiplies them."
        },
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Texts a batch of evaluation and device."})
