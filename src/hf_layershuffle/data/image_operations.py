# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The operations of RandAugment and TrivialAugment on batches, by kornia, which is imported when one is needed.

They do to numbers in [0, 1] what Pillow does to bytes. What moves into view is filled with the mean colour.
"""

from collections.abc import Callable
from typing import Any

import torch

from .operation_policies import OPERATIONS


def import_kornia() -> Any:
    """The library.

    Raises:
        `ValueError`: if it is not installed.
    """
    try:
        import kornia
    except ImportError as error:
        raise ValueError(
            "RandAugment and TrivialAugment need kornia, which cannot be imported: "
            'pip install "hf-layershuffle[augment]"'
        ) from error
    return kornia


def apply_operations(
    pixels: torch.Tensor, operations: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor
) -> torch.Tensor:
    """Carries out a policy's operations, one after the other.

    Images with the same operation are changed together. How many these are is the one thing that the host reads.

    Args:
        pixels: float32 in [0, 1] of shape `(num_images, num_channels, height, width)`. They are changed in place.
        operations: int64 codes of shape `(num_images, num_operations)`, see `OPERATIONS`.
        magnitudes: float32 of the same shape, in the units of [`Range`].
        fill: Colour of what lies outside an image, float32 of shape `(num_images, num_channels)`.
    """
    import_kornia()
    codes = torch.arange(len(OPERATIONS), device=pixels.device)
    counts = (operations[:, :, None] == codes).sum(0).tolist()
    for slot, counts_of_slot in enumerate(counts):
        images_by_code = operations[:, slot].argsort(stable=True).split(counts_of_slot)
        for name, images in zip(OPERATIONS, images_by_code):
            if name in _CHANGES and len(images):
                chosen = pixels.index_select(0, images)
                changed = _CHANGES[name](chosen, magnitudes[images, slot], fill.index_select(0, images))
                pixels.index_copy_(0, images, changed)
    return pixels


# Each takes images, magnitudes of shape `(num_images,)` and fill colours of shape `(num_images, num_channels)`


def _auto_contrast(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import normalize_min_max

    is_flat = pixels.amax((-2, -1), keepdim=True) == pixels.amin((-2, -1), keepdim=True)
    return torch.where(is_flat, pixels, normalize_min_max(pixels))


def _equalize(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import equalize

    return equalize(pixels)


def _invert(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    return 1 - pixels


def _posterize(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import posterize

    return posterize(pixels, magnitudes.to(torch.int32))


def _solarize(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import solarize

    return solarize(pixels, (magnitudes - 0.5) / 255)  # between two levels of grey


def _solarize_add(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    # kornia adds to bright pixels too
    added = (pixels + magnitudes[:, None, None, None] / 255).clamp(max=1)
    return torch.where(pixels < 127.5 / 255, added, pixels)


def _color(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance.adjust import adjust_saturation_with_gray_subtraction

    return adjust_saturation_with_gray_subtraction(pixels, 1 + magnitudes)


def _contrast(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance.adjust import adjust_contrast_with_mean_subtraction

    return adjust_contrast_with_mean_subtraction(pixels, 1 + magnitudes)


def _brightness(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance.adjust import adjust_brightness_accumulative

    return adjust_brightness_accumulative(pixels, 1 + magnitudes)


def _sharpness(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import sharpness

    return pixels if min(pixels.shape[-2:]) < 3 else sharpness(pixels, 1 + magnitudes)


def _rotate(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    angles = magnitudes.deg2rad()
    cos, sin = angles.cos(), angles.sin()
    y, x = ((side - 1) / 2 for side in pixels.shape[-2:])
    rows = ((cos, sin, x - cos * x - sin * y), (-sin, cos, y + sin * x - cos * y))
    return _moved(pixels, rows, fill)


def _shear_x(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    zero, one = torch.zeros_like(magnitudes), torch.ones_like(magnitudes)
    return _moved(pixels, ((one, -magnitudes, -magnitudes / 2), (zero, one, zero)), fill)


def _shear_y(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    zero, one = torch.zeros_like(magnitudes), torch.ones_like(magnitudes)
    return _moved(pixels, ((one, zero, zero), (-magnitudes, one, -magnitudes / 2)), fill)


def _translate_x(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    zero, one = torch.zeros_like(magnitudes), torch.ones_like(magnitudes)
    return _moved(pixels, ((one, zero, -magnitudes), (zero, one, zero)), fill)


def _translate_y(pixels: torch.Tensor, magnitudes: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    zero, one = torch.zeros_like(magnitudes), torch.ones_like(magnitudes)
    return _moved(pixels, ((one, zero, zero), (zero, one, -magnitudes)), fill)


def _moved(pixels: torch.Tensor, rows: Any, fill: torch.Tensor) -> torch.Tensor:
    """Images whose pixels moved to `matrix @ (x, y, 1)`, between pixels as Pillow's BILINEAR.

    Args:
        pixels: The images.
        rows: The two rows of the matrix, of three tensors of shape `(num_images,)`.
        fill: Colour of what moves into view.
    """
    from kornia.geometry.transform import warp_affine

    matrices = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    height, width = pixels.shape[-2:]
    fill = fill[:, :, None, None]
    return (warp_affine(pixels - fill, matrices, (height, width)) + fill).clamp(0, 1)


_CHANGES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
