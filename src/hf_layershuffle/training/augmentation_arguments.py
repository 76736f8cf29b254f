# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The arguments of how training images are augmented."""

from dataclasses import dataclass, field
from typing import Any

from ..data.augmentation_settings import AUGMENTATION_PRESETS, LABEL_SMOOTHING, Augmentation
from ..data.operation_policies import ONE_OPERATION, POLICIES, policies_with_strength


# Arguments that have another name than the field of [`Augmentation`]
_FIELDS = {
    "augmentation_policy": "policy",
    "augmentation_operations": "num_operations",
    "augmentation_magnitude": "magnitude",
}


@dataclass
class AugmentationArguments:
    """A named preset, and values that win over it."""

    augmentation: str = field(
        default="light",
        metadata={
            "help": f"How training images are augmented: {', '.join(AUGMENTATION_PRESETS)}. light crops and mirrors. "
            "The options from --crop_padding to --mixing_probability win over it. "
            "cifar and deit set --label_smoothing_factor to 0.1 unless it is given."
        },
    )
    crop_padding: int | None = field(
        default=None,
        metadata={
            "help": "Pixels added around the image before the random crop. With light and cifar it defaults to an "
            "eighth of the image, and to none below 16 pixels; with the others to none."
        },
    )
    horizontal_flip: bool | None = field(
        default=None,
        metadata={
            "help": "Mirror half of the images. With light and cifar it defaults to True for colour and False for "
            "grey images, which are often characters."
        },
    )
    resized_crop_scale: list[float] | None = field(
        default=None,
        metadata={
            "help": "Smallest and largest part of an image's area that a random crop takes, which is then resized, "
            "such as 0.08 1. Images are then read and decoded in each epoch."
        },
    )
    augmentation_policy: str | None = field(
        default=None, metadata={"help": f"Operations that change images at random: none, {', '.join(POLICIES)}."}
    )
    augmentation_operations: int | None = field(
        default=None, metadata={"help": "Operations that an image gets from RandAugment, from 1 to 8."}
    )
    augmentation_magnitude: float | None = field(
        default=None, metadata={"help": "Strength of RandAugment's operations, from 0 to 10."}
    )
    random_erasing: float | None = field(
        default=None, metadata={"help": "Probability in [0, 1] that a box of an image is replaced by the mean colour."}
    )
    mixup_alpha: float | None = field(
        default=None, metadata={"help": "Parameter of mixup's beta distribution, at least 0; 0 for no mixup."}
    )
    cutmix_alpha: float | None = field(
        default=None, metadata={"help": "Parameter of CutMix's beta distribution, at least 0; 0 for no CutMix."}
    )
    mixing_probability: float | None = field(
        default=None, metadata={"help": "Probability in [0, 1] that an image is mixed, by mixup or CutMix."}
    )


AUGMENTATION_ARGUMENTS = tuple(AugmentationArguments.__dataclass_fields__)


def augmentation_of(args: AugmentationArguments) -> Augmentation:
    """The settings that the arguments describe.

    Raises:
        `ValueError`: if a value is not allowed.
    """
    given = {name: getattr(args, name) for name in AUGMENTATION_ARGUMENTS if name != "augmentation"}
    changes: dict[str, Any] = {_FIELDS.get(name, name): each for name, each in given.items() if each is not None}
    if args.augmentation_policy is not None:
        if args.augmentation_policy not in (*POLICIES, "none"):
            raise ValueError(
                f"`augmentation_policy` is {args.augmentation_policy!r}; choose from none, {', '.join(POLICIES)}."
            )
        changes["policy"] = None if args.augmentation_policy == "none" else args.augmentation_policy
    if args.resized_crop_scale is not None:
        changes["resized_crop_scale"] = tuple(args.resized_crop_scale)
    augmentation = Augmentation.from_preset(args.augmentation, **changes)
    for name in ("augmentation_operations", "augmentation_magnitude"):
        if getattr(args, name) is None or augmentation.policy in policies_with_strength():
            continue
        why = "without a policy"
        if augmentation.policy in ONE_OPERATION:
            why = f"with {augmentation.policy}, which says itself how many operations an image gets, and how strong"
        raise ValueError(
            f"`{name}` is {getattr(args, name)} {why}; "
            f"leave it out, or add --augmentation_policy {' or '.join(policies_with_strength())}."
        )
    return augmentation


def augmentation_defaults(args: AugmentationArguments) -> list[str]:
    """Options of training that go with a preset, for what is not given on the command line."""
    smoothing = LABEL_SMOOTHING.get(args.augmentation)
    return [] if smoothing is None else ["--label_smoothing_factor", str(smoothing)]
