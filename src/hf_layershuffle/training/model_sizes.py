# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The sizes of a model from scratch, and the fields of a family's configuration that they go into."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..checkpoints.tokenizers import input_kind
from .recipes import SCRATCH_DEFAULTS
from .script_arguments import ModelArguments


logger = logging.get_logger(__name__)
# The most that is chosen without being asked for
LARGEST_PATCH = 16  # pixels of a patch
MOST_PATCHES = 32  # patches a side


# What each vision transformer with one list of layers says of itself
NEEDED_FIELDS = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
TIMM = "timm/"  # before the name of one of timm's models, as on the Hub
# What timm's vision transformers call these sizes
TIMM_NAMES = {
    "image_size": "img_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
}


def scratch_values(config_class: type[PreTrainedConfig], args: ModelArguments, image_size: tuple[int, int]) -> dict:
    """The fields of a family's configuration for a model from scratch.

    A family of two towers gets the sizes in its image tower. Its text tower, which a classifier of images has not, is
    as small.

    Args:
        config_class: The family's configuration class.
        args: The arguments of the run. What is None gets its default.
        image_size: Height and width of the dataset's images, in pixels.

    Raises:
        `ValueError`: if sizes do not fit together, or the family has no such sizes.
    """
    if (args.architecture or "").startswith(TIMM):
        return _timm_values(args, image_size)
    known, tower = _fields_of(config_class)
    if "num_patches" in known:
        raise ValueError(
            f"`architecture` is '{args.architecture}', whose models take lists of patches of images of any shape, "
            "with which they cannot be trained here. Take one of images of one size, such as siglip."
        )
    missing = [name for name in NEEDED_FIELDS if name not in known]
    if missing and input_kind(config_class()) != "image":
        raise ValueError(
            f"`architecture` is '{args.architecture}', which is no model of images. One of texts is trained with "
            "--task text-classification; one of sounds or videos in Python, by `LayerShuffleTrainer`."
        )
    if missing:
        raise ValueError(
            f"`architecture` is '{args.architecture}', whose configuration has no `{missing[0]}`, so that it cannot "
            "be made here for these images; make one in Python, or take a vision transformer, such as vit, deit, "
            "dinov2, siglip, clip or beit."
        )
    sizes = scratch_sizes(args, image_size)
    own = {"residual_init_scale": sizes.pop("residual_init_scale")}
    _use_ratio(sizes, known)
    for name in [name for name in sizes if name not in known]:
        # The preset chooses an `initializer_range` for all families
        if getattr(args, name) not in (None, 0) and not (name == "initializer_range" and args.preset is not None):
            raise ValueError(
                f"`{name}` is {getattr(args, name)!r}, which models of type '{args.architecture}' do not have; leave "
                f"out --{name}."
            )
        del sizes[name]
    if "drop_path_rate" in known:
        sizes["drop_path_rate"] = 0.0  # like dropout; some families begin with another
    if {"use_relative_position_bias", "use_absolute_position_embeddings"} <= known.keys():
        # By default they do not know positions. The bias alone, as of the published ones, learns slowly from little
        sizes |= {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}
    if not tower:
        return {**sizes, **own}
    text = {name: sizes[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # the usual ones are outside a small vocabulary
    return {tower: sizes, "text_config": {**text, **tokens, "num_hidden_layers": 1}, **own}


def _fields_of(config_class: type[PreTrainedConfig]) -> tuple[dict[str, Any], str | None]:
    """The fields of the configuration that has the sizes of images, with their defaults, and its name in
    `config_class` if it is a tower's."""
    name = "vision_config"
    tower = config_class.sub_configs.get(name)
    sized: Any = config_class if tower is None else tower
    known = {field.name: field.default for field in fields(sized)} if hasattr(sized, "__dataclass_fields__") else {}
    return known, name if tower is not None else None


def _use_ratio(sizes: dict[str, Any], known: dict[str, Any]) -> None:
    """Says the width of the MLP as a multiple of that of the hidden states, for families that do."""
    if "intermediate_size" in known or "mlp_ratio" not in known:
        return
    inner, width = sizes.pop("intermediate_size"), sizes["hidden_size"]
    if inner % width:
        raise ValueError(
            f"`intermediate_size` is {inner}, and the MLP of this family is a whole multiple of the width as wide; "
            f"choose {max(1, inner // width) * width}, or another multiple of {width}."
        )
    sizes["mlp_ratio"] = type(known["mlp_ratio"])(inner // width)  # some families want a float


def _timm_values(args: ModelArguments, image_size: tuple[int, int]) -> dict:
    """The name of one of timm's models and the arguments to make it: the sizes that were given, and the dataset's."""
    size, patch = choose_image_size(args, image_size)
    if args.hidden_dropout_prob:
        raise ValueError(
            f"`hidden_dropout_prob` is {args.hidden_dropout_prob}, which timm's models are not given here; leave it "
            "out."
        )
    sizes: dict[str, Any] = {"image_size": size, "patch_size": patch, "num_channels": args.num_channels or 3}
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(args, name) is not None:
            sizes[name] = getattr(args, name)
    model_args: dict[str, Any] = {TIMM_NAMES[name]: value for name, value in sizes.items()}
    if args.intermediate_size is not None:
        if args.hidden_size is None:
            raise ValueError(f"`intermediate_size` is {args.intermediate_size} without a width; add --hidden_size.")
        model_args["mlp_ratio"] = args.intermediate_size / args.hidden_size
    own = {name: getattr(args, name) for name in ("initializer_range", "residual_init_scale")}
    return {
        "architecture": str(args.architecture).removeprefix(TIMM),
        "model_args": model_args,
        **{name: value for name, value in own.items() if value is not None},
    }


def scratch_sizes(args: ModelArguments, image_size: tuple[int, int]) -> dict:
    """The sizes of a model from scratch, as its configuration names them.

    Args:
        args: The arguments of the run. What is None gets its default.
        image_size: Height and width of the dataset's images, in pixels.

    Raises:
        `ValueError`: if sizes do not fit together.
    """
    size, patch = choose_image_size(args, image_size)
    return {"image_size": size, "patch_size": patch, **transformer_sizes(args, SCRATCH_DEFAULTS)}


def transformer_sizes(args: ModelArguments, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that models of images and of texts have alike.

    Args:
        args: The arguments of the run.
        defaults: What stands for an argument that is None. The number of heads and the width of the MLP follow from
            the width.

    Raises:
        `ValueError`: if sizes do not fit together.
    """
    given = {name: getattr(args, name) for name in (*defaults, "num_attention_heads", "intermediate_size")}
    sizes: dict[str, Any] = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    del sizes["architecture"]
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
