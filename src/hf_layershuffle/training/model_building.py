# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The model and the teacher that the arguments of a run describe."""

import json
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import is_torchvision_available, logging

from ..checkpoints.checks import check_complete, check_finite, check_model_files, explained_reading
from ..checkpoints.identity import weights_digest
from ..checkpoints.image_processors import load_image_processor
from ..checkpoints.loading import classes_of
from ..checkpoints.processing_classes import load_processing_class
from ..models.auto_classes import is_free_model_type, plain_type_of
from ..models.execution_order import parse_execution_order
from .recipes import SCRATCH_DEFAULTS
from .script_arguments import ModelArguments


logger = logging.get_logger(__name__)
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
# The flag without which another flag would do nothing
PARTS = {"depth_embedding_dim": "depth_embedding", "position_loss_weight": "position_predictor"}
SCRATCH_ONLY = (
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "initializer_range",
    "residual_init_scale",
)
NORMALIZATION = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")  # of an image processor
# The most that is chosen without being asked for
LARGEST_PATCH = 16  # pixels of a patch
MOST_PATCHES = 32  # patches a side


def layershuffle_flags(args: ModelArguments) -> dict:
    """The flags that were given, by their names in the configuration.

    Raises:
        `ValueError`: if the execution order is neither a name nor indices.
    """
    flags = {name: getattr(args, name) for name in LAYERSHUFFLE_FLAGS if getattr(args, name) is not None}
    if args.execution_order is not None:
        flags["execution_order"] = parse_execution_order(args.execution_order)
    return flags


def build_model(
    args: ModelArguments, flags: dict, class_names: list[str], image_size: tuple[int, int], normalization: dict
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model and its image processor: from a checkpoint, or small and from scratch.

    Args:
        args: The arguments of the run.
        flags: The flags, as from [`layershuffle_flags`].
        class_names: Names of the dataset's classes.
        image_size: Height and width of the dataset's images, in pixels, for a model from scratch.
        normalization: How the teacher normalises pixels, for a model from scratch. It is empty without a teacher.

    Raises:
        `ValueError`: if an argument is not allowed, or does not apply to the checkpoint.
    """
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "problem_type": "single_label_classification",  # transformers would set it at the first loss only
    }
    build = _build_from_scratch if args.model_name_or_path is None else _load_checkpoint
    model, image_processor = build(args, flags, labels, image_size, normalization)
    for name, part in PARTS.items():
        if name in flags and not getattr(model.config, part):
            raise ValueError(f"`{name}` is {flags[name]!r} without `{part}`; add --{part}, or leave it out.")
    return model.to(getattr(torch, args.dtype)), image_processor


def _build_from_scratch(
    args: ModelArguments, flags: dict, labels: dict, image_size: tuple[int, int], normalization: dict
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    name = args.architecture or SCRATCH_DEFAULTS["architecture"]
    _, model_class = classes_of(name, f"`architecture` is '{name}', which")
    config = _config_class_of(model_class).from_dict(
        {"shuffle_mode": "arbitrary", **labels, **scratch_sizes(args, image_size)}, **flags
    )
    model = model_class._from_config(config, **_attention(args))
    channels = config.num_channels
    normalization = normalization or {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    size = {"height": config.image_size, "width": config.image_size}
    return model, _vit_image_processor(size=size, **normalization)


def _config_class_of(model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    return cast(type[PreTrainedConfig], model_class.config_class)


def _vit_image_processor(**kwargs: Any) -> BaseImageProcessor:
    """The image processor of a ViT.

    Where there is no torchvision, transformers would warn at every start that it takes the one without it.
    """
    without = getattr(transformers, "ViTImageProcessorPil", None)
    return (without if without and not is_torchvision_available() else transformers.ViTImageProcessor)(**kwargs)


def stored_config(args: ModelArguments) -> dict:
    """The values of the checkpoint's `config.json`."""
    with explained_reading(f"'{args.model_name_or_path}'"):
        stored, _ = PreTrainedConfig.get_config_dict(
            str(args.model_name_or_path), revision=args.model_revision, token=args.token
        )
        return dict(stored.items())  # JSON of another kind has none


def _load_checkpoint(
    args: ModelArguments, flags: dict, labels: dict, image_size: tuple[int, int], normalization: dict
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    name_or_path = str(args.model_name_or_path)
    hub = {"revision": args.model_revision, "token": args.token}
    what = f"'{name_or_path}'"
    check_model_files(name_or_path)
    stored = stored_config(args)
    model_type = str(stored.get("model_type"))
    _, model_class = classes_of(model_type, what)
    config_class = _config_class_of(model_class)
    with explained_reading(what):
        config = config_class.from_dict({**stored, "model_type": config_class.model_type})
    _refuse_scratch_options(args, config, model_type)
    if not is_free_model_type(model_type):
        flags = {"shuffle_mode": "arbitrary"} | flags
    if args.hidden_dropout_prob is not None:
        flags = {**flags, "hidden_dropout_prob": args.hidden_dropout_prob}
    with explained_reading(what):
        model, found = model_class.from_pretrained(
            name_or_path,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
            dtype="float32",  # what it is stored in is for storing
            **flags,
            **labels,
            **_attention(args),
            **hub,
        )
    # What is missing is refused there, but for a classifier, which may start anew
    check_complete(what, (), found["unexpected_keys"], requested=flags)
    check_finite(what, model.named_parameters())
    return model, load_processing_class(name_or_path, config, trust_remote_code=args.trust_remote_code, **hub)


def checkpoint_class_names(args: ModelArguments) -> list[str] | None:
    """The classes of the checkpoint whose classifier is fine-tuned, in its order.

    None from scratch, for a classifier that starts anew, and where classes have no names of their own.
    """
    if args.model_name_or_path is None or args.ignore_mismatched_sizes:
        return None
    with explained_reading(f"'{args.model_name_or_path}'"):
        labels = stored_config(args).get("id2label") or {}
        names = [str(name) for _, name in sorted(labels.items(), key=lambda item: int(item[0]))]
    return None if not names or all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _attention(args: ModelArguments) -> dict:
    return {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}


def _refuse_scratch_options(args: ModelArguments, config: PreTrainedConfig, model_type: str) -> None:
    """Raises a `ValueError` for an option of a model from scratch whose value is another than the checkpoint's."""
    architecture = plain_type_of(model_type)
    for name in ("architecture", *SCRATCH_ONLY):
        given = getattr(args, name)
        value = architecture if name == "architecture" else getattr(config, name, None)
        same = given == value or (isinstance(value, (list, tuple)) and set(value) == {given})
        if given is not None and not same:
            raise ValueError(
                f"`{name}` is {given!r}, and '{args.model_name_or_path}' has {value!r}, which fine-tuning keeps; "
                f"leave out --{name}, or train from scratch without --model_name_or_path."
            )


def scratch_sizes(args: ModelArguments, image_size: tuple[int, int]) -> dict:
    """The sizes of a model from scratch, as its configuration names them.

    Args:
        args: The arguments of the run. What is None gets its default.
        image_size: Height and width of the dataset's images, in pixels.

    Raises:
        `ValueError`: if sizes do not fit together.
    """
    size, patch = choose_image_size(args, image_size)
    defaults = {name: value for name, value in SCRATCH_DEFAULTS.items() if name != "architecture"}
    given = {name: getattr(args, name) for name in (*defaults, "num_attention_heads", "intermediate_size")}
    sizes: dict[str, Any] = defaults | {name: value for name, value in given.items() if value is not None}
    sizes = {"image_size": size, "patch_size": patch, **sizes}
    sizes.setdefault("num_attention_heads", max(1, sizes["hidden_size"] // 32))
    sizes.setdefault("intermediate_size", 4 * sizes["hidden_size"])
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        if sizes[name] < 1:
            raise ValueError(f"`{name}` is {sizes[name]}; it must be at least 1.")
    if not 0 < sizes["initializer_range"] < float("inf"):
        raise ValueError(f"`initializer_range` is {sizes['initializer_range']}; it must be a finite number above 0.")
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ValueError(
            f"`num_attention_heads` is {sizes['num_attention_heads']}; it must divide the width "
            f"{sizes['hidden_size']}."
        )
    return sizes


def choose_image_size(args: ModelArguments, image_size: tuple[int, int]) -> tuple[int, int]:
    """Pixels of the square image and of a patch.

    What is given is kept. The dataset's size is rounded to a multiple of the patch.

    Raises:
        `ValueError`: if a given size is not positive, or no patch divides a given image size.
    """
    for name in ("image_size", "patch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; it must be at least 1.")
    if args.image_size is not None:
        patch = args.patch_size or _patch_that_divides(args.image_size)
        if args.image_size % patch:
            raise ValueError(f"`patch_size` is {patch}; it must divide the image size {args.image_size}.")
        return args.image_size, patch
    size = min(*image_size, 224)
    patch = args.patch_size or _usual_patch(size) or min(-(-size // 8), LARGEST_PATCH)
    if patch > size:
        raise ValueError(
            f"`patch_size` is {patch}, and the dataset's images have {size} pixels; choose a smaller one, or give an "
            "--image_size that it divides."
        )
    rounded = max(1, round(size / patch)) * patch
    if rounded != size:
        logger.warning(
            "Images of %d pixels become %d, a multiple of the patch of %d; see --image_size and --patch_size.",
            size,
            rounded,
            patch,
        )
    return rounded, patch


def _usual_patch(size: int) -> int | None:
    """An eighth, a quarter or a seventh of the image, at most 16 pixels, if that divides it.

    Such as 8 -> 2, 28 -> 7, 32 -> 4, 224 -> 16.
    """
    patches = (min(size // parts, LARGEST_PATCH) for parts in (8, 4, 7) if size % parts == 0 and size // parts >= 2)
    return next((patch for patch in patches if size % patch == 0), None)


def _patch_that_divides(size: int) -> int:
    """The largest patch that is sensible for images of exactly this size."""
    patches = [_usual_patch(size), *range(min(LARGEST_PATCH, -(-size // 4)), 0, -1)]
    for patch in patches:
        if patch and size % patch == 0 and (size // patch <= MOST_PATCHES or patch == LARGEST_PATCH):
            return patch
    near = size // LARGEST_PATCH * LARGEST_PATCH
    raise ValueError(
        f"`image_size` is {size}, which no patch of at most {LARGEST_PATCH} pixels divides into at most "
        f"{MOST_PATCHES} a side; choose {near} or {near + LARGEST_PATCH}, or give a --patch_size that divides it."
    )


@dataclass
class Teacher:
    """The model to distill from, if there is one.

    Args:
        model: The teacher, in float32.
        normalization: How its image processor normalises pixels.
        weights: Digest of its weights as they are stored.
    """

    model: PreTrainedModel | None = None
    normalization: dict = field(default_factory=dict)
    weights: str | None = None


def load_teacher(args: ModelArguments) -> Teacher:
    """The teacher that the arguments name.

    Raises:
        `ValueError`: if it is no trained image classifier.
    """
    name = args.teacher_model_name_or_path
    if name is None:
        return Teacher()
    hub = {"revision": args.teacher_model_revision, "token": args.token, "trust_remote_code": args.trust_remote_code}
    what = f"The teacher '{name}'"
    check_model_files(name)
    with explained_reading(what):
        model_type = AutoConfig.from_pretrained(name, **hub).model_type
    is_vit = plain_type_of(model_type) in ("vit", "deit")
    is_known = is_vit or model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if not is_known and not args.trust_remote_code:
        raise ValueError(f"{what} is a model of type '{model_type}', which is no image classifier.")
    with explained_reading(what):
        teacher, loading = AutoModelForImageClassification.from_pretrained(
            name, **hub, **(_attention(args) if is_vit else {}), output_loading_info=True, use_safetensors=True
        )
    if loading["missing_keys"]:
        raise ValueError(
            f"{what} holds no {', '.join(sorted(loading['missing_keys'])[:2])}; only a trained classifier can teach."
        )
    check_complete(what, (), loading["unexpected_keys"])
    check_finite(what, teacher.state_dict().items())
    processor = load_image_processor(name, **hub)
    normalization = {key: getattr(processor, key) for key in NORMALIZATION if hasattr(processor, key)}
    digest = weights_digest(teacher)
    return Teacher(teacher.to(torch.float32), normalization, digest)


def check_same_pixels(image_processor: BaseImageProcessor, normalization: dict, args: ModelArguments) -> None:
    """Raises a `ValueError` unless a checkpoint to fine-tune sees pixels normalised as its teacher does."""
    for name, expected in normalization.items():
        value, wanted = json.dumps(getattr(image_processor, name, None)), json.dumps(expected)
        if value != wanted:
            raise ValueError(
                f"`{name}` of the image processor is {wanted} in '{args.teacher_model_name_or_path}' and {value} in "
                f"'{args.model_name_or_path}'; both models see the same images, so choose a teacher with the same."
            )
