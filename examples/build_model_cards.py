"""Builds model_cards/: one folder for each of five models of the digits, exactly what `hf-layershuffle publish` would push.

    python examples/build_model_cards.py               # or `make model-cards`; about ten minutes on 2 cores
    python examples/build_model_cards.py vit-digits-plain

A model whose run is not recorded in outputs/ is trained by examples/train.py; one whose report is of other weights or
settings is evaluated. Prints a table of all models.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

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


def build(folder: Path, dataset) -> RobustnessReport:
    """Report, pictures, example images and card of the model in `folder`."""
    model, processor = load_classifier(str(folder)).eval(), load_image_processor(folder)
    dataset = match_labels(dataset, model.config, DATASET)
    report = RobustnessReport.load(folder) if (folder / REPORT_FILE).exists() else None
    if report is None or report.config.get("weights") != weights_digest(model):
        names = {"model_name": folder.name, "dataset_name": DATASET}
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
    parser.add_argument("models", nargs="*", help=f"Defaults to all: {', '.join(MODELS)}.")
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(MODELS))
    if unknown:
        parser.error(f"unknown models {', '.join(unknown)}; choose from {', '.join(MODELS)}.")
    dataset, reports = load_image_datasets(DATASET)["test"], {}
    for name in args.models or MODELS:
        run, arguments = MODELS[name]
        train(REPOSITORY / "outputs" / run, arguments)
        folder = REPOSITORY / "model_cards" / name
        copy_published(REPOSITORY / "outputs" / run, folder)
        reports[name] = build(folder, dataset)
    Console(width=200).print(compare_reports(reports))


if __name__ == "__main__":
    main()
