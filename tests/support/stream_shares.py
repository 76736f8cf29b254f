"""Trains in one of several processes on a stream, and writes which images of the first pass it saw."""

import sys
import zlib
from pathlib import Path

import torch

import hf_layershuffle as ls
from hf_layershuffle.data.image_stream import ImageStream
from hf_layershuffle.data.streamed_splits import load_image_stream
from support.images import processor
from support.trainers import arguments


class Recorded(ImageStream):
    def __init__(self, *args, **kwargs):
        self.seen = set()
        super().__init__(*args, **kwargs)

    def __getitems__(self, samples):
        self.seen |= {zlib.crc32(sample.image["bytes"]) for sample in samples if sample.number == 0}
        return super().__getitems__(samples)


def main(output: str, *folders: str) -> None:
    for folder in folders:
        splits = load_image_stream(folder)
        rows = splits.rows_of_files
        recorded = Recorded(splits.stream, processor(), num_samples=26, shuffle_buffer_size=4, rows_of_files=rows)
        torch.manual_seed(0)
        config = ls.LayerShuffleViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8,
            patch_size=4, num_labels=2, shuffle_mode="arbitrary",
        )  # fmt: skip
        args = arguments(output, per_device_train_batch_size=4, max_steps=8)
        model = ls.LayerShuffleViTForImageClassification(config)
        ls.LayerShuffleTrainer(model, args, train_dataset=recorded).train()
        Path(output, f"{Path(folder).name}-{args.process_index}.txt").write_text(" ".join(map(str, recorded.seen)))


if __name__ == "__main__":
    main(*sys.argv[1:])
