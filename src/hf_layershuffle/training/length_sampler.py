# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Items of like length together, in an order that every process and every resumed run agrees on."""

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class SeededLengthSampler(LengthGroupedSampler):
    """transformers' sampler of `group_by_length`, whose order is a function of the seed and the epoch alone.

    transformers draws it from PyTorch's global random numbers, which are others after a resume, and in other
    processes.

    Args:
        batch_size: Items a step.
        lengths: Length of each item.
        seed: Seed of the order, at least 0.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
