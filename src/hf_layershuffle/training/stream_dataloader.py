# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""The training batches of a stream: read by the process that trains, decoded by workers, to its device."""

from collections.abc import Callable
from functools import partial

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from ..common.memory import give_back_large_blocks
from ..data.image_stream import ImageStream
from ..data.stream_batches import StreamBatches


def stream_dataloader(
    stream: ImageStream, args: TrainingArguments, accelerator: Accelerator, batch_size: int, collate: Callable
) -> DataLoader:
    """Batches for this process, which takes its share of the stream by itself.

    Accelerate would have the first process decode the images of all.
    """
    batches = StreamBatches(
        stream,
        batch_size,
        drop_last=args.dataloader_drop_last,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    dataloader = DataLoader(
        stream,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=partial(_begin_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
    return prepare_data_loader(
        dataloader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        non_blocking=accelerator.non_blocking,
    )


def _begin_worker(index: int, num_workers: int, rank: int) -> None:
    seed_worker(index, num_workers, rank)
    give_back_large_blocks()


def is_empty(dataloader: DataLoader) -> bool:
    """Whether a dataloader is known to give no batch."""
    try:
        return len(dataloader) == 0
    except TypeError:  # a stream
        return False
