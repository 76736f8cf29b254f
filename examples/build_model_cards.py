"""Builds model_cards/: one folder for each model, exactly what `hf-layershuffle publish` would push.

    python examples/build_model_cards.py               # or `make model-cards`: five models of the digits, about ten
                                                       # minutes on 2 cores
    python examples/build_model_cards.py vit-digits-plain
    python examples/build_model_cards.py vit-fashion-mnist-layershuffle --dataset_name path/to/fashion-mnist

A model of the digits whose run is not recorded in outputs/ is trained by examples/train.py; the larger ones are those that
experiments/grid.py trained, in float16 and for RGB images. One whose report is of other weights or settings is
evaluated. Prints a table of all models.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from datasets import ClassLabel
from rich.console import Console
from torch import nn

import hf_layershuffle
from hf_layershuffle import RobustnessReport, compare_reports, evaluate_robustness
from hf_layershuffle.card_examples import write_examples
from hf_layershuffle.data import load_image_datasets, load_image_processor, match_labels
from hf_layershuffle.folder_records import TRAINING_FILE
from hf_layershuffle.layerwise import load_classifier, weights_digest
from hf_layershuffle.model_card import write_model_card
from hf_layershuffle.plotting import save_report_pictures
from hf_layershuffle.publishing import CODE_FILES, check_folder, published_files
from hf_layershuffle.report import REPORT_FILE


REPOSITORY = Path(__file__).resolve().parents[1]
OWNER, LICENSE, DATASET = "hf-layershuffle", "apache-2.0", "digits"
# Name of the model: folder of its run in outputs/, arguments of examples/train.py
MODELS = {
    "vit-digits-plain": ("digits-plain", ["--shuffle_mode", "none"]),
    "vit-digits-layerdrop": ("digits-layerdrop", ["--shuffle_mode", "none", "--layerdrop", "0.2"]),
    "vit-digits-layershuffle": ("digits-layershuffle", []),
    "vit-digits-layershuffle-depth": ("digits-layershuffle-depth", ["--depth_embedding"]),
    "vit-digits-layershuffle-predict": ("digits-layershuffle-predict", ["--position_predictor"]),
}
# Name of the model: folder of its run in outputs/reproduce/, names of the classes, which IDX files lack
LARGER_MODELS = {
    "vit-fashion-mnist-layershuffle": (
        "fashion-mnist-order-free-finetuned-distilled-0",
        ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
    ),
    "vit-cifar10-layershuffle": (
        "cifar10-small-order-free-finetuned-distilled-layerdrop-0",
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    ),
}
SETTINGS = {"num_orders": 32, "num_subsets": 8, "seed": 0}


def train(output_dir: Path, arguments: list[str]) -> None:
    """Trains if the run is not there; a run without a record is evaluated again, which records it."""
    if not (output_dir / TRAINING_FILE).exists():
        command = [sys.executable, REPOSITORY / "examples" / "train.py", "--output_dir", output_dir, *arguments]
        subprocess.run([str(part) for part in command], check=True)


def copy_published(source: Path, target: Path) -> None:
    """Brings what the run made into the model's folder; what is made here, and the card, stay."""
    target.mkdir(parents=True, exist_ok=True)
    for name in published_files(source):
        if "/" not in name and name not in ("README.md", REPORT_FILE) and not name.endswith(".png"):
            shutil.copy(source / name, target / name)
    for name in CODE_FILES:  # of this version, not of the one that the run was saved with
        shutil.copy(Path(hf_layershuffle.__file__).with_name(name), target / name)


def prepare_for_the_hub(folder: Path, class_names: list[str]) -> None:
    """Rewrites the weights in float16, names the classes, and lets a model of grey images read RGB ones, as pipelines pass
    them: with a third of the weight for each of three equal channels, the sum is the same."""
    model, processor = load_classifier(str(folder)), load_image_processor(folder)
    config, patches = model.config, model.base_model.embeddings.patch_embeddings
    if config.num_channels == 1:
        patches.projection.weight = nn.Parameter(patches.projection.weight.detach().repeat(1, 3, 1, 1) / 3)
        config.num_channels = 3
        processor.image_mean, processor.image_std = list(processor.image_mean) * 3, list(processor.image_std) * 3
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in enumerate(class_names)}
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)


def build(folder: Path, dataset, dataset_name: str) -> RobustnessReport:
    """Report, pictures, example images and card of the model in `folder`."""
    # The fused kernel for attention on CPUs is slow for sequences as short as these
    precision = {"dtype": torch.float32, "attn_implementation": "eager"}
    model, processor = load_classifier(str(folder), **precision).eval(), load_image_processor(folder)
    dataset = match_labels(dataset, model.config, dataset_name)
    report = RobustnessReport.load(folder) if (folder / REPORT_FILE).exists() else None
    if report is None or report.config.get("weights") != weights_digest(model):
        names = {"model_name": folder.name, "dataset_name": dataset_name}
        report = evaluate_robustness(model, dataset, image_processor=processor, **names, **SETTINGS)
        report.save(folder)
    save_report_pictures({report.model: report}, folder)
    write_examples(folder, dataset, processor)
    write_model_card(folder, repo_id=f"{OWNER}/{folder.name}", license=LICENSE)
    check_folder(folder)
    for path in set(folder.iterdir()) - {folder / name.split("/")[0] for name in published_files(folder)}:
        path.unlink()  # pictures in other formats
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"Defaults to {', '.join(MODELS)}. Also {', '.join(LARGER_MODELS)}.")
    parser.add_argument("--dataset_name", help="Of the larger models: a folder or a Hub id.")
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(MODELS) - set(LARGER_MODELS))
    if unknown:
        parser.error(f"unknown models {', '.join(unknown)}; choose from {', '.join([*MODELS, *LARGER_MODELS])}.")
    larger = [name for name in args.models if name in LARGER_MODELS]
    if larger and args.dataset_name is None:
        parser.error(f"{larger[0]} needs --dataset_name, the images that it is evaluated on.")
    reports = {}
    for name in args.models or MODELS:
        folder = REPOSITORY / "model_cards" / name
        if name in LARGER_MODELS:
            (run, class_names), dataset_name = LARGER_MODELS[name], args.dataset_name
            run = REPOSITORY / "outputs" / "reproduce" / run
            if not run.is_dir():
                parser.error(f"there is no run '{run}'; train it by experiments/grid.py: see docs/results.md.")
        else:
            run, dataset_name = REPOSITORY / "outputs" / MODELS[name][0], DATASET
            train(run, MODELS[name][1])
        copy_published(run, folder)
        dataset = load_image_datasets(dataset_name)["test"]
        if name in LARGER_MODELS:
            prepare_for_the_hub(folder, class_names)
            dataset = dataset.cast_column("label", ClassLabel(names=class_names))
            # Half the time; the accuracies of a trial were equal to 4 digits
            torch.set_float32_matmul_precision("medium")
        reports[name] = build(folder, dataset, Path(dataset_name).name)
    Console(width=200).print(compare_reports(reports))


if __name__ == "__main__":
    main()
