# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""From decoded images to the model's input by crop, flip and normalisation, a batch at a time and on any device."""

from typing import Any

import torch


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


def finish_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Does what remains to be done to a batch of [`ImageBatch.unfinished`], on the device where it lies.

    Any other batch comes back as it is.
    """
    if "normalization" not in batch:
        return batch
    batch = dict(batch)
    scale, shift = batch.pop("normalization").unbind(1)
    pixels = batch["pixel_values"]
    if "crop_rows" in batch:
        pixels = crop(pixels, batch.pop("crop_rows"), batch.pop("crop_columns"))
    return {**batch, "pixel_values": normalize(pixels, scale, shift)}
