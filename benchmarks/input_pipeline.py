"""Do reading, decoding and augmentation keep up with training at 224 pixels, and does memory stay flat?

    python benchmarks/input_pipeline.py                            # 2,000 JPEG files of 500 x 375, ViT-S, 2 workers
    python benchmarks/input_pipeline.py --parts disk stream --device cuda --num_workers 14 --batch_size 128
    python benchmarks/input_pipeline.py --images 200 --stream_images 2000 --pairs 2    # a short try

A is a training step of ViT-S/16 on one batch that stays in memory; B the same step on images that are read, decoded,
cropped and augmented (preset `imagenet`, or `--augmentation`) on the way: from a dataset on the disk, and from a
stream of Parquet files. Both run in turn.

What it costs to read an image without decoding it, as for the images before the place where a run goes on, is measured
on Parquet files, with columns of these names and of others, and on tar files (WebDataset).

Then a stream of 50,000 images (the same files again and again) runs without a model, and the resident memory of all
processes is read on the way: the median of its last quarter against that of its second.
"""

import argparse
import io
import itertools
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from harness import Row, measure_pairs, positive, quartiles, record
from PIL import Image as PILImage
from train_step import SIZES
from transformers import ViTImageProcessor, set_seed

import hf_layershuffle as ls
from hf_layershuffle.data import Augmentation, ImageClassificationDataset, ImageStream, load_image_stream


NUM_CLASSES = 1000
SHARDS = 8
PARTS = ("disk", "stream", "skipping", "memory")


def write_photographs(folder: Path, count: int) -> None:
    """Parquet files of the form of ImageNet-1k's: `image` (JPEG of 500 x 375, about 50 kB) and `label`.

    Beside those to train on there is one to evaluate on, which a stream asks for.
    """
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {row}" for row in range(NUM_CLASSES)])})
    for shard in range(SHARDS):
        paths, labels = [], []
        for row in range(shard, count, SHARDS):
            coarse = PILImage.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            grain = rng.integers(-8, 9, (375, 500, 1))
            smooth = np.asarray(coarse.resize((500, 375), PILImage.Resampling.BICUBIC), dtype=np.int64)
            path = folder / f"{row}.jpg"
            PILImage.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=85)
            paths.append(str(path))
            labels.append(int(rng.integers(NUM_CLASSES)))
        rows = [{"image": {"bytes": Path(path).read_bytes(), "path": None}, "label": each} for path, each in
                zip(paths, labels)]  # fmt: skip
        Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{shard:05d}.parquet", batch_size=100)
        for path in paths:
            os.remove(path)
    rows = [{"image": rows[0]["image"], "label": label} for label in range(NUM_CLASSES)]  # those that tar files know
    Dataset.from_list(rows, features=features).to_parquet(folder / "test-00000.parquet", batch_size=100)


def write_copies(images: Path, folder: Path) -> dict[str, Path]:
    """The same images as tar files, and as Parquet files with columns of other names. Names say what they are."""
    copies = {"a Parquet file": images}
    copies |= {name: folder / name for name in ("a Parquet file with other columns", "a tar file")}
    for path in list(copies.values())[1:]:
        path.mkdir()
    for source in sorted(images.glob("*.parquet")):
        dataset = Dataset.from_parquet(str(source), cache_dir=str(folder / "copying"))
        dataset = dataset.cast_column("image", Image(decode=False)).cast_column("label", Value("int64"))
        renamed = dataset.cast_column("image", Image()).rename_columns({"image": "picture", "label": "target"})
        renamed.to_parquet(copies["a Parquet file with other columns"] / source.name, batch_size=100)
        with tarfile.open(copies["a tar file"] / f"{source.stem}.tar", "w") as file:
            for row, each in enumerate(dataset):
                for suffix, content in (("jpg", each["image"]["bytes"]), ("cls", str(each["label"]).encode())):
                    member = tarfile.TarInfo(f"{source.stem}-{row:06d}.{suffix}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
    return copies


def stream_of(folder: Path, processor, augmentation: Augmentation) -> ImageStream:
    """As the command streams it."""
    splits = load_image_stream(str(folder))
    known = {"num_samples": splits.num_samples, "is_length": splits.num_samples is not None, "files": splits.files}
    return ImageStream(
        splits.stream, processor, augmentation=augmentation, class_numbers=splits.class_numbers, **known
    )


def make_steps(dataset, args: argparse.Namespace, folder: str):
    """Two functions that take one step: on a fixed batch, and on the dataset."""
    set_seed(0)
    config = ls.LayerShuffleViTConfig(**SIZES["vit-s"], num_labels=NUM_CLASSES, shuffle_mode="arbitrary")
    model = ls.LayerShuffleViTForImageClassification(config)
    is_cuda = args.device == "cuda"
    training_args = ls.LayerShuffleTrainingArguments(
        folder,
        per_device_train_batch_size=args.batch_size,
        dataloader_num_workers=args.num_workers,
        dataloader_persistent_workers=args.num_workers > 0,
        dataloader_pin_memory=is_cuda,
        dataloader_drop_last=True,
        bf16=is_cuda,
        use_cpu=not is_cuda,
        report_to=[],
    )
    trainer = ls.LayerShuffleTrainer(model, training_args, train_dataset=dataset)
    trainer.create_optimizer()
    loader = trainer.get_train_dataloader()
    model = trainer.accelerator.prepare(model).train()

    def batches():
        for epoch in itertools.count():
            dataset.set_epoch(epoch)
            yield from loader

    stream = batches()
    fixed = trainer._prepare_inputs(next(stream))

    def step(batch) -> None:
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        trainer.accelerator.backward(loss)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return lambda: step(dict(fixed)), lambda: step(next(stream))


def step_row(name: str, dataset, args: argparse.Namespace, folder: str) -> Row:
    synchronize = torch.cuda.synchronize if args.device == "cuda" else None
    pairs = measure_pairs(*make_steps(dataset, args, folder), args.pairs, synchronize=synchronize)
    what = f"ViT-S/16 on {name}, {args.num_workers} workers"
    return pairs.row(what, "fixed batch", "<= 1.10", f"steps of {args.batch_size} images")


def resident_bytes() -> int:
    """Memory of this process and of those that it started, as Linux says it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, waiting = 0, [os.getpid()]
    while waiting:
        process = waiting.pop()
        waiting += [child for child, parent in parents.items() if parent == process]
        try:
            found += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def memory_row(stream: ImageStream, args: argparse.Namespace, folder: str) -> Row:
    """Resident memory over a long stream, and how fast it runs without a model."""
    training_args = ls.LayerShuffleTrainingArguments(
        folder, per_device_train_batch_size=100, dataloader_num_workers=args.num_workers, use_cpu=True, report_to=[],
        dataloader_persistent_workers=args.num_workers > 0, dataloader_pin_memory=False,
    )  # fmt: skip
    tiny = ls.LayerShuffleViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    trainer = ls.LayerShuffleTrainer(
        ls.LayerShuffleViTForImageClassification(tiny), training_args, train_dataset=stream
    )
    loader = trainer.get_train_dataloader()
    readings = []
    seen, start = 0, time.perf_counter()
    for epoch in itertools.count():
        stream.set_epoch(epoch)
        for batch in loader:
            seen += len(batch["labels"])
            if seen >= (len(readings) + 1) * args.stream_images / 100:
                readings.append(resident_bytes())
        if seen >= args.stream_images:
            break
    seconds = time.perf_counter() - start
    quarter = len(readings) // 4
    early, late = readings[quarter : 2 * quarter], readings[-quarter:]
    ratios = [each / statistics.median(early) for each in late]
    note = (
        f"{statistics.median(early) / 2**20:.0f} MiB against {statistics.median(late) / 2**20:.0f} MiB, at most "
        f"{max(readings) / 2**20:.0f}; {seen / seconds:.0f} images/s without a model"
    )
    what = f"memory of all processes, end of a stream of {seen:,} images"
    return Row(what, "its second quarter", statistics.median(ratios), quartiles(ratios), len(late),
               unit="memory", target="<= 1.05", notes=note)  # fmt: skip


def skip_row(name: str, stream: ImageStream, repeats: int = 5) -> Row:
    """What it costs to go on in the middle of a pass: reading without decoding, against decoding and cropping."""
    reading, decoding = [], []
    for number in range(repeats):
        start = time.process_time()
        read = list(stream.samples(number))
        reading.append((time.process_time() - start) / len(read))
        start = time.process_time()
        stream.__getitems__(read[:200])
        decoding.append((time.process_time() - start) / 200)
    ratios = [one / other for one, other in zip(reading, decoding)]
    note = (
        f"{1e3 * statistics.median(reading):.2f} ms of the CPU to read an image, "
        f"{1e3 * statistics.median(decoding):.2f} ms to decode, crop and augment it"
    )
    return Row(f"reading an image of {name}", "decoding it", statistics.median(ratios), quartiles(ratios), repeats,
               unit="CPU time", notes=note)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--augmentation", default="imagenet", help="none, light, cifar, imagenet or deit.")
    parser.add_argument("--images", type=positive, default=2000, help="Generated JPEG files.")
    parser.add_argument("--stream_images", type=positive, default=50_000, help="Images of the long stream.")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=positive, default=16)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--pairs", type=positive, default=10)
    parser.add_argument("--threads", type=positive, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    processor = ViTImageProcessor(size={"height": 224, "width": 224})
    augmentation = Augmentation.from_preset(args.augmentation)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        write_photographs(images, args.images)
        stream = stream_of(images, processor, augmentation)
        if "disk" in args.parts:
            files, cache = f"{images}/train-*.parquet", str(Path(folder, "cache"))
            stored = load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
            dataset = ImageClassificationDataset(stored, processor, augmentation=augmentation)
            rows.append(step_row("a dataset on the disk", dataset, args, folder))
        if "stream" in args.parts:
            rows.append(step_row("a stream", stream, args, folder))
        if "skipping" in args.parts:
            copies = write_copies(images, Path(folder)).items()
            rows += [skip_row(name, stream_of(path, processor, augmentation)) for name, path in copies]
        if "memory" in args.parts:
            rows.append(memory_row(stream, args, folder))
    record("Do reading, decoding and augmentation keep up with training?", rows, vars(args))


if __name__ == "__main__":
    main()
