"""Is a layer controller worth more on images of lower quality, and if it saw such images in training?

    python experiments/corrupted_images.py digits --seeds 0 1 2
    python experiments/corrupted_images.py fashion-mnist --dataset_name path/to/fashion-mnist --seeds 0 1 2

For each seed: the free model and its layer controller, as in `experiments/adaptive.py`, which trains those of the
digits, and a second controller that is trained here with `--augmentation_policy corruptions`. Test images as they are,
blurred, noisy and of low contrast; beside the controllers their one best choice for all images, evenly spaced and
random layers. What is chosen for all images is chosen on clean ones that no model was trained on. Prints a table of
means and sample standard deviations over the seeds, in percent, in Markdown. A seed of Fashion-MNIST takes ten minutes
of one core; a stopped run goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adaptive import DATASETS, DIGITS_HELD_OUT, REPOSITORY, datasets_of, folders_of, train, train_missing

from hf_layershuffle.adaptive.budget_evaluation import evaluate_budget
from hf_layershuffle.checkpoints.identity import weights_digest
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.checkpoints.processing_classes import load_processing_class
from hf_layershuffle.common.checks import check_integers
from hf_layershuffle.common.files import write_text
from hf_layershuffle.data.corruptions import CORRUPTIONS, corrupted
from hf_layershuffle.layerwise import as_layerwise


POLICIES = ("layer-controller", "layer-controller-for-all", "evenly-spaced", "random-layers")
CONTROLLERS = {"clean": "trained on clean images", "corruptions": "trained on corrupted images too"}
# How the controllers of `experiments/adaptive.py` are trained
RECIPES = {
    "digits": [*DATASETS["digits"]["train"]["controller"], "--eval_fraction", str(DIGITS_HELD_OUT)],
    "fashion-mnist": (
        "--layer_controller True --model_name_or_path {free} --eval_split train --eval_fraction 0.1 "
        "--max_train_samples 10000 --num_train_epochs 10 --per_device_train_batch_size 128 --learning_rate 1e-3 "
        "--warmup_steps 0.05 --bf16 --save_strategy no --attn_implementation eager --max_eval_samples 250"
    ).split(),
}


def controllers_of(args: argparse.Namespace, seed: int) -> dict[str, Path]:
    """Folders of the models with both controllers, trained if they are not there.

    Raises:
        `ValueError`: if a model is not there that is not trained here.
    """
    folders = folders_of(args, seed)
    train_missing(args, seed, {kind: folders[kind] for kind in ("free", "controller")})
    for kind in ("free", "controller"):
        if not (folders[kind] / "config.json").is_file():
            raise ValueError(
                f"There is no {kind} model in '{folders[kind]}'; docs/adaptive-results.md says how to train it, and "
                f"--{kind} where it is."
            )
    second = folders["controller"].with_name(folders["controller"].name + "-corruptions")
    if not (second / "all_results.json").is_file():
        recipe = [part.format(free=folders["free"]) for part in RECIPES[args.dataset]]
        train(args, seed, second, [*recipe, "--augmentation_policy", "corruptions"])
    return dict(zip(CONTROLLERS, (folders["controller"], second)))


def accuracies_of(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """By images and policy: accuracies, a value for each number of layers; "whole" is all layers'."""
    model: Any = load_classifier(str(folder)).eval()
    processor: Any = load_processing_class(str(folder), model.config)
    data, held_out = datasets_of(args, model.config)
    if args.max_eval_samples is not None:
        data = data.shuffle(seed=seed).select(range(min(args.max_eval_samples, len(data))))
    num_channels = as_layerwise(model).num_channels
    found: dict[str, Any] = {}
    for name in ("clean", *CORRUPTIONS):
        print(f"{folder.name}: {name}", file=sys.stderr, flush=True)
        is_clean = name == "clean"
        report = evaluate_budget(
            model,
            data if is_clean else corrupted(data, processor, name, seed=seed, num_channels=num_channels),
            held_out,
            policies=POLICIES,
            num_layers_run=args.layers,
            processing_class=processor,
            max_calibration_samples=2000,
            measure_time=False,
            seed=seed,
            progress=False,
        )
        found[name] = {policy: [each.accuracy for each in points] for policy, points in report.by_policy().items()}
        found[name]["whole"] = [report.whole.accuracy] * len(args.layers)
    return found


def finished(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The accuracies of all seeds by controller. What a file holds of the same weights is not measured again."""
    path = args.folders / f"corrupted-images-{args.dataset}.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = []
    for seed in args.seeds:
        of_seed = {}
        for kind, folder in controllers_of(args, seed).items():
            weights = weights_digest(load_classifier(str(folder)))
            key = json.dumps([weights, args.dataset_name, seed, args.layers, args.max_eval_samples])
            if key not in known:
                known[key] = accuracies_of(args, seed, folder)
                write_text(path, json.dumps(known, indent=1))
            of_seed[kind] = known[key]
        found.append(of_seed)
    return found


def cell(values: list[float]) -> str:
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def table(found: list[dict[str, Any]], layers: list[int]) -> str:
    """A row for each controller, kind of images and number of layers."""
    headings = ("controller", "images", "layers", "all layers", *POLICIES)
    rows = [headings, ("---",) * len(headings)]
    for kind, described in CONTROLLERS.items():
        for name in ("clean", *CORRUPTIONS):
            for place, count in enumerate(layers):
                values = [cell([each[kind][name][policy][place] for each in found]) for policy in ("whole", *POLICIES)]
                rows.append((described, name.replace("_", " "), str(count), *values))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=tuple(DATASETS))
    parser.add_argument("--dataset_name", help="Folder or Hub id of the dataset. Defaults to its name.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, nargs="+", help="Numbers of layers. Defaults to half of the model's.")
    parser.add_argument("--folders", type=Path, default=REPOSITORY / "outputs" / "adaptive", help="Where models are.")
    parser.add_argument("--max_eval_samples", type=int, help="Test images, drawn by seed; all by default.")
    parser.add_argument("--train_arguments", default="", help="Further arguments for train.py, in one string.")
    for kind in ("free", "controller"):
        parser.add_argument(f"--{kind}", help="Folder in --folders, or a path, with {seed}.")
    parser.set_defaults(exits=None, plain=None)
    args = parser.parse_args()
    args.dataset_name = args.dataset_name or args.dataset
    args.layers = sorted(set(args.layers or {"digits": [3], "fashion-mnist": [6]}[args.dataset]))
    torch.set_num_threads(1)
    try:
        check_integers(max_eval_samples=(1 if args.max_eval_samples is None else args.max_eval_samples, 1))
        print(table(finished(args), args.layers))
    except subprocess.CalledProcessError as error:
        parser.error(f"{' '.join(map(str, error.cmd[1:]))} failed; see the .log file beside its folder.")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
