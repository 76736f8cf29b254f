# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Blur and noise on batches of images, on any device."""

import math

import torch
from torch.nn import functional as F


_REACH = 3  # a Gaussian's standard deviations beyond which it counts as nothing
_GOLDEN = -0x61C8864680B583EB  # SplitMix64's constants, as signed numbers
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_BITS = 24  # of a number in [0, 1), which float32 holds exactly


def blurred(pixels: torch.Tensor, stds: torch.Tensor, largest: float) -> torch.Tensor:
    """Images under Gaussians; edges are continued.

    Args:
        pixels: float32 of shape `(num_images, num_channels, height, width)`.
        stds: Standard deviations in pixels, at least 0, of shape `(num_images,)`. With 0 an image stays as it is.
        largest: A number that none of them exceeds: Gaussians end where one of this standard deviation does. The host
            knows it, and so need not wait for the device.
    """
    radius = max(1, math.ceil(_REACH * largest))
    offsets = torch.arange(-radius, radius + 1, device=pixels.device, dtype=pixels.dtype)
    weights = (-0.5 * (offsets / stds.clamp(min=1e-3)[:, None]).square()).exp()
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(pixels.shape[1], dim=0)
    images = pixels.flatten(0, 1)[None]  # each channel of each image with the weights of its own
    rows, columns = weights[:, None, None, :], weights[:, None, :, None]
    for kernel, padding in ((rows, (radius, radius, 0, 0)), (columns, (0, 0, radius, radius))):
        images = F.conv2d(F.pad(images, padding, mode="replicate"), kernel, groups=images.shape[1])
    return images.view(pixels.shape)


def noisy(pixels: torch.Tensor, stds: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Images with Gaussian noise, which is a function of an image's seed and shape alone.

    Args:
        pixels: float32 levels from 0 to 255 of shape `(num_images, num_channels, height, width)`.
        stds: Standard deviations in levels, of shape `(num_images,)`.
        seeds: int64 of the same shape.
    """
    normal = _standard_normal(seeds, pixels[0].numel()).view(pixels.shape)
    return torch.addcmul(pixels, normal, stds[:, None, None, None]).clamp_(0, 255)


def _standard_normal(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """float32 of shape `(num_seeds, count)`: SplitMix64 on a counter, made normal by Box and Muller's formula."""
    counter = torch.arange(1, count + 1, device=seeds.device)
    bits = _mixed(_mixed(seeds)[:, None] + counter * _GOLDEN)
    of_radius, of_angle = (
        (_shifted(bits, shift) & (2**_BITS - 1)).to(torch.float32) * 2.0**-_BITS for shift in (64 - _BITS, 8)
    )
    return (-2 * torch.log1p(-of_radius)).sqrt() * (2 * math.pi * of_angle).cos()


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer on int64. Overflow is meant."""
    for shift, factor in zip((30, 27), _FACTORS):
        values = (values ^ _shifted(values, shift)) * factor
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, places: int) -> torch.Tensor:
    """Shifted to the right as numbers without a sign."""
    return (values >> places) & (2 ** (64 - places) - 1)
