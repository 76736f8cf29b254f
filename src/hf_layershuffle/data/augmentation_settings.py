# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""How training images are augmented: the settings, named presets, and what is drawn for each image of an epoch."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ..common.checks import check_integers, check_number
from .augmentation import crop_indices
from .draws import uniform
from .operation_policies import NUM_STRENGTHS, ONE_OPERATION, POLICIES, chosen_operations
from .random_boxes import erased_boxes, mixing_draws, normal, resized_crop_boxes


HIGHEST_MAGNITUDE = 10


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images at random. It is a function of `(seed, epoch, index)` of the image.

    The images are cropped, mirrored, changed by the operations of a policy, erased in part and mixed, in this order.

    Args:
        crop_padding: Pixels of black on each side before a random crop, at least 0. None is an eighth of the image,
            and none below 16 pixels and beside a resized crop.
        horizontal_flip: Whether to mirror half of the images. None mirrors colour images, since grey ones are often
            characters.
        resized_crop_scale: Smallest and largest part of an image's area, fractions in (0, 1], that a crop of random
            size and shape takes, which is then resized (Szegedy et al., arXiv 1409.4842). None takes the whole image.
        resized_crop_ratio: Smallest and largest width to height of these crops, above 0.
        policy: "randaugment" (arXiv 1909.13719), with the strengths of DeiT, or "randaugment_plain_vit", with those
            of Beyer et al. (arXiv 2205.01580), which are weaker. Or "trivialaugment" (arXiv 2103.10158): one
            operation for each image, always, whose strength is drawn; the next four fields count for nothing. Or
            "corruptions", in the same way: a quarter of the images stay as they are, the others are blurred, noisy or
            of low contrast (arXiv 1903.12261). "blur", "noise" and "low_contrast" are one of these for all images, in
            full strength (see [`corrupted`]). None for no policy.
        num_operations: Operations that an image gets from RandAugment, from 1 to 8.
        magnitude: Strength of RandAugment's operations, from 0 to 10.
        magnitude_std: Standard deviation of the magnitude, which is drawn for each operation, at least 0.
        operation_probability: Probability in [0, 1] that an operation that RandAugment chose is carried out.
        random_erasing: Probability in [0, 1] that a box of an image is replaced by the mean colour (arXiv 1708.04896).
        mixup_alpha: Parameter of the beta distribution of mixup's weights (arXiv 1710.09412), at least 0; 0 for no
            mixup.
        cutmix_alpha: The same of CutMix (arXiv 1905.04899). Where both are above 0, one of them is drawn for each
            image.
        cutmix_probability: Probability in [0, 1] of CutMix where both are above 0.
        mixing_probability: Probability in [0, 1] that an image is mixed at all.

    Raises:
        `ValueError`: if a value is not allowed.

    ```python
    >>> from hf_layershuffle.data import Augmentation

    >>> augmentation = Augmentation.from_preset("cifar", random_erasing=0.1)
    >>> augmentation.policy, augmentation.cutmix_alpha, augmentation.random_erasing
    ('randaugment', 1.0, 0.1)
    ```
    """

    crop_padding: int | None = None
    horizontal_flip: bool | None = None
    resized_crop_scale: tuple[float, float] | None = None
    resized_crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    policy: str | None = None
    num_operations: int = 2
    magnitude: float = 9.0
    magnitude_std: float = 0.0
    operation_probability: float = 1.0
    random_erasing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    cutmix_probability: float = 0.5
    mixing_probability: float = 1.0

    def __post_init__(self):
        if self.crop_padding is not None:
            check_integers(crop_padding=(self.crop_padding, 0))
        if self.horizontal_flip not in (None, True, False):
            raise ValueError(f"`horizontal_flip` is {self.horizontal_flip!r}; it must be True, False or None.")
        if self.resized_crop_scale is not None:
            _check_range("resized_crop_scale", self.resized_crop_scale, 1)
        _check_range("resized_crop_ratio", self.resized_crop_ratio, 100)
        if self.policy is not None and self.policy not in tuple(POLICIES):
            raise ValueError(f"`policy` is {self.policy!r}; choose from {', '.join(POLICIES)}, or None for none.")
        check_integers(num_operations=(self.num_operations, 1))
        check_number("num_operations", self.num_operations, 1, 8)
        check_number("magnitude", self.magnitude, 0, HIGHEST_MAGNITUDE)
        check_number("magnitude_std", self.magnitude_std, 0, HIGHEST_MAGNITUDE)
        for name in ("operation_probability", "random_erasing", "cutmix_probability", "mixing_probability"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("mixup_alpha", "cutmix_alpha"):
            check_number(name, getattr(self, name), 0, 1000)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "Augmentation":
        """The settings of a preset, with changes.

        Args:
            name: A key of `AUGMENTATION_PRESETS`.
            changes: Values of fields that win over the preset's.
        """
        if name not in AUGMENTATION_PRESETS:
            raise ValueError(f"`augmentation` is {name!r}; choose from {', '.join(AUGMENTATION_PRESETS)}.")
        names = [field.name for field in dataclasses.fields(cls)]
        for change in changes:
            if change not in names:
                raise ValueError(f"`{change}` is no field of an augmentation; choose from {', '.join(names)}.")
        return dataclasses.replace(AUGMENTATION_PRESETS[name], **changes)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that their targets are of two classes."""
        return self.mixing_probability > 0 and max(self.mixup_alpha, self.cutmix_alpha) > 0

    def resolved(self, image_size: tuple[int, int], is_colour: bool) -> "Augmentation":
        """The same settings where `crop_padding` and `horizontal_flip` are not None.

        Args:
            image_size: Height and width of the model's input.
            is_colour: Whether the images have colours.
        """
        size = min(image_size)
        usual = size // 8 if size >= 16 and self.resized_crop_scale is None else 0
        padding = usual if self.crop_padding is None else self.crop_padding
        flip = is_colour if self.horizontal_flip is None else self.horizontal_flip
        return dataclasses.replace(self, crop_padding=padding, horizontal_flip=flip)

    def describe(self) -> str:
        """The nearest preset and what differs from it, such as "cifar, random_erasing=0.1".

        A preset's None stands for any value, since images decide on it.
        """
        described: list[list[str]] = []
        for name, preset in AUGMENTATION_PRESETS.items():
            values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
            changes = [f"{key}={value}" for key, value in values if getattr(preset, key) not in (None, value)]
            extra = [key for key in ("policy", "resized_crop_scale") if getattr(preset, key) is None]
            changes += [f"{key}={getattr(self, key)}" for key in extra if getattr(self, key) is not None]
            described.append([name, *changes])
        nearest = min(described, key=len)
        return ", ".join(nearest)

    def crop_boxes(self, seed: int, epoch: int, indices: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The part of each original image that a resized crop takes.

        Args:
            seed, epoch, indices: As for [`uniform`].
            sizes: Heights and widths of the original images, integers of shape `(num_images, 2)`.

        Returns:
            int64 of shape `(num_images, 4)`: top, left, height and width. The whole image without a resized crop.
        """
        sizes = np.asarray(sizes, dtype=np.int64)
        if self.resized_crop_scale is None:
            return np.concatenate([np.zeros_like(sizes), sizes], axis=1)
        numbers = ImageDraws(seed, epoch, indices)("resized crop", 40).reshape(-1, 10, 4)
        return resized_crop_boxes(numbers, sizes, self.resized_crop_scale, self.resized_crop_ratio)

    def draw(
        self, seed: int, epoch: int, indices: np.ndarray, image_shape: tuple[int, int, int]
    ) -> dict[str, torch.Tensor]:
        """What else is drawn for images, for [`finish_batch`] to carry out.

        Args:
            seed, epoch, indices: As for [`uniform`].
            image_shape: Channels, height and width of the images, as the model takes them.

        Returns:
            Tensors whose first dimension is `num_images`, and no key for what is not done:
            `crop_rows` and `crop_columns` (see [`crop_indices`]); `operations`, int64 codes of shape `(num_images,
            num_operations)`, with one where the policy gives one, and `magnitudes`, float32 of the same shape (see
            [`chosen_operations`]); `noise_seeds`, int64 in [0, 2^53) of shape `(num_images,)`; `erased`, int64 boxes
            of shape `(num_images, 4)` (top, left, height, width; no height where nothing is erased); `mixing`,
            float32 of shape `(num_images,)`, the weight of the image itself; `mixing_boxes`, int64 boxes of the other
            image (CutMix), with no height for mixup.
        """
        draws = ImageDraws(seed, epoch, indices)
        size = image_shape[1:]
        settings = self.resolved(size, image_shape[0] > 1)
        padding = settings.crop_padding or 0
        batch: dict[str, Any] = {}
        if padding or settings.horizontal_flip:
            offsets = torch.from_numpy((draws("crop", 2) * (2 * padding + 1)).astype(np.int64) - padding)
            flips = torch.from_numpy((draws("mirror", 1)[:, 0] < 0.5) & bool(settings.horizontal_flip))
            batch["crop_rows"], batch["crop_columns"] = crop_indices(offsets, flips, size)
        if self.policy is not None:
            batch["operations"], batch["magnitudes"] = self._operations(draws, image_shape)
            if "noise" in POLICIES[self.policy]:
                batch["noise_seeds"] = (draws("noise", 1)[:, 0] * 2**53).astype(np.int64)
        if self.random_erasing:
            batch["erased"] = erased_boxes(draws("erase", 41), self.random_erasing, size)
        if self.mixes:
            batch["mixing"], batch["mixing_boxes"] = mixing_draws(
                draws, self.mixup_alpha, self.cutmix_alpha, self.cutmix_probability, self.mixing_probability, size
            )
        return {name: torch.as_tensor(values) for name, values in batch.items()}

    def _operations(self, draws: Any, image_shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        has_one = self.policy in ONE_OPERATION
        count, probability = (1, 1.0) if has_one else (self.num_operations, self.operation_probability)
        if has_one:
            levels = np.floor(draws("level", count) * NUM_STRENGTHS) / (NUM_STRENGTHS - 1)
        else:
            levels = self.magnitude + self.magnitude_std * normal(draws("level", count))
            levels = levels.clip(0, HIGHEST_MAGNITUDE) / HIGHEST_MAGNITUDE
        policy = self.policy or ""
        codes, magnitudes = chosen_operations(
            policy, draws("choice", count), levels, draws("sign", count), image_shape
        )
        is_done = draws("operation", count) < probability
        return codes * is_done, magnitudes * is_done.astype(np.float32)


class ImageDraws:
    """[`uniform`] of these images, by purpose and count."""

    def __init__(self, seed: int, epoch: int, indices: np.ndarray):
        self._of = (seed, epoch, np.asarray(indices))

    def __call__(self, purpose: str, count: int) -> np.ndarray:
        return uniform(*self._of, purpose, count)


def _check_range(name: str, values: Any, most: float) -> None:
    is_pair = isinstance(values, (tuple, list)) and len(values) == 2
    if not is_pair or not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise ValueError(f"`{name}` is {values!r}; it must be two numbers, the lowest and the highest.")
    if not 0 < values[0] <= values[1] <= most:
        raise ValueError(f"`{name}` is {values!r}; it must be two rising numbers above 0, and at most {most}.")


_IMAGENET: dict[str, Any] = {
    "crop_padding": 0,
    "horizontal_flip": True,
}
AUGMENTATION_PRESETS: Mapping[str, Augmentation] = MappingProxyType(
    {
        "none": Augmentation(crop_padding=0, horizontal_flip=False),
        "light": Augmentation(),
        # As compact transformers are trained on CIFAR (Hassani et al., arXiv 2104.05704, section 4.1)
        "cifar": Augmentation(
            policy="randaugment",
            magnitude_std=0.5,
            operation_probability=0.5,
            random_erasing=0.25,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
        ),
        # As plain ViTs are trained on ImageNet by Beyer et al., arXiv 2205.01580, whose crops take 5 % at least
        "imagenet": Augmentation(
            **_IMAGENET,
            resized_crop_scale=(0.05, 1.0),
            policy="randaugment_plain_vit",
            magnitude=10.0,
            mixup_alpha=0.2,
        ),
        # Touvron et al., arXiv 2012.12877, table 9
        "deit": Augmentation(
            **_IMAGENET,
            resized_crop_scale=(0.08, 1.0),
            policy="randaugment",
            magnitude_std=0.5,
            operation_probability=0.5,
            random_erasing=0.25,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
        ),
    }
)
# What goes with a preset and is an argument of training: transformers' `label_smoothing_factor`
LABEL_SMOOTHING: Mapping[str, float] = MappingProxyType({"cifar": 0.1, "deit": 0.1})
