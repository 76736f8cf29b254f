"""Does the data path of examples/train.py keep up with the training step?

    python benchmarks/data_path.py                                     # 2,048 random images of CIFAR's size, 1 minute
    python benchmarks/data_path.py --dataset_name path/to/cifar10      # what examples/train.py accepts
    python benchmarks/data_path.py --dataset_name path/to/cifar10 --num_workers 2    # on a GPU

A is a training step on one batch that stays in memory; B the same step on the example's own dataset, augmentation,
DataLoader and collator. Both run in turn, `--steps` steps each, on the CPU or on the GPU if there is one. Also
measures how much of the first start's decoding a second start saves.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from harness import Row, measure_pairs, positive, record
from PIL import Image as PILImage
from train_step import BATCH_SIZES, SIZES
from transformers import ViTImageProcessor, set_seed

import hf_layershuffle as ls
from hf_layershuffle.data.datasets import load_image_datasets
from hf_layershuffle.training import argument_parser, data_building, model_building


MODELS = {"the example's default": {}, "cifar": SIZES["cifar"], "vit-s": SIZES["vit-s"]}


def write_random_images(folder: Path, count: int) -> str:
    """A Parquet folder of PNG files of CIFAR's size and shape."""
    rng = np.random.default_rng(0)
    features = Features({"img": Image(), "label": ClassLabel(names=[str(index) for index in range(10)])})
    for split, rows in (("train", count), ("test", 64)):
        images = [PILImage.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(rows)]
        labels = rng.integers(0, 10, rows).tolist()
        Dataset.from_dict({"img": images, "label": labels}, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def build_model(sizes: dict, splits):
    set_seed(0)
    class_names = splits["train"].features["label"].names
    if not sizes:
        model_args, _, _ = argument_parser.parse_arguments([])
        image_size = data_building.typical_image_size(splits["train"])
        return model_building.build_model(model_args, {}, class_names, image_size, {})
    config = ls.LayerShuffleViTConfig(**sizes, num_labels=len(class_names), shuffle_mode="arbitrary")
    size = {"height": config.image_size, "width": config.image_size}
    processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return ls.LayerShuffleViTForImageClassification(config), processor


def make_steps(model, dataset, batch_size: int, num_workers: int, steps: int, folder: str):
    """Two functions that take `steps` steps: on a fixed batch, and on the dataset."""
    args = ls.LayerShuffleTrainingArguments(
        folder,
        per_device_train_batch_size=batch_size,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=num_workers,
        dataloader_persistent_workers=num_workers > 0,
        dataloader_drop_last=True,
        bf16=torch.cuda.is_available(),
        report_to=[],
    )
    trainer = ls.LayerShuffleTrainer(model, args, train_dataset=dataset)
    trainer.create_optimizer()
    loader = trainer.get_train_dataloader()
    model = trainer.accelerator.prepare(model).train()

    def batches():
        for epoch in range(1_000_000):
            dataset.set_epoch(epoch)
            yield from loader

    stream = batches()
    fixed = trainer._prepare_inputs(next(stream))

    def step(batch) -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
        trainer.accelerator.backward(loss)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return lambda: [step(fixed) for _ in range(steps)], lambda: [step(next(stream)) for _ in range(steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default=None, help="Defaults to random images in a temporary folder.")
    parser.add_argument("--models", nargs="+", default=["the example's default", "cifar"], choices=list(MODELS))
    parser.add_argument(
        "--batch_size", type=positive, default=None, help="Defaults to the example's, and to 16 for the cifar model."
    )
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--pairs", type=positive, default=12)
    parser.add_argument("--steps", type=positive, default=2, help="Steps a measurement.")
    parser.add_argument("--images", type=positive, default=2048, help="Random images.")
    parser.add_argument("--threads", type=positive, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else None
    with tempfile.TemporaryDirectory() as folder:
        name = args.dataset_name or write_random_images(Path(folder), args.images)
        cache = {} if args.dataset_name else {"cache_dir": str(Path(folder, "cache"))}
        for model_name in args.models:
            splits = load_image_datasets(name, **cache)
            model, processor = build_model(MODELS[model_name], splits)
            _, data_args, training_args = argument_parser.parse_arguments(["--dataset_name", name])
            starts = []
            for _ in range(2):
                start = time.perf_counter()
                dataset, _ = data_building.build_datasets(data_args, dict(splits), model, processor, seed=0)
                starts.append(time.perf_counter() - start)
            batch_size = args.batch_size or (BATCH_SIZES.get(model_name) or training_args.per_device_train_batch_size)
            steps = make_steps(model, dataset, batch_size, args.num_workers, args.steps, folder)
            pairs = measure_pairs(*steps, args.pairs, synchronize=synchronize)
            what = f"{model_name} model, {args.num_workers} workers"
            rows.append(pairs.row(what, "fixed batch", "<= 1.10", f"{args.steps} steps of {batch_size} images"))
            if model_name != args.models[0]:
                continue  # it found the file that the first model's start wrote
            note = f"{starts[0]:.3g} s against {starts[1]:.3g} s for {len(dataset)} images"
            rows.append(Row("decoding at the second start", "the first", starts[1] / starts[0], notes=note))
    record("Does the data path of examples/train.py keep up with the training step?", rows, vars(args))


if __name__ == "__main__":
    main()
