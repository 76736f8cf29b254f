"""What does augmentation cost on the device, beside the training step?

    python benchmarks/augmentation.py                    # about three minutes on 2 cores
    python benchmarks/augmentation.py --device cuda      # in bf16, with batches of 128
    python benchmarks/augmentation.py --sizes cifar --presets cifar --pairs 30

A is a training step of a plain ViT (forward, backward and AdamW). B draws for a batch, and finishes it on the same
device with each preset: crop, mirror, operations of the policy, normalisation, erasing, mixing. Decoding and resized
crops, which happen before in the workers, are not in it. Prints the ratio of the times and writes
results/augmentation.json.
"""

import argparse
import itertools
from functools import partial

import numpy as np
import torch
from harness import Row, measure_pairs, positive, record
from train_step import BATCH_SIZES, SIZES, build, images

from hf_layershuffle.data import Augmentation
from hf_layershuffle.data.augmentation import finish_batch
from hf_layershuffle.data.augmentation_settings import AUGMENTATION_PRESETS


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["vit-s", "cifar"])
    parser.add_argument("--presets", nargs="+", choices=AUGMENTATION_PRESETS, default=list(AUGMENTATION_PRESETS))
    parser.add_argument("--batch_size", type=positive, help="images a step; 4 or 16 on the CPU, 128 on a GPU")
    parser.add_argument("--pairs", type=positive, default=6)
    return parser.parse_args()


class TrainingStep:
    """A step of the plain model on the same images."""

    def __init__(self, size: str, batch_size: int, device: str):
        self.model = build(size, None, device)
        self.batch = images(size, batch_size, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=device != "cpu")
        self.device = device

    def __call__(self) -> None:
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.device != "cpu"):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Augmented:
    """Batches as a collator gives them, finished on the device: each call takes the next epoch's draws."""

    def __init__(self, preset: str, image_size: int, batch_size: int, device: str):
        generator = torch.Generator().manual_seed(0)
        self.shape = (3, image_size, image_size)
        self.augmentation = Augmentation.from_preset(preset)
        self.pixels = torch.randint(256, (batch_size, *self.shape), dtype=torch.uint8, generator=generator)
        self.device, self.epochs = device, itertools.count()

    def __call__(self) -> None:
        count = len(self.pixels)
        batch = {
            "pixel_values": self.pixels,
            "labels": torch.zeros(count, dtype=torch.int64),
            "normalization": torch.tensor([[0.0171] * 3, [-2.1] * 3]).repeat(count, 1, 1),
            **self.augmentation.draw(0, next(self.epochs), np.arange(count), self.shape),
        }
        finish_batch({name: values.to(self.device, non_blocking=True) for name, values in batch.items()})


def rows_of_size(size: str, args: argparse.Namespace) -> list[Row]:
    batch_size = args.batch_size or (BATCH_SIZES[size] if args.device == "cpu" else 128)
    step = TrainingStep(size, batch_size, args.device)
    synchronize = None if args.device == "cpu" else partial(torch.cuda.synchronize, args.device)
    rows = []
    for preset in args.presets:
        augmented = Augmented(preset, SIZES[size]["image_size"], batch_size, args.device)
        pairs = measure_pairs(step, augmented, args.pairs, warm_up=1, synchronize=synchronize)
        target = "<= 0.10" if size == "vit-s" else ""
        notes = f"{batch_size} images on {args.device}"
        rows.append(pairs.row(f"preset {preset}", f"training step of {size}", target, notes))
    return rows


def main() -> None:
    args = parse_args()
    rows = [row for size in args.sizes for row in rows_of_size(size, args)]
    record("What does augmentation cost on the device, beside the training step?", rows, vars(args))


if __name__ == "__main__":
    main()
