# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The operations of the policies on batches, on any device. But for blur and noise they do what Pillow does.

An operation maps levels of grey to others, blends an image with another one made of it, moves pixels, blurs or adds
noise. All images that get one of a kind are changed together, which starts fewer kernels than one operation at a time:
for small images a GPU takes longer to start them than to run them.
"""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from .image_filters import blurred, noisy
from .operation_policies import BLENDS, FILTERS, MOVES, OPERATIONS, TABLES, strongest_blur


_KINDS = (TABLES, BLENDS, MOVES, FILTERS)
GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's mode L


@functools.cache
def _constant(values: tuple, device: torch.device) -> torch.Tensor:
    """A tensor that is moved to the device once, since the host waits for that."""
    return torch.tensor(values, device=device)


def apply_operations(
    pixels: torch.Tensor,
    operations: torch.Tensor,
    magnitudes: torch.Tensor,
    fill: torch.Tensor,
    noise_seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Carries out a policy's operations, one after the other.

    How many images get each is the one thing that the host reads.

    Args:
        pixels: float32 levels from 0 to 255 of shape `(num_images, num_channels, height, width)`. They are changed in
            place.
        operations: int64 codes of shape `(num_images, num_operations)`, see `OPERATIONS`.
        magnitudes: float32 of the same shape, in the units of [`Range`].
        fill: Colour of what lies outside an image, levels of shape `(num_images, num_channels)`.
        noise_seeds: int64 of shape `(num_images,)`, for operations that add noise. To these the operation's place
            among those of its image is added.

    Raises:
        `ValueError`: if an operation adds noise, and there are no seeds.
    """
    codes = _constant(tuple(range(len(OPERATIONS))), pixels.device)
    counts = (operations[:, :, None] == codes).sum(0).tolist()
    matrices = _matrices(operations, magnitudes, pixels.shape[-2:])
    for slot, counts_of_slot in enumerate(counts):
        count = dict(zip(OPERATIONS, counts_of_slot))
        order = operations[:, slot].argsort(stable=True)
        strengths = magnitudes[:, slot].index_select(0, order)[:, None]
        sizes = [count["identity"], *(sum(count[name] for name in kind) for kind in _KINDS)]
        _, mapped, blended, moved, filtered = order.split(sizes)
        _, of_mapped, of_blended, _, of_filtered = strengths.split(sizes)
        if len(mapped):
            changed = _mapped(pixels.index_select(0, mapped), [count[name] for name in TABLES], of_mapped)
            pixels.index_copy_(0, mapped, changed)
        if len(blended):
            changed = _blended(pixels.index_select(0, blended), [count[name] for name in BLENDS], of_blended)
            pixels.index_copy_(0, blended, changed)
        if len(moved):
            matrix, colour = matrices[:, slot].index_select(0, moved), fill.index_select(0, moved)
            pixels.index_copy_(0, moved, _moved(pixels.index_select(0, moved), matrix, colour))
        if len(filtered):
            if count["noise"] and noise_seeds is None:
                raise ValueError("`operations` holds 'noise', and `noise_seeds` is None; pass a seed for each image.")
            seeds = filtered if noise_seeds is None else noise_seeds.index_select(0, filtered) + slot
            counts_of_filters = [count[name] for name in FILTERS]
            changed = _filtered(pixels.index_select(0, filtered), counts_of_filters, of_filtered[:, 0], seeds)
            pixels.index_copy_(0, filtered, changed)
    return pixels


# --- Levels that become others ---


def _mapped(pixels: torch.Tensor, counts: list[int], magnitudes: torch.Tensor) -> torch.Tensor:
    """Images whose levels are looked up in a table of 256.

    Args:
        pixels: The images, sorted by operation.
        counts: How many images get each operation of `TABLES`.
        magnitudes: Of shape `(num_images, 1)`.
    """
    indices = pixels.round().to(torch.int64).flatten(2)
    levels = _constant(tuple(map(float, range(256))), pixels.device)
    tables = []
    num_fixed = sum(counts[: len(_FIXED_TABLES)])
    for name, strengths in zip(_FIXED_TABLES, magnitudes[:num_fixed].split(counts[: len(_FIXED_TABLES)])):
        if len(strengths):
            tables.append(_FIXED_TABLES[name](levels, strengths)[:, None].expand(-1, pixels.shape[1], -1))
    if num_fixed < len(pixels):
        counted, counts = indices[num_fixed:], counts[len(_FIXED_TABLES) :]
        histogram = torch.zeros(*counted.shape[:2], 256, device=pixels.device)
        histogram.scatter_add_(2, counted, levels[1].expand(counted.shape))
        parts = zip(_TABLES_BY_HISTOGRAM, magnitudes[num_fixed:].split(counts), histogram.split(counts))
        tables += [_TABLES_BY_HISTOGRAM[name](levels, *each) for name, *each in parts if len(each[0])]
    return torch.cat(tables).clamp_(0, 255).gather(2, indices).view(pixels.shape)


def _posterized(levels: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    step = torch.exp2(8 - bits.clamp(min=1))  # no bits would leave a black image
    return levels.div(step, rounding_mode="floor") * step


_FIXED_TABLES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "invert": lambda levels, magnitudes: (255 - levels).expand(len(magnitudes), -1),
    "posterize": _posterized,
    "solarize": lambda levels, threshold: torch.where(levels < threshold, levels, 255 - levels),
    "solarize_add": lambda levels, added: torch.where(levels < 128, levels + added, levels),
    "brightness": lambda levels, change: levels * (1 + change),
}


# These also get the number of pixels of each level: float32 of shape (num_images, num_channels, 256)


def _contrast(levels: torch.Tensor, change: torch.Tensor, histogram: torch.Tensor) -> torch.Tensor:
    mean = (histogram * levels).sum(-1) / histogram[0, 0].sum()
    mean = (mean * _grey_weights(mean)).sum(1).round()[:, None, None]
    return torch.lerp(mean, levels, 1 + change[:, None]).expand(histogram.shape)


def _auto_contrast(levels: torch.Tensor, magnitudes: torch.Tensor, histogram: torch.Tensor) -> torch.Tensor:
    occurs = histogram > 0
    lowest = torch.where(occurs, levels, 255).amin(-1, keepdim=True)
    span = torch.where(occurs, levels, 0).amax(-1, keepdim=True) - lowest
    stretched = ((levels - lowest) * 255 / span + 1e-3).floor()  # rounded down as by Pillow, which has more digits
    return torch.where(span > 0, stretched, levels)


def _equalized(levels: torch.Tensor, magnitudes: torch.Tensor, histogram: torch.Tensor) -> torch.Tensor:
    counts = histogram.to(torch.int64)  # PyTorch takes sums of floats on a GPU for not deterministic
    before = counts.cumsum(-1) - counts
    # Of all pixels but those of the highest level that occurs
    step = before.where(counts > 0, 0).amax(-1, keepdim=True).div(255, rounding_mode="floor")
    table = (before + step.div(2, rounding_mode="floor")).div(step.clamp(min=1), rounding_mode="floor")
    return torch.where(step > 0, table, levels)


_TABLES_BY_HISTOGRAM: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "contrast": _contrast,
    "auto_contrast": _auto_contrast,
    "equalize": _equalized,
}


# --- Images blended with others ---


def _blended(pixels: torch.Tensor, counts: list[int], magnitudes: torch.Tensor) -> torch.Tensor:
    """Images as far from their grey, or smoothed, versions as `1 + magnitudes` says. Sorted by operation."""
    coloured, sharpened = pixels.split(counts)
    others = []
    if len(coloured):
        grey = (coloured * _grey_weights(coloured)[:, None, None]).sum(1, keepdim=True)
        others.append(grey.expand(coloured.shape))
    if len(sharpened):
        others.append(_smoothed(sharpened))
    return torch.lerp(torch.cat(others), pixels, 1 + magnitudes[:, :, None, None]).clamp_(0, 255)


def _smoothed(pixels: torch.Tensor) -> torch.Tensor:
    """Means of 3 by 3 pixels, where the one in the middle counts five times. Those at the edge stay as they are."""
    if min(pixels.shape[-2:]) < 3:
        return pixels
    weights = _constant((1 / 13,) * 4 + (5 / 13,) + (1 / 13,) * 4, pixels.device).view(1, 1, 3, 3)
    smooth = F.conv2d(pixels.flatten(0, 1)[:, None], weights)
    smoothed = pixels.clone()
    smoothed[..., 1:-1, 1:-1] = smooth.view(*pixels.shape[:2], *smooth.shape[2:])
    return smoothed


def _grey_weights(images: torch.Tensor) -> torch.Tensor:
    """Weights of the channels, whose sum is 1."""
    num_channels = images.shape[1]
    return _constant(GREY if num_channels == 3 else (1 / num_channels,) * num_channels, images.device)


# --- Pixels that move ---


def _matrices(operations: torch.Tensor, magnitudes: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """From where each pixel of the result is taken, in the coordinates of `affine_grid`.

    Images turn about the middle and are sheared from the upper left corner.

    Args:
        operations, magnitudes: Of shape `(num_images, num_operations)`.
        size: Height and width.

    Returns:
        float32 of shape `(num_images, num_operations, 2, 3)`.
    """
    height, width = size
    codes = _constant(tuple(OPERATIONS.index(name) for name in MOVES), operations.device)
    angle, shear_x, shear_y, right, down = torch.where(
        operations[..., None] == codes, magnitudes[..., None], 0.0
    ).unbind(-1)
    angle = angle.deg2rad()
    cos, sin = angle.cos(), angle.sin()
    shear_x, shear_y = shear_x * (height / width), shear_y * (width / height)
    row_x = (cos, shear_x - sin * (height / width), shear_x + right * (2 / width))
    row_y = (shear_y + sin * (width / height), cos, shear_y + down * (2 / height))
    return torch.stack((*row_x, *row_y), dim=-1).unflatten(-1, (2, 3))


def _moved(pixels: torch.Tensor, matrices: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Images with moved pixels, between pixels as Pillow's BILINEAR."""
    fill = fill[:, :, None, None]
    grid = F.affine_grid(matrices, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - fill, grid, align_corners=False).add_(fill).clamp_(0, 255)


# --- Pixels made worse ---


def _filtered(pixels: torch.Tensor, counts: list[int], magnitudes: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Images under blur or noise. Sorted by operation; `magnitudes` and `seeds` have shape `(num_images,)`."""
    to_blur, to_add_noise = pixels.split(counts)
    of_blur, of_noise = magnitudes.split(counts)
    largest = strongest_blur(min(pixels.shape[-2:]))
    parts = [blurred(to_blur, of_blur, largest)] if len(to_blur) else []
    parts += [noisy(to_add_noise, of_noise, seeds[counts[0] :])] if len(to_add_noise) else []
    return torch.cat(parts)
