# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The model and the teacher that the arguments of a run describe."""

import difflib
import importlib.util
import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_timm_available

from ..checkpoints.checks import check_complete, check_finite, check_model_files, explained_reading
from ..checkpoints.hub_errors import explained_download
from ..checkpoints.identity import weights_digest
from ..checkpoints.image_processors import (
    check_fits,
    load_image_processor,
    new_image_processor,
    resized_image_processor,
)
from ..checkpoints.image_size import as_pair, image_size_of, with_image_size
from ..checkpoints.loading import classes_of
from ..checkpoints.processing_classes import load_processing_class
from ..checkpoints.tokenizers import takes_texts
from ..models.auto_classes import is_free_model_type, plain_class_name, plain_type_of
from ..models.classification_heads import is_own_head
from ..models.configuration_layershuffle import encoder_config, num_channels_of
from ..models.timm_layers import TIMM_MODEL_TYPE
from .model_flags import check_parts
from .model_sizes import TIMM, scratch_values
from .recipes import SCRATCH_DEFAULTS
from .script_arguments import ModelArguments


SCRATCH_ONLY = (
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
    build = _build_from_scratch if args.model_name_or_path is None else _load_checkpoint
    model, image_processor = build(args, flags, class_settings(class_names), image_size, normalization)
    check_parts(flags, model)
    return model.to(getattr(torch, args.dtype)), image_processor


def class_settings(class_names: list[str]) -> dict[str, Any]:
    """What a configuration says of the classes that a model chooses from."""
    return {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "problem_type": "single_label_classification",  # transformers would set it at the first loss only
    }


def _build_from_scratch(
    args: ModelArguments, flags: dict, labels: dict, image_size: tuple[int, int], normalization: dict
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    name = args.architecture or SCRATCH_DEFAULTS["architecture"]
    model_type = TIMM_MODEL_TYPE if name.startswith(TIMM) else name
    if model_type == TIMM_MODEL_TYPE and not is_timm_available():
        missing = " and ".join(each for each in ("timm", "torchvision") if importlib.util.find_spec(each) is None)
        raise ImportError(
            f"`architecture` is '{name}', which needs timm and torchvision, and {missing or 'one of them'} cannot be "
            "imported; install timm, with a torchvision for your torch: pip install timm torchvision"
        )
    _, model_class = classes_of(model_type, f"`architecture` is '{name}', which")
    config_class = _config_class_of(model_class)
    values = scratch_values(config_class, args, image_size)
    if model_type == TIMM_MODEL_TYPE:
        values["num_classes"] = len(labels["id2label"])
    config = config_class.from_dict({"shuffle_mode": "arbitrary", **labels, **values}, **flags)
    model = _make(name, model_class, config, args)
    channels = num_channels_of(model.config) or 3
    size, _ = as_pair(image_size_of(model.config) or 0)
    normalization = normalization or {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    return model, new_image_processor(model_type, size, channels, **normalization)


def _make(
    name: str, model_class: type[PreTrainedModel], config: PreTrainedConfig, args: ModelArguments
) -> PreTrainedModel:
    """The model of a configuration.

    Raises:
        `ValueError`: if timm has no such model, or none of such sizes.
    """
    if not name.startswith(TIMM):
        return model_class._from_config(config, **attention_settings(args))
    import timm

    architecture = name.removeprefix(TIMM)
    if not timm.is_model(architecture.partition(".")[0]):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "see `timm.list_models()`."
        raise ValueError(f"`architecture` is '{name}', and timm {timm.__version__} has no such model; {advice}")
    try:
        return model_class._from_config(config, **attention_settings(args))
    except (TypeError, AssertionError) as error:  # of other networks, or of sizes that do not fit together
        raise ValueError(
            f"`architecture` is '{name}', which timm does not make with these sizes ({error}). Take one of its vision "
            "transformers, such as timm/vit_tiny_patch16_224, and sizes that fit together."
        ) from error


def _config_class_of(model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    return cast(type[PreTrainedConfig], model_class.config_class)


def stored_config(args: ModelArguments) -> dict:
    """The values of the checkpoint's `config.json`."""
    name = str(args.model_name_or_path)
    download = nullcontext() if Path(name).is_dir() else explained_download(name, args.model_revision)
    with explained_reading(f"'{name}'"), download:
        stored, _ = PreTrainedConfig.get_config_dict(name, revision=args.model_revision, token=args.token)
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
    if plain_type_of(model_type) != TIMM_MODEL_TYPE:  # which says its sizes when it is built
        _refuse_scratch_options(args, config, model_type)
    if args.hidden_dropout_prob is not None and not hasattr(config, "hidden_dropout_prob"):
        raise ValueError(
            f"`hidden_dropout_prob` is {args.hidden_dropout_prob}, which {what} of type '{model_type}' does not have; "
            "leave out --hidden_dropout_prob."
        )
    if not is_free_model_type(model_type):
        flags = {"shuffle_mode": "arbitrary"} | flags
    if args.hidden_dropout_prob is not None:
        flags = {**flags, "hidden_dropout_prob": args.hidden_dropout_prob}
    processing_class = load_processing_class(name_or_path, config, trust_remote_code=args.trust_remote_code, **hub)
    with explained_reading(what):
        model, found = model_class.from_pretrained(
            name_or_path,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
            dtype="float32",  # what it is stored in is for storing
            **flags,
            **labels,
            **attention_settings(args),
            **hub,
        )
    if plain_type_of(model_type) == TIMM_MODEL_TYPE:
        _refuse_scratch_options(args, model.config, model_type)
    # What is missing is refused there, but for a classifier, which may start anew
    # A text tower has no place in a classifier of images
    unexpected = [name for name in found["unexpected_keys"] if not name.startswith("text_model.")]
    check_complete(what, (), unexpected, requested=flags)
    check_finite(what, model.named_parameters())
    if takes_texts(config):
        return model, processing_class
    # timm's, for which transformers would not read the image processor that is saved with the model
    vars(model.config).pop("pretrained_cfg", None)
    if args.image_size is not None:
        model = with_image_size(model, args.image_size)
        processing_class = resized_image_processor(processing_class, args.image_size)
    check_fits(processing_class, model, what)
    return model, processing_class


def checkpoint_class_names(args: ModelArguments) -> list[str] | None:
    """The classes of the checkpoint whose classifier is fine-tuned, in its order.

    None from scratch, and where classes have no names of their own.
    """
    if args.model_name_or_path is None:
        return None
    with explained_reading(f"'{args.model_name_or_path}'"):
        stored = stored_config(args)
        labels = stored.get("id2label") or dict(enumerate(stored.get("label_names") or ()))  # the latter of timm
        names = [str(name) for _, name in sorted(labels.items(), key=lambda item: int(item[0]))]
    return None if not names or all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def attention_settings(args: ModelArguments) -> dict:
    """The implementation of attention, where the arguments name one."""
    return {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}


def _refuse_scratch_options(args: ModelArguments, config: PreTrainedConfig, model_type: str) -> None:
    """Raises a `ValueError` for an option of a model from scratch whose value is another than the checkpoint's."""
    architecture = plain_type_of(model_type)
    for name in ("architecture", *SCRATCH_ONLY):
        given = getattr(args, name)
        value = architecture if name == "architecture" else _size_in(config, name)
        same = given == value or (isinstance(value, (list, tuple)) and set(value) == {given})
        if given is not None and not same:
            raise ValueError(
                f"`{name}` is {given!r}, and '{args.model_name_or_path}' has {value!r}, which fine-tuning keeps; "
                f"leave out --{name}, or train from scratch without --model_name_or_path."
            )


def _size_in(config: Any, name: str) -> Any:
    """A size of a checkpoint's configuration: of the whole model, or of its image tower."""
    encoder: Any = encoder_config(config)
    if name == "intermediate_size" and hasattr(encoder, "mlp_ratio") and not hasattr(encoder, name):
        return int(encoder.hidden_size * encoder.mlp_ratio)
    return getattr(config, name, getattr(encoder, name, None))


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
    name_of_class = plain_class_name("AutoModelForImageClassification", plain_type_of(model_type))
    is_known = name_of_class is not None and (is_free_model_type(model_type) or not is_own_head(name_of_class))
    if not is_known and not args.trust_remote_code:
        raise ValueError(f"{what} is a model of type '{model_type}', which is no image classifier.")
    with explained_reading(what):
        teacher, loading = AutoModelForImageClassification.from_pretrained(
            name, **hub, **(attention_settings(args) if is_vit else {}), output_loading_info=True, use_safetensors=True
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
