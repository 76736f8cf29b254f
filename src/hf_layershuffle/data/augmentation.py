# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""From decoded images to the model's input by augmentation and normalisation, a batch at a time and on any device."""

from typing import Any

import torch

from .image_operations import apply_operations


# What is left to do to finished images, when a batch is there
MIXING = ("mixing", "mixing_boxes")

MAX_AT_ONCE = 2**25  # numbers of the images that are changed together, which take some times as many bytes


def crop_indices(
    offsets: torch.Tensor, flips: torch.Tensor, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which row and column of the image each row and column of the crop comes from.

    Args:
        offsets: Integers of shape `(batch_size, 2)`: by how many pixels the crop's upper left corner lies below and to
            the right of the image's. May be negative.
        flips: Booleans of shape `(batch_size,)`: whether to mirror left and right.
        size: Height and width.

    Returns:
        Integers of shapes `(batch_size, height)` and `(batch_size, width)`. Some may lie outside the image.
    """
    rows, columns = (torch.arange(length, device=offsets.device) for length in size)
    columns = torch.where(flips[:, None], size[1] - 1 - columns, columns)
    return offsets[:, :1] + rows, offsets[:, 1:] + columns


def crop(pixels: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Takes the pixels of these rows and columns. Outside the image it is black.

    One gather does the crops and flips of all images. `pixels` and the result have shape `(batch_size, num_channels,
    height, width)`; `rows` and `columns` are those of [`crop_indices`].
    """
    height, width = pixels.shape[-2:]
    is_inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    indices = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    indices = indices.flatten(1)[:, None, :].expand(-1, pixels.shape[1], -1)
    return pixels.flatten(2).gather(2, indices).view(pixels.shape) * is_inside[:, None]


def normalize(pixels: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`pixels * scale + shift` as float32; `scale` and `shift` have shape `(batch_size or 1, num_channels)`."""
    return pixels.to(torch.float32).mul_(scale[:, :, None, None]).add_(shift[:, :, None, None])


def erase(pixels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Normalised images with 0, the mean colour, in one box each.

    Args:
        pixels: Images of shape `(num_images, num_channels, height, width)`.
        boxes: int64 of shape `(num_images, 4)`: top, left, height and width, which may be 0.
    """
    return pixels.masked_fill(_inside(boxes, pixels.shape[-2:]), 0)


def mix(pixels: torch.Tensor, weights: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Images mixed with those at the same place from the end of the batch.

    Args:
        pixels: Images of shape `(num_images, num_channels, height, width)`.
        weights: Weights in [0, 1] of shape `(num_images,)` of the images themselves in a mixture.
        boxes: int64 of shape `(num_images, 4)`: the part that is the other image (arXiv 1905.04899). Where it has no
            height, pixels are averaged (arXiv 1710.09412).
    """
    is_cut = (boxes[:, 2] > 0)[:, None, None, None]
    averaged = torch.where(is_cut, 1.0, weights[:, None, None, None])
    weights = torch.where(_inside(boxes, pixels.shape[-2:]), 0.0, averaged).to(pixels.dtype)
    return torch.lerp(pixels.flip(0), pixels, weights)


def _inside(boxes: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Which pixels lie in the boxes: booleans of shape `(num_images, 1, height, width)`."""
    top, left, height, width = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(length, device=boxes.device) for length in size)
    in_rows = (rows >= top) & (rows < top + height)
    in_columns = (columns >= left) & (columns < left + width)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def finish_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Does what remains to be done to a batch of [`ImageBatch.unfinished`], on the device where it lies.

    Images are cropped and mirrored, changed by the operations of a policy, normalised, erased in part and mixed, as
    the batch says (see [`Augmentation.draw`]). A mixed batch has two further keys: `mixed_labels`, the labels of the
    other images, and `mixing`, the weights of the images themselves. Any other batch comes back as it is.
    """
    if "normalization" in batch:
        batch = _finish_images(batch)
    if "mixing_boxes" in batch:
        batch = dict(batch)
        batch["pixel_values"] = mix(batch["pixel_values"], batch["mixing"], batch.pop("mixing_boxes"))
        if "labels" in batch:
            batch["mixed_labels"] = batch["labels"].flip(0)
    return batch


def finish_images_together(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Does to several small batches at once what [`finish_batch`] does to each image by itself: all but mixing.

    The operations of a policy are so many that the host takes as long for few images as for many.
    """
    if len(batches) < 2 or any("operations" not in batch or "normalization" not in batch for batch in batches):
        return batches
    finished: list[dict[str, Any]] = []
    at_once = max(1, MAX_AT_ONCE // max(1, batches[0]["pixel_values"].numel()))
    for start in range(0, len(batches), at_once):
        group = batches[start : start + at_once]
        joined = {name: torch.cat([batch[name] for batch in group]) for name in group[0]}
        sizes = [len(batch["pixel_values"]) for batch in group]
        parts = {name: each.split(sizes) for name, each in _finish_images(joined).items()}
        finished += [{name: part[index] for name, part in parts.items()} for index in range(len(group))]
    return finished


def _finish_images(batch: dict[str, Any]) -> dict[str, Any]:
    batch = dict(batch)
    scale, shift = batch.pop("normalization").unbind(1)
    pixels = batch.pop("pixel_values")
    if "crop_rows" in batch:
        pixels = crop(pixels, batch.pop("crop_rows"), batch.pop("crop_columns"))
    if "operations" in batch:
        mean = (-shift / scale).clamp(0, 255)
        operations, magnitudes = batch.pop("operations"), batch.pop("magnitudes")
        seeds = batch.pop("noise_seeds", None)
        pixels = apply_operations(pixels.to(torch.float32, copy=True), operations, magnitudes, mean, seeds)
    pixels = normalize(pixels, scale, shift)
    if "erased" in batch:
        pixels = erase(pixels, batch.pop("erased"))
    return {**batch, "pixel_values": pixels}
