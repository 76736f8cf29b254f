# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The operations of RandAugment and TrivialAugment on batches, by kornia, which is imported when one is needed.

They do to numbers in [0, 1] what Pillow does to bytes. What moves into view is filled with the mean colour.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

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
        moves: list[tuple[torch.Tensor, torch.Tensor]] = []  # images, and their matrices
        for name, images in zip(OPERATIONS, images_by_code):
            if not len(images):
                continue
            if name in _CHANGES:
                chosen = pixels.index_select(0, images)
                changed = _CHANGES[name](chosen, magnitudes[images, slot], fill.index_select(0, images))
                pixels.index_copy_(0, images, changed)
            elif name in _MOVES:
                rows = _MOVES[name](magnitudes[images, slot], pixels.shape[-2:])
                moves.append((images, torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)))
        if moves:  # all at once
            images, matrices = (torch.cat(parts) for parts in zip(*moves))
            moved = _moved(pixels.index_select(0, images), matrices, fill.index_select(0, images))
            pixels.index_copy_(0, images, moved)
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

    return posterize(pixels, magnitudes.to(torch.int32).clamp(min=1))  # no bits would leave a black image


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


# What moves pixels: the two rows of the matrix that says from where each pixel of the result is taken


def _rotated(magnitudes: torch.Tensor, size: torch.Size) -> tuple:
    angles = magnitudes.deg2rad()
    cos, sin = angles.cos(), angles.sin()
    y, x = ((side - 1) / 2 for side in size)
    return (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)


def _sheared_x(magnitudes: torch.Tensor, size: torch.Size) -> tuple:
    zero, one = torch.zeros_like(magnitudes), torch.ones_like(magnitudes)
    return (one, magnitudes, magnitudes / 2), (zero, one, zero)


def _sheared_y(magnitudes: torch.Tensor, size: torch.Size) -> tuple:
    zero, one = torch.zeros_like(magnitudes), torch.ones_like(magnitudes)
    return (one, zero, zero), (magnitudes, one, magnitudes / 2)


def _translated_x(magnitudes: torch.Tensor, size: torch.Size) -> tuple:
    zero, one = torch.zeros_like(magnitudes), torch.ones_like(magnitudes)
    return (one, zero, magnitudes), (zero, one, zero)


def _translated_y(magnitudes: torch.Tensor, size: torch.Size) -> tuple:
    zero, one = torch.zeros_like(magnitudes), torch.ones_like(magnitudes)
    return (one, zero, zero), (zero, one, magnitudes)


def _moved(pixels: torch.Tensor, matrices: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Images each of whose pixels `(x, y)` is taken from `matrix @ (x, y, 1)`, between pixels as Pillow's BILINEAR.

    kornia's `warp_affine` would do it in ten times as many calls: it normalises and inverts matrices.

    Args:
        pixels: The images.
        matrices: float32 of shape `(num_images, 2, 3)`, in pixels.
        fill: Colour of what moves into view.
    """
    height, width = pixels.shape[-2:]
    # From pixels to the coordinates of `grid_sample`, in which the centres of the outer pixels are at -1 and 1
    half = torch.tensor([max(width - 1, 1) / 2, max(height - 1, 1) / 2]).to(pixels.device, non_blocking=True)
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2]).to(pixels.device, non_blocking=True)
    turn = matrices[:, :, :2]
    shift = ((turn * middle).sum(-1) + matrices[:, :, 2] - middle) / half
    theta = torch.cat([turn * half / half[:, None], shift[:, :, None]], dim=-1)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=True)
    fill = fill[:, :, None, None]
    return (F.grid_sample(pixels - fill, grid, align_corners=True) + fill).clamp(0, 1)


_MOVES: dict[str, Callable[[torch.Tensor, torch.Size], tuple]] = {
    "rotate": _rotated,
    "shear_x": _sheared_x,
    "shear_y": _sheared_y,
    "translate_x": _translated_x,
    "translate_y": _translated_y,
}
_CHANGES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
}
