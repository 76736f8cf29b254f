"""How long does it take to fine-tune ViT-B/16 to free order on one GPU, and how much memory?

    python benchmarks/fine_tune.py                          # the command of the README; about two minutes
    python benchmarks/fine_tune.py --torch_compile          # compiled layer by layer
    python benchmarks/fine_tune.py --teacher                # also learns from the answers of the plain model
    python benchmarks/fine_tune.py --tiny --device cpu      # tries the script out

Runs that command, compiled only if you say so, but on a random ViT-B/16 and random images of 224 pixels, for `--steps`
optimizer steps after `--warm_up` first ones, which are not measured. All are steps of one pass, as most of a long
run are: between two passes, workers start anew. Prints the time of a step, images a second, the peak of
memory, and the hours that 10 passes over 100,000 images and over ImageNet-1k's 1,281,167 would take at this speed.
Evaluations, checkpoints, the first decoding of the images and the time between two passes are not in them.
"""

import argparse
import shlex
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import Row, positive, record
from PIL import Image
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

import hf_layershuffle as ls
from hf_layershuffle.training.session import TrainingSession


OPTIONS = """
    --ignore_mismatched_sizes --preset order-free --per_device_train_batch_size 256 --num_train_epochs 10
    --learning_rate 1e-4 --layer_lr_decay 0.9 --drop_path_rate 0.1 --ema_decay 0.9995 --bf16
"""
# What would disturb the measurement, or needs a folder that stays
MEASURED = "--save_strategy no --eval_strategy no --report_to none --logging_steps 1000000 --disable_tqdm True"
TINY = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, image_size=32)
EPOCHS = 10
DATASETS = {"100,000 images": 100_000, "ImageNet-1k": 1_281_167}
NUM_CLASSES = 10


class Clock(TrainerCallback):
    """Times the steps after the first ones, which compile and fill caches. The host waits twice only."""

    def __init__(self, first: int, last: int, device: str):
        self.first, self.last, self.device = first, last, device
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.first, self.last):
            if self.device == "cuda":
                torch.cuda.synchronize()
                if state.global_step == self.first:
                    torch.cuda.reset_peak_memory_stats()
            self.times.append(time.perf_counter())

    @property
    def seconds_a_step(self) -> float:
        return (self.times[1] - self.times[0]) / (self.last - self.first)


def write_inputs(folder: Path, tiny: bool, num_images: int) -> tuple[str, str]:
    """A random ViT-B/16 with its image processor, and a folder of random images: their paths.

    Beside the `num_images` of the training split there are 16 to evaluate by, without which no run starts.
    """
    set_seed(0)
    config = ViTConfig(**(TINY if tiny else {}), num_labels=NUM_CLASSES)
    size = {"height": config.image_size, "width": config.image_size}
    processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for part in (ViTForImageClassification(config), processor):
        part.save_pretrained(folder / "vit")
    rng = np.random.default_rng(0)
    for number in range(num_images + 16):
        split = "train" if number < num_images else "test"
        path = folder / "images" / split / f"class{number % NUM_CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Coarse noise, which JPEG compresses about as it does photographs
        pixels = rng.integers(0, 256, (config.image_size // 8, config.image_size // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((config.image_size, config.image_size)).save(path)
    return str(folder / "vit"), str(folder / "images")


def batch_size_of(args) -> int:
    options = shlex.split(OPTIONS)
    return args.batch_size or int(options[options.index("--per_device_train_batch_size") + 1])


def command(args, model: str, images: str, output: Path) -> list[str]:
    argv = shlex.split(OPTIONS) + shlex.split(MEASURED)
    argv += ["--model_name_or_path", model, "--dataset_name", images, "--output_dir", str(output)]
    argv += ["--max_steps", str(args.warm_up + args.steps)]
    argv += ["--teacher_model_name_or_path", model] if args.teacher else []
    argv += ["--torch_compile", "True"] if args.torch_compile else []
    argv += ["--per_device_train_batch_size", str(args.batch_size)] if args.batch_size else []
    argv += ["--use_cpu"] if args.device == "cpu" else []
    return [*argv, *shlex.split(args.options)]


def run(args) -> list[Row]:
    """Trains, and gives what was measured."""
    with tempfile.TemporaryDirectory() as folder:
        num_images = (args.warm_up + args.steps) * batch_size_of(args)
        model, images = write_inputs(Path(folder), args.tiny, num_images)
        with TrainingSession(command(args, model, images, Path(folder, "run"))) as session:
            [prepared] = session.runs
            images_a_step = prepared.args.per_device_train_batch_size * prepared.args.gradient_accumulation_steps
            if images_a_step * prepared.args.max_steps > len(session.train_dataset):
                raise SystemExit(
                    "The steps would go on into a second pass; set the images a step by --batch_size alone."
                )
            clock = Clock(args.warm_up, args.warm_up + args.steps, args.device)
            trainer = ls.LayerShuffleTrainer(
                model=prepared.model,
                teacher_model=prepared.teacher.model,
                args=prepared.args,
                train_dataset=session.train_dataset,
                processing_class=prepared.processing_class,
                callbacks=[clock],
            )
            trainer.train()
    return rows(args, clock.seconds_a_step, images_a_step)


def rows(args, seconds: float, images_a_step: int) -> list[Row]:
    what = f"{'tiny' if args.tiny else 'ViT-B/16'}, {images_a_step} images a step"
    what += ", compiled" if args.torch_compile else ""
    what += ", with a teacher" if args.teacher else ""
    speed = images_a_step / seconds
    found = [
        Row(what, "", seconds, unit="seconds a step"),
        Row(what, "", speed, unit="images a second"),
    ]
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        reserved = torch.cuda.max_memory_reserved() / 2**30
        found.append(Row(what, "", peak, unit="GiB at most", notes=f"{reserved:.1f} GiB reserved"))
    for name, count in DATASETS.items():
        found.append(Row(f"{what}: {EPOCHS} passes over {name}", "", EPOCHS * count / speed / 3600, unit="hours"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=positive, default=20, help="Steps that are measured.")
    parser.add_argument("--warm_up", type=int, default=5, help="Steps before them.")
    parser.add_argument("--batch_size", type=positive, default=None, help="Images a step; the command's if left out.")
    parser.add_argument("--teacher", action="store_true", help="Distill from the plain model.")
    parser.add_argument("--torch_compile", action="store_true", help="Compile the layers.")
    parser.add_argument("--options", default="", help="More options of the command, as one text.")
    parser.add_argument("--tiny", action="store_true", help="A tiny model.")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device; try the script out with --tiny --device cpu.")
    question = "How long does it take to fine-tune ViT-B/16 to free order on one GPU, and how much memory?"
    record(question, run(args), vars(args), f"The command: hf-layershuffle train {' '.join(OPTIONS.split())}")


if __name__ == "__main__":
    main()
