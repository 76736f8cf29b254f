"""Builds model_cards/: one folder for each model, exactly what `hf-layershuffle publish` would push, and the model
that comes with the package.

    python experiments/build_model_cards.py               # or `make model-cards`: keeps the weights; renews pictures,
                                                       # examples and cards; two minutes
    python experiments/build_model_cards.py --train vit-digits-plain
                                                       # takes the model of its run in outputs/; trains it if missing
    python experiments/build_model_cards.py --train vit-fashion-mnist-layershuffle --dataset_name path/to/fashion-mnist

The models of the digits are trained by examples/train.py; the larger ones are those that experiments/grid.py trained,
for RGB images. All weights are float32. A model whose report is of other weights is evaluated. Prints a table of the
digits' models.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel
from rich.console import Console
from torch import nn

import hf_layershuffle as ls
from hf_layershuffle import RobustnessReport, compare_reports, evaluate_robustness
from hf_layershuffle.checkpoints.identity import weights_digest
from hf_layershuffle.checkpoints.image_processors import load_image_processor
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.common.files import write_text
from hf_layershuffle.data.datasets import as_dataloader, load_image_datasets, match_labels
from hf_layershuffle.evaluation.fingerprint import expected_report, other_than
from hf_layershuffle.evaluation.report import REPORT_FILE
from hf_layershuffle.hub.card_examples import write_examples
from hf_layershuffle.hub.folder_records import METRICS, TRAINING_FILE, read_json, record_baseline
from hf_layershuffle.hub.model_card import write_model_card
from hf_layershuffle.hub.published_files import check_folder, published_files
from hf_layershuffle.plotting import save_report_pictures
from hf_layershuffle.swarm.expected_accuracy import DIGITS_REPORTS


REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = REPOSITORY / "model_cards"
RUNS = REPOSITORY / "outputs"
OWNER = "hf-layershuffle"
LICENSE = "apache-2.0"
DATASET = "digits"
# Name of the model: folder of its run in outputs/, arguments of examples/train.py
MODELS = {
    "vit-digits-plain": ("digits-plain", ["--shuffle_mode", "none"]),
    "vit-digits-layerdrop": ("digits-layerdrop", ["--shuffle_mode", "none", "--layerdrop", "0.2"]),
    "vit-digits-layershuffle": ("digits-layershuffle", []),
    "vit-digits-layershuffle-depth": ("digits-layershuffle-depth", ["--depth_embedding"]),
    "vit-digits-layershuffle-predict": ("digits-layershuffle-predict", ["--position_predictor"]),
}
BASELINE = "vit-digits-plain"
# A random merge of one model fine-tuned from three seeds
MERGED = "vit-digits-layershuffle-merged"
MERGED_FROM = "vit-digits-layershuffle"
MERGED_SEEDS = (1, 2, 3)
MERGE_NOTE = (
    "The sources are vit-digits-layershuffle, fine-tuned on the same training images for 20 more epochs with the "
    "seeds 1, 2 and 3. The merge is the random one of seed 0, not chosen among several; each layer stands at its own "
    "place."
)
# Name of the model: run in outputs/reproduce/, dataset on the Hub, names of the classes as there (IDX files lack them)
LARGER_MODELS = {
    "vit-fashion-mnist-layershuffle": (
        "fashion-mnist-order-free-finetuned-distilled-0",
        "zalando-datasets/fashion_mnist",
        ["T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
    ),
    "vit-cifar10-layershuffle": (
        "cifar10-small-order-free-finetuned-distilled-layerdrop-0",
        "uoft-cs/cifar10",
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


def merge(folder: Path) -> None:
    """Trains the sources and merges them; records what they are and how good they were."""
    runs = {
        f"{MERGED_FROM}-finetuned-{seed}": f"outputs/digits-layershuffle-finetuned-{seed}" for seed in MERGED_SEEDS
    }
    os.chdir(REPOSITORY)  # the plan is published, and names the sources' folders
    for seed, run in zip(MERGED_SEEDS, runs.values()):
        arguments = ["--model_name_or_path", f"model_cards/{MERGED_FROM}", "--num_train_epochs", "20"]
        train(Path(run), [*arguments, "--seed", str(seed)])
    shutil.rmtree(folder, ignore_errors=True)
    ls.merge(ls.MergePlan.random(runs, seed=0), folder)
    records = [read_json(Path(run, TRAINING_FILE)) for run in runs.values()]
    note = {"dataset": DATASET, "note": MERGE_NOTE, "versions": records[0]["versions"]}
    write_text(folder / TRAINING_FILE, json.dumps(note, indent=1) + "\n")
    means = {name: float(np.mean([record["metrics"][name] for record in records])) for name in METRICS}
    means["eval_arbitrary_accuracy_min"] = min(record["metrics"]["eval_arbitrary_accuracy_min"] for record in records)
    record_baseline(folder, "mean of the sources", means | {"num_orders": records[0]["metrics"]["num_orders"]})


def prepare_for_the_hub(folder: Path, class_names: list[str]) -> None:
    """Rewrites the weights in float32, names the classes, and lets a model of grey images read RGB ones.

    Pipelines pass RGB images. With a third of the weight for each of three equal channels, the sum is the same.
    """
    model = load_classifier(str(folder))
    processor = load_image_processor(folder)
    config = model.config
    patches = model.base_model.embeddings.patch_embeddings
    if config.num_channels == 1:
        patches.projection.weight = nn.Parameter(patches.projection.weight.detach().repeat(1, 3, 1, 1) / 3)
        config.num_channels = 3
        processor.image_mean, processor.image_std = list(processor.image_mean) * 3, list(processor.image_std) * 3
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in enumerate(class_names)}
    model.to(torch.float32).save_pretrained(folder)
    processor.save_pretrained(folder)


def build(folder: Path, dataset, dataset_name: str) -> RobustnessReport:
    """Makes code, report, pictures, example images and card of the model in `folder`.

    Without a dataset, the example images stay.
    """
    remove_code(folder)
    # The fused kernel for attention on CPUs is slow for sequences as short as these
    precision = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = load_classifier(str(folder), **precision).eval()
    processor = load_image_processor(folder)
    report = RobustnessReport.load(folder) if (folder / REPORT_FILE).exists() else None
    if dataset is None:
        is_current = report is not None and report.config.get("weights") == weights_digest(model)
        if not is_current:
            raise ValueError(f"'{folder.name}' has no report of its weights; give --dataset_name to evaluate it.")
    else:
        dataset = match_labels(dataset, model.config, dataset_name)
        loader = as_dataloader(dataset, processor, num_channels=model.config.num_channels)
        expected = expected_report(model, loader, processor, dataset=dataset_name, **SETTINGS)
        is_current = report is not None and other_than(report, expected) is None
    if not is_current:
        names = {"model_name": folder.name, "dataset_name": dataset_name}
        report = evaluate_robustness(model, dataset, image_processor=processor, **names, **SETTINGS)
        report.save(folder)
    save_report_pictures({report.model: report}, folder)
    if dataset is not None:
        write_examples(folder, dataset, processor)
    if dataset_name == DATASET and folder.name not in (BASELINE, MERGED):
        record_baseline(folder, f"baseline {BASELINE}", RobustnessReport.load(FOLDERS / BASELINE))
    (folder / "README.md").unlink(missing_ok=True)  # nobody writes into these by hand
    write_model_card(folder, repo_id=f"{OWNER}/{folder.name}", license=LICENSE)
    check_folder(folder)
    for path in set(folder.iterdir()) - {folder / name.split("/")[0] for name in published_files(folder)}:
        path.unlink()  # pictures in other formats
    return report


def remove_code(folder: Path) -> None:
    """Removes the code files, which publishing adds."""
    for path in folder.glob("*.py"):
        path.unlink()


def build_bundled_model(dataset) -> None:
    """Writes the model that comes with the package, without code or pictures.

    Its weights are float16, which halves the bytes, and are read as float32.
    """
    folder = Path(ls.example_model())
    source = FOLDERS / MERGED_FROM
    shutil.rmtree(folder, ignore_errors=True)
    model = load_classifier(str(source)).eval()
    processor = load_image_processor(source)
    model.to(torch.float16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
    del config["auto_map"]  # the code is the package's
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    remove_code(folder)
    processor.save_pretrained(folder)
    write_examples(folder, dataset, processor, num_examples=10)
    report = evaluate_robustness(load_classifier(str(folder)), dataset, image_processor=processor, **SETTINGS)
    text = (
        f"# Example model\n\n`{MERGED_FROM}` of model_cards/, with weights rounded to float16: a LayerShuffle ViT of "
        "scikit-learn's hand-written digits, 8 × 8 pixels.\n`hf_layershuffle.example_model()` is this folder.\n\nOf "
        f"the {report.num_images} test images it classifies the fraction {report.sequential.accuracy:.4f} correctly "
        f"in sequential order and {report.arbitrary.accuracy.mean:.4f} ± {report.arbitrary.accuracy.std:.4f}\nin "
        f"{report.num_orders} arbitrary ones. The images in examples/ are ones that it classifies correctly. Licence: "
        "Apache 2.0.\n"
    )
    write_text(folder / "README.md", text)


def write_digits_reports() -> None:
    """Copies the reports that `hf-layershuffle swarm simulate` takes when none is given into the package."""
    for kind, name in (("free", MERGED_FROM), ("plain", BASELINE)):
        report = RobustnessReport.load(FOLDERS / name).to_dict()
        write_text(DIGITS_REPORTS / f"{kind}.json", json.dumps(report, separators=(",", ":")) + "\n")


def main() -> None:
    known = [*MODELS, MERGED, *LARGER_MODELS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"Defaults to all: {', '.join(known)}.")
    parser.add_argument("--train", action="store_true", help="Take the models of their runs, trained if missing.")
    parser.add_argument(
        "--dataset_name", help="Dataset of a larger model, for its examples and its report: a folder or a Hub id."
    )
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(known))
    if unknown:
        parser.error(f"unknown models {', '.join(unknown)}; choose from {', '.join(known)}.")
    names = args.models or known
    reports = {}
    digits = load_image_datasets(DATASET)["test"]
    # Half the time for the larger ones; the accuracies of a trial were equal to 4 digits
    torch.set_float32_matmul_precision("medium")
    for name in names:
        folder = FOLDERS / name
        dataset = digits
        dataset_name = DATASET
        if name in LARGER_MODELS:
            run, dataset_name, class_names = LARGER_MODELS[name]
            run = RUNS / "reproduce" / run
            dataset = None
            if args.train and not run.is_dir():
                parser.error(f"there is no run '{run}'; train it by experiments/grid.py: see docs/results.md.")
            if args.train:
                copy_published(run, folder)
            prepare_for_the_hub(folder, class_names)
            if args.dataset_name is not None:
                dataset = load_image_datasets(args.dataset_name)["test"].cast_column(
                    "label", ClassLabel(names=class_names)
                )
        elif args.train and name == MERGED:
            merge(folder)
        elif args.train:
            run, arguments = MODELS[name]
            train(RUNS / run, arguments)
            copy_published(RUNS / run, folder)
        reports[name] = build(folder, dataset, dataset_name)
    if MERGED_FROM in names:
        build_bundled_model(digits)
    if {MERGED_FROM, BASELINE} & set(names):
        write_digits_reports()
    shown = {name: report for name, report in reports.items() if name not in LARGER_MODELS}
    if shown:
        Console(width=200).print(compare_reports(shown))


if __name__ == "__main__":
    main()
