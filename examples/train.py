"""Trains a LayerShuffle ViT or DeiT image classifier with the Trainer and Accelerate.

    python examples/train.py                                  # scikit-learn's digits, about two minutes on 2 cores
    python examples/train.py --baseline                       # and the same ViT trained the plain way, beside it
    python examples/train.py --dataset_name path/to/folder    # Parquet, one folder a class, IDX, or a Hub id
    python examples/train.py --model_name_or_path google/vit-base-patch16-224 --dataset_name cifar10 \
        --ignore_mismatched_sizes                             # fine-tunes
    python examples/train.py --teacher_model_name_or_path path/to/plain-vit   # also learns from its answers
    python examples/train.py arguments.yaml                   # or .json: from a file; arguments after it win
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train.py
    python examples/train.py --torch_compile                  # layer by layer: five graphs for all orders

Prints, at the end, a table of the accuracy in sequential order and over arbitrary orders, and writes to `--output_dir`:
the model, the image processor and the code, a model card, and all metrics in `all_results.json`. Run the same command
again to go on with a run that was stopped.
"""

import copy
import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedConfig,
    ViTImageProcessor,
    set_seed,
)
from transformers.hf_argparser import string_to_bool
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import get_last_checkpoint

import hf_layershuffle as ls
from hf_layershuffle.common.files import remove_leftovers, write_text
from hf_layershuffle.common.paths import public_name
from hf_layershuffle.common.yaml_files import read_mapping
from hf_layershuffle.data import ImageClassificationDataset, load_image_datasets, load_image_processor
from hf_layershuffle.execution_order import EXECUTION_ORDERS
from hf_layershuffle.folder_records import read_json, record_baseline
from hf_layershuffle.layerwise import weights_digest
from hf_layershuffle.merge_sources import is_local
from hf_layershuffle.model_card import write_model_card
from hf_layershuffle.training.argument_checks import check_kinds, check_numbers
from hf_layershuffle.training.distillation import check_teacher


logger = logging.getLogger("train")
ARCHITECTURES = {
    "vit": (ls.LayerShuffleViTConfig, ls.LayerShuffleViTForImageClassification),
    "deit": (ls.LayerShuffleDeiTConfig, ls.LayerShuffleDeiTForImageClassification),
}
# Each measured on a part held out of the training images: docs/results.md
PRESETS = {"order-free": ("--shuffle_mode", "arbitrary", "--orders_per_step", "4", "--residual_init_scale", "0")}
LAYERSHUFFLE_FLAGS = (
    "shuffle_mode",
    "shuffle_window",
    "depth_embedding",
    "depth_embedding_dim",
    "position_predictor",
    "position_loss_weight",
    "layerdrop",
    "execution_order",
)
COMPARED_SIZES = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "intermediate_size")
COMPARED_SIZES += ("num_attention_heads", "hidden_dropout_prob", "initializer_range")
COMPARED_SIZES += ("residual_init_scale",)
NORMALIZATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")  # of an image processor
ARBITRARY_METRICS = ("arbitrary_accuracy", "arbitrary_accuracy_std", "arbitrary_accuracy_min")
# Of the training arguments, checked before a folder is made
LOWEST = {"final_eval_orders": 8, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
LOWEST |= {"gradient_accumulation_steps": 1, "seed": 0, "orders_per_step": 1}
LOWEST |= dict.fromkeys(("num_train_epochs", "learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"), 0)
LOWEST |= dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_num_workers"), 0)
# The other arguments that decide the weights are recorded in the output folder when a run starts
RUN_FILE = ".train_run.json"  # hidden, and so not published
RECORDED_ARGUMENTS = {
    "model": ("model_name_or_path", "model_revision", "teacher_model_name_or_path", "teacher_model_revision"),
    "data": (
        *(
            "dataset_name",
            "dataset_config_name",
            "image_column_name",
            "label_column_name",
            "train_split",
            "eval_split",
        ),
        *("eval_fraction", "max_train_samples", "crop_padding", "horizontal_flip"),
    ),
    "training": (
        *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
        *("data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
        *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
        *("label_smoothing_factor", "distillation_weight", "distillation_temperature"),
        *("bf16", "fp16", "load_best_model_at_end", "metric_for_best_model"),
    ),
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
        default=None, metadata={"help": "ViT, DeiT or LayerShuffle checkpoint to fine-tune: a folder or a Hub id."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub checkpoint."})
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Trained image classifier of any architecture with the same classes and image size, a folder or a Hub id: "
            "the model also learns from its answers, and from scratch sees pixels normalised as it does. See "
            "--distillation_weight and --distillation_temperature."
        },
    )
    teacher_model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub teacher."})
    token: str | None = field(default=None, metadata={"help": "Token for the Hub; defaults to the logged-in one."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start tensors of another shape anew, as the classifier for other classes."}
    )
    shuffle_mode: str | None = field(
        default=None, metadata={"help": "Training order: none, arbitrary or window. Defaults to arbitrary."}
    )
    shuffle_window: int | None = field(
        default=None, metadata={"help": "For window: positions by which a layer may move, at least 1."}
    )
    depth_embedding: bool | None = field(default=None, metadata={"help": "Tell each layer the position it runs at."})
    depth_embedding_dim: int | None = field(default=None, metadata={"help": "Size of the depth vector (32)."})
    position_predictor: bool | None = field(
        default=None, metadata={"help": "Let each layer predict the position it ran at."}
    )
    position_loss_weight: float | None = field(default=None, metadata={"help": "Weight of the position loss (1.0)."})
    layerdrop: float | None = field(
        default=None, metadata={"help": "Probability in [0, 1) of leaving a layer out in training (0.0)."}
    )
    execution_order: str | None = field(
        default=None,
        metadata={"help": "Evaluation order: sequential, arbitrary, or layer indices such as 2,0,1 (sequential)."},
    )
    architecture: str = field(default="vit", metadata={"help": "From scratch: vit or deit."})
    hidden_size: int = field(default=64, metadata={"help": "From scratch: width."})
    num_hidden_layers: int = field(default=6, metadata={"help": "From scratch: depth."})
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "From scratch: heads. Defaults to one for each 32 of the width."}
    )
    intermediate_size: int | None = field(
        default=None, metadata={"help": "From scratch: width of the MLP. Defaults to 4 times the width."}
    )
    initializer_range: float | None = field(
        default=None,
        metadata={
            "help": "From scratch: standard deviation of the initial weights, above 0. Defaults to 0.02; with --preset "
            "order-free to 0.55 / sqrt(hidden_size), which is 0.02 at a width of 768."
        },
    )
    residual_init_scale: float = field(
        default=1.0,
        metadata={
            "help": "From scratch: factor of the initial output weights of attention and MLP; 0: layers begin by adding nothing."
        },
    )
    hidden_dropout_prob: float = field(default=0.0, metadata={"help": "From scratch: dropout, fraction in [0, 1]."})
    image_size: int | None = field(
        default=None, metadata={"help": "From scratch: pixels. Defaults to the dataset's, at most 224."}
    )
    patch_size: int | None = field(
        default=None,
        metadata={"help": "From scratch: pixels. Defaults to an eighth to a quarter of the image, at most 16."},
    )
    num_channels: int = field(default=3, metadata={"help": "From scratch: 3 to read all images as RGB, 1 as grey."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})


@dataclass
class DataArguments:
    dataset_name: str = field(
        default="digits",
        metadata={"help": "digits, a folder (Parquet, one folder a class, IDX, save_to_disk) or a Hub dataset id."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    image_column_name: str | None = field(default=None, metadata={"help": "Defaults to the one found."})
    label_column_name: str | None = field(default=None, metadata={"help": "Defaults to the one found."})
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
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many, drawn by seed."})
    crop_padding: int | None = field(
        default=None,
        metadata={
            "help": "Pixels around the image before the random crop. Defaults to an eighth of it, to none below "
            "16 pixels."
        },
    )
    horizontal_flip: bool | None = field(
        default=None,
        metadata={
            "help": "Mirror half of the images. Defaults to True for colour and False for grey images, which are "
            "often characters."
        },
    )
    max_cached_gib: float = field(
        default=16.0,
        metadata={
            "help": "Decoded images are kept in a file beside the dataset's own cache if they take no more GiB than this; "
            "0 decodes them whenever they are read."
        },
    )


@dataclass
class TrainingArguments(ls.LayerShuffleTrainingArguments):
    """transformers' arguments, with other defaults: sized for the digits, ten evaluations and checkpoints a run."""

    output_dir: str | None = field(default=None, metadata={"help": "Defaults to outputs/<dataset>-<method>."})
    baseline: bool = field(
        default=False, metadata={"help": "Also train the same model the plain way, in <output_dir>/baseline."}
    )
    final_eval_orders: int = field(
        default=16, metadata={"help": "Arbitrary orders of the table at the end; at least 8."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start anew in an output folder that holds an earlier run."}
    )
    num_train_epochs: float = field(default=60, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images a step and device."})
    orders_per_step: int = field(
        default=1,
        metadata={
            "help": "Execution orders over which each step averages, at least 1: the images of a step and device are divided "
            "into so many micro-batches, each in an order of its own. Gradient accumulation multiplies them."
        },
    )
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images a batch of evaluation and device."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW."})
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that prepare batches ahead. Defaults to 2 with a GPU, to none on the CPU."},
    )
    dataloader_pin_memory: bool | None = field(
        default=None, metadata={"help": "Pin batches in memory. Defaults to whether there is an accelerator."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or a fraction of them if below 1."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps, or a fraction of them if below 1."})
    eval_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch."})
    eval_steps: float | None = field(default=0.1, metadata={"help": "Steps, or a fraction of them if below 1."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps, or a fraction of them if below 1."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    eval_orders: int = field(default=4, metadata={"help": "Arbitrary orders of the evaluations during training."})

    def __post_init__(self):
        has_accelerator = torch.accelerator.is_available() and not self.use_cpu
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if has_accelerator else 0
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = has_accelerator
        for name, lowest in LOWEST.items():
            if not getattr(self, name) >= lowest:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {lowest}.")
        if self.per_device_train_batch_size % self.orders_per_step:
            raise ValueError(
                f"`orders_per_step` is {self.orders_per_step}; it must divide `per_device_train_batch_size`, which is "
                f"{self.per_device_train_batch_size}."
            )
        self.per_device_train_batch_size //= self.orders_per_step
        self.gradient_accumulation_steps *= self.orders_per_step
        metrics = ("loss", "accuracy", *(ARBITRARY_METRICS if self.eval_orders else ()))
        if self.metric_for_best_model and self.metric_for_best_model.removeprefix("eval_") not in metrics:
            raise ValueError(
                f"`metric_for_best_model` is '{self.metric_for_best_model}'; it must be one of {', '.join(metrics)}."
            )
        self.has_default_output_dir = self.output_dir is None
        super().__post_init__()
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
        if num_processes > 1 and self.world_size == 1:
            raise ValueError(
                f"The {num_processes} processes were started for GPUs, of which there are none, and each would train alone. "
                "Launch with --config_file examples/accelerate/ddp_cpu.yaml, and add --use_cpu after train.py."
            )


class ArgumentParser(HfArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.type is string_to_bool:  # `--flag` for `--flag True`, also where the default is None
                action.nargs, action.const = "?", True

    def error(self, message):
        """One line instead of the usage of two hundred arguments."""
        raise ValueError(f"{message} (--help lists all arguments)")


def parse_arguments(argv: list[str]):
    if argv and not argv[0].startswith("-") and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = [*read_argument_file(Path(argv[0])), *argv[1:]]  # of two values of one argument, the later counts
    parser = ArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    for name in ("model_name_or_path", "teacher_model_name_or_path"):
        check_folder(name, getattr(model_args, name))
    for name in ("distillation_weight", "distillation_temperature"):
        if model_args.teacher_model_name_or_path is None and getattr(args, name) != getattr(TrainingArguments, name):
            raise ValueError(f"`{name}` is {getattr(args, name)} without a teacher; add --teacher_model_name_or_path.")
    if model_args.preset is None:
        return model_args, data_args, args
    if model_args.preset not in PRESETS:
        raise ValueError(f"`preset` is '{model_args.preset}'; choose from {', '.join(PRESETS)}.")
    model_args, data_args, args = parser.parse_args_into_dataclasses([*PRESETS[model_args.preset], *argv])
    if model_args.initializer_range is None:
        model_args.initializer_range = round(0.55 / max(model_args.hidden_size, 1) ** 0.5, 4)
    return model_args, data_args, args


def read_argument_file(path: Path) -> list[str]:
    """The arguments of a JSON or YAML mapping, as on the command line, so that both are checked and converted alike."""
    values = read_mapping(path, "one mapping from arguments to values")
    check_kinds(values, (ModelArguments, DataArguments, TrainingArguments), f"'{path}'")
    argv = []
    for name, value in values.items():
        if isinstance(value, list):
            value = ",".join(map(str, value)) if name == "execution_order" else value
        items = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [] if value is None else [f"--{name}", *map(str, items)]
    return argv


def layershuffle_flags(args: ModelArguments) -> dict:
    """The flags that were given, and `shuffle_mode`, which is on by default."""
    flags = {name: getattr(args, name) for name in LAYERSHUFFLE_FLAGS if getattr(args, name) is not None}
    order = flags.get("execution_order")
    if order is not None and order not in EXECUTION_ORDERS:
        try:
            flags["execution_order"] = [int(index) for index in order.split(",")]
        except ValueError:
            raise ValueError(
                f"`execution_order` is '{order}'; it must be sequential, arbitrary or layer indices such as 2,0,1."
            ) from None
    return flags


def build_model(
    args: ModelArguments, flags: dict, class_names: list[str], image_size: tuple[int, int], normalization: dict
):
    """The model and its image processor: from a checkpoint, or small and from scratch, then with this `normalization`, if any."""
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "problem_type": "single_label_classification",  # transformers would set it at the first loss only
    }
    implementation = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    if args.model_name_or_path is None:
        config_class, model_class = choose_architecture(args.architecture)
        sizes = scratch_sizes(args, image_size)
        config = config_class.from_dict({"shuffle_mode": "arbitrary", **labels, **sizes}, **flags)
        model = model_class._from_config(config, **implementation)
        size = {"height": config.image_size, "width": config.image_size}
        mean_std = {"image_mean": [0.5] * args.num_channels, "image_std": [0.5] * args.num_channels}
        return model, ViTImageProcessor(size=size, **(normalization or mean_std))

    hub = {"revision": args.model_revision, "token": args.token}
    stored, _ = PreTrainedConfig.get_config_dict(args.model_name_or_path, **hub)
    model_type = str(stored.get("model_type"))
    _, model_class = choose_architecture(model_type.removeprefix("layershuffle_"), args.model_name_or_path)
    if not model_type.startswith("layershuffle_"):
        flags = {"shuffle_mode": "arbitrary"} | flags
    model = model_class.from_pretrained(
        args.model_name_or_path,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        **flags,
        **labels,
        **implementation,
        **hub,
    )
    return model, load_image_processor(args.model_name_or_path, **hub)


def load_teacher(args: ModelArguments):
    """The teacher, and how its image processor normalises pixels; None and an empty dictionary without one."""
    name = args.teacher_model_name_or_path
    if name is None:
        return None, {}
    hub = {"revision": args.teacher_model_revision, "token": args.token}
    model_type = AutoConfig.from_pretrained(name, **hub).model_type
    is_vit = model_type.removeprefix("layershuffle_") in ARCHITECTURES
    if not is_vit and model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(f"The teacher '{name}' is a model of type '{model_type}', which is no image classifier.")
    implementation = {"attn_implementation": args.attn_implementation} if args.attn_implementation and is_vit else {}
    teacher, loading = AutoModelForImageClassification.from_pretrained(
        name, **hub, **implementation, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise ValueError(
            f"The teacher '{name}' holds no {', '.join(sorted(loading['missing_keys'])[:2])}; only a trained classifier can teach."
        )
    processor = load_image_processor(name, **hub)
    return teacher, {key: getattr(processor, key) for key in NORMALIZATION if hasattr(processor, key)}


def check_same_pixels(image_processor, normalization: dict, args: ModelArguments) -> None:
    """Raises a `ValueError` unless a checkpoint to fine-tune sees pixels normalised as its teacher does."""
    for name, expected in normalization.items():
        value, expected = json.dumps(getattr(image_processor, name, None)), json.dumps(expected)
        if value != expected:
            raise ValueError(
                f"`{name}` of the image processor is {expected} in '{args.teacher_model_name_or_path}' and {value} in "
                f"'{args.model_name_or_path}'; both models see the same images, so choose a teacher with the same."
            )


def check_folder(name: str, value: str | None) -> None:
    """Raises a `ValueError` for what can only be a folder, but is none, before it is looked for on the Hub."""
    if value is not None and (is_local(value) or Path(value).is_file()) and not Path(value).is_dir():
        raise ValueError(f"`{name}` is '{value}', where there is no folder; give a model's folder or a Hub id.")


def choose_architecture(name: str, origin: str | None = None):
    if name not in ARCHITECTURES:
        where = f"'{origin}' holds a model of type '{name}'" if origin else f"`architecture` is '{name}'"
        raise ValueError(f"{where}; it must be one of {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name]


def scratch_sizes(args: ModelArguments, image_size: tuple[int, int]) -> dict:
    size = args.image_size or min(*image_size, 224)
    # 8 -> 2, 28 -> 7, 32 -> 4, 224 -> 16
    patch = args.patch_size or next((min(size // n, 16) for n in (8, 4, 7, 1) if size % n == 0 and size // n >= 2), 0)
    heads = args.num_attention_heads or max(1, args.hidden_size // 32)
    for name, value in (
        ("image_size", size),
        ("hidden_size", args.hidden_size),
        ("num_hidden_layers", args.num_hidden_layers),
    ):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    if args.initializer_range is not None and not 0 < args.initializer_range < float("inf"):
        raise ValueError(f"`initializer_range` is {args.initializer_range}; it must be a finite number above 0.")
    if patch < 1 or size % patch:
        raise ValueError(f"`patch_size` is {patch}; it must divide the image size {size}.")
    if heads < 1 or args.hidden_size % heads:
        raise ValueError(f"`num_attention_heads` is {heads}; it must divide the width {args.hidden_size}.")
    return {
        "image_size": size,
        "patch_size": patch,
        "num_channels": args.num_channels,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": heads,
        "intermediate_size": args.intermediate_size or 4 * args.hidden_size,
        "hidden_dropout_prob": args.hidden_dropout_prob,
        "initializer_range": args.initializer_range or 0.02,
        "residual_init_scale": args.residual_init_scale,
    }


def build_datasets(args: DataArguments, splits, model, image_processor, seed: int):
    """Training images, augmented, and evaluation images, as they are."""
    config = model.config
    if config.num_labels != splits["train"].features["label"].num_classes:
        raise ValueError(
            f"The model has {config.num_labels} classes and dataset '{args.dataset_name}' has "
            f"{splits['train'].features['label'].num_classes}; add --ignore_mismatched_sizes to start a new classifier."
        )
    for name, limit in (("train", args.max_train_samples), ("test", args.max_eval_samples)):
        if limit is not None:
            if limit < 1:
                raise ValueError(f"The number of {name} samples is {limit}; it must be at least 1.")
            splits[name] = splits[name].shuffle(seed=seed).select(range(min(limit, len(splits[name]))))
    size = config.image_size if isinstance(config.image_size, int) else min(config.image_size)
    padding = (size // 8 if size >= 16 else 0) if args.crop_padding is None else args.crop_padding
    is_colour = np.asarray(splits["train"][0]["image"]).ndim == 3
    flip = is_colour if args.horizontal_flip is None else args.horizontal_flip
    augmentation = {"augment": True, "crop_padding": padding, "horizontal_flip": flip, "seed": seed}
    if args.max_cached_gib < 0:
        raise ValueError(f"`max_cached_gib` is {args.max_cached_gib}; it must be at least 0.")
    common = {
        "image_processor": image_processor,
        "num_channels": config.num_channels,
        "max_cached_bytes": int(args.max_cached_gib * 2**30),
    }
    return (
        ImageClassificationDataset(splits["train"], **common, **augmentation, description="Decoding training images"),
        ImageClassificationDataset(splits["test"], **common, description="Decoding evaluation images"),
    )


def method_name(config) -> str:
    """Such as layershuffle-depth, for the default output folder and the table."""
    parts = {"none": "plain", "arbitrary": "layershuffle", "window": f"window{config.shuffle_window}"}[
        config.shuffle_mode
    ]
    names = [parts] if parts != "plain" or not config.layerdrop else []
    names += ["layerdrop"] if config.layerdrop else []
    names += ["depth"] if config.depth_embedding else []
    names += ["predict"] if config.position_predictor else []
    return "-".join(names)


def recorded_arguments(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, teacher=None
) -> dict:
    """The arguments besides the model's configuration that decide the weights, as in `RUN_FILE`; folders by name, and the
    teacher, whose folder's name says little, also by a digest of its weights."""
    given = {"model": vars(model_args), "data": vars(data_args), "training": args.to_dict()}
    values = {name: given[kind][name] for kind, names in RECORDED_ARGUMENTS.items() for name in names}
    for name in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name"):
        values[name] = public_name(values[name])
    if teacher is None:
        values["teacher_model_name_or_path"] = None
    values["teacher_weights"] = None if teacher is None else weights_digest(teacher)
    return json.loads(json.dumps(values))


def find_checkpoint(args: TrainingArguments, config, arguments: dict) -> str | None:
    """The checkpoint to go on from: the one given, or the last one of the same run in the output folder.

    Raises `ValueError` if the folder holds something else, so that no other model or file is lost or mixed in, and if the
    earlier run had other `arguments` (as from [`recorded_arguments`]), so that what is recorded of it stays true.
    """
    folder = Path(args.output_dir)
    requested = args.resume_from_checkpoint
    if requested not in (None, True, "True", "true") and not Path(requested).is_dir():
        raise ValueError(f"There is no checkpoint folder '{requested}' to resume from.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output folder '{folder}' is a file; choose another --output_dir.")
    if requested not in (None, True, "True", "true"):
        refuse_another_run(Path(requested).parent, read_json(Path(requested).parent / RUN_FILE) or {}, arguments)
        return requested
    remove_leftovers(folder)
    if not folder.is_dir() or not any(folder.iterdir()) or args.overwrite_output_dir:
        if requested:
            raise ValueError(f"There is no checkpoint in '{folder}' to resume from.")
        return None
    checkpoint, recorded = get_last_checkpoint(str(folder)), read_json(folder / RUN_FILE)
    # A run that was stopped before its first checkpoint starts anew
    if checkpoint is None and (requested or recorded is None or (folder / "config.json").exists()):
        raise ValueError(
            f"The output folder '{folder}' is not empty and holds no checkpoint of an earlier run; choose another "
            "--output_dir, or add --overwrite_output_dir to write into it all the same."
        )
    if checkpoint is not None:
        names = (*LAYERSHUFFLE_FLAGS, "model_type", "id2label", *COMPARED_SIZES)
        stored, ours = read_json(Path(checkpoint, "config.json")) or {}, json.loads(config.to_json_string())
        refuse_another_run(folder, {name: stored.get(name) for name in names}, ours)
    refuse_another_run(folder, recorded or {}, arguments)
    return checkpoint


def refuse_another_run(folder: Path, stored: dict, ours: dict) -> None:
    for name, value in stored.items():
        if value != ours.get(name):
            raise ValueError(
                f"The output folder '{folder}' holds a run with `{name}` {value!r}, and this one has "
                f"{ours.get(name)!r}; choose another --output_dir, or add --overwrite_output_dir to start anew."
            )


def train_and_evaluate(
    args: TrainingArguments,
    arguments: dict,
    checkpoint: str | None,
    model,
    teacher,
    image_processor,
    train_dataset,
    eval_dataset,
):
    """Trains, saves the model, its card and its metrics into the output folder, and returns the metrics.

    `arguments` are those of [`recorded_arguments`], `checkpoint` is the folder to go on from.
    """
    is_finished = checkpoint is not None and is_finished_run(Path(args.output_dir), checkpoint)
    if is_finished:
        logger.warning(
            "Already trained, so only evaluated: %s; add --overwrite_output_dir to start anew.", args.output_dir
        )
    elif checkpoint is not None:
        logger.warning("Going on from %s; add --overwrite_output_dir to start anew.", checkpoint)
    elif args.overwrite_output_dir and args.should_save:
        for earlier in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(earlier)
    if args.should_save:
        write_text(Path(args.output_dir, RUN_FILE), json.dumps(arguments, indent=1) + "\n")
    if is_finished:
        model = type(model).from_pretrained(args.output_dir)  # the Trainer would train one more step
    trainer = ls.LayerShuffleTrainer(
        model=model,
        teacher_model=teacher,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=image_processor,
        compute_metrics=ls.compute_metrics,
    )
    if not is_finished:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(_internal_call=True)  # which does not push: that waits for the evaluation and the card
        trainer.save_state()
        trainer.save_metrics("train", result.metrics | {"train_samples": len(train_dataset)})
    args.eval_orders = args.final_eval_orders
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    card_metrics = metrics | {"num_orders": args.final_eval_orders}
    card = {"dataset": arguments["dataset_name"], "finetuned_from": arguments["model_name_or_path"]}
    card["metrics"] = card_metrics
    try:
        if args.push_to_hub:
            trainer.push_to_hub(**card)
        else:
            trainer.create_model_card(**card)
    except Exception as error:  # whatever is wrong with the card or the Hub, the trained model is saved
        logger.warning("The model is saved in '%s', but not its card: %s", args.output_dir, error)
    return metrics


def is_finished_run(folder: Path, checkpoint: str) -> bool:
    """Whether the run of `folder` trained to its end, which `checkpoint` is, and saved the model."""
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    has_model = (folder / "config.json").exists() and (folder / "train_results.json").exists()
    return has_model and Path(checkpoint).parent == folder and state.global_step >= state.max_steps


def print_table(rows: dict[str, dict]) -> None:
    table = Table(title="Fraction of the evaluation images classified correctly")
    table.add_column("model", overflow="fold")
    for name in ("sequential", "arbitrary: mean", "std", "min", "orders"):
        table.add_column(name, justify="right")
    for name, (metrics, num_orders) in rows.items():
        values = [metrics[f"eval_{key}"] for key in ("accuracy", *ARBITRARY_METRICS)]
        table.add_row(name, *(f"{value:.4f}" for value in values), str(num_orders))
    Console().print(table)


def run(argv: list[str]) -> None:
    model_args, data_args, args = parse_arguments(argv)
    check_numbers(model_args, data_args, args)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    transformers.logging.set_verbosity(max(args.get_process_log_level(), transformers.logging.WARNING))
    set_seed(args.seed)
    splits = load_image_datasets(
        data_args.dataset_name,
        data_args.dataset_config_name,
        image_column=data_args.image_column_name,
        label_column=data_args.label_column_name,
        train_split=data_args.train_split,
        eval_split=data_args.eval_split,
        eval_fraction=data_args.eval_fraction,
    )
    first = np.asarray(splits["train"][0]["image"])
    sizes = (splits["train"].features["label"].names, first.shape[:2])
    flags = layershuffle_flags(model_args)
    teacher, normalization = load_teacher(model_args)
    variants = [(flags, args, teacher)]
    if args.baseline:
        plain = {"shuffle_mode": "none", "layerdrop": 0.0, "depth_embedding": False, "position_predictor": False}
        baseline_args = copy.copy(args)
        baseline_args.push_to_hub = False
        variants.append((plain, baseline_args, None))

    models = []
    for variant_flags, variant_args, variant_teacher in variants:
        set_seed(args.seed)  # the same initial weights for the baseline
        model, image_processor = build_model(model_args, variant_flags, *sizes, normalization)
        name = method_name(model.config) + ("-distilled" if variant_teacher is not None else "")
        if args.has_default_output_dir:
            args.output_dir = f"outputs/{Path(data_args.dataset_name).name}-{name}"
            args.has_default_output_dir = False
        if variant_args is not args:
            variant_args.output_dir = str(Path(args.output_dir, "baseline"))
        if variant_teacher is not None:
            check_teacher(variant_teacher, model)
            check_same_pixels(image_processor, normalization, model_args)
        if teacher is not None and Path(variant_args.output_dir).resolve() == Path(teacher.name_or_path).resolve():
            raise ValueError(
                f"The output folder '{variant_args.output_dir}' is the teacher's; choose another --output_dir."
            )
        arguments = recorded_arguments(model_args, data_args, variant_args, variant_teacher)
        # Refuses what it must before the images are decoded, and on all processes before one of them writes
        checkpoint = find_checkpoint(variant_args, model.config, arguments)
        models.append((name, model, variant_teacher, variant_args, arguments, checkpoint))
    with args.main_process_first(desc="decoding images"):  # the others then read its file
        train_dataset, eval_dataset = build_datasets(data_args, splits, models[0][1], image_processor, args.seed)

    rows = {}
    for name, model, variant_teacher, variant_args, arguments, checkpoint in models:
        metrics = train_and_evaluate(
            variant_args, arguments, checkpoint, model, variant_teacher, image_processor, train_dataset, eval_dataset
        )
        rows[name] = (metrics, variant_args.final_eval_orders)
    if args.baseline and args.should_save:
        baseline, num_orders = list(rows.values())[-1]
        record_baseline(args.output_dir, "baseline: trained the plain way", baseline | {"num_orders": num_orders})
        write_model_card(args.output_dir, repo_id=args.hub_model_id)
    if args.should_log:
        print_table(rows)
        print(f"Saved to {args.output_dir}")


def main() -> None:
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt:
        print("\ntrain.py: stopped; run the same command again to go on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:  # ImportError: an argument needs a package
        logger.debug("", exc_info=True)
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
