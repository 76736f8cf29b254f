"""What leaving early costs on test images, by rules chosen on images that no model was trained on.

    python experiments/calibrated_exits.py --dataset_name path/to/fashion-mnist --seeds 0 1 2

For the free models of experiments/adaptive.py, and for the same with trained exits, `calibrate_exit` chooses the rule
that loses at most half a point, and the one of at most six layers on average, on the tenth of the training split that
was held out. Prints a table in Markdown: layers run and accuracy lost on the test split, mean and sample standard
deviation over seeds. The control of the trained exits, which leaves by a coin, stands below it.
"""

import argparse
from pathlib import Path

import numpy as np
from adaptive import DATASETS
from intervals import mean_std

from hf_layershuffle import answers_after_layers, calibrate_exit, load_classifier, load_image_processor
from hf_layershuffle.adaptive.exit_calibration import PATIENCE
from hf_layershuffle.adaptive.layer_answers import LayerAnswers
from hf_layershuffle.data.datasets import load_image_datasets
from hf_layershuffle.models.exit_rule import CRITERIA, HALTING, ExitRule


LIMITS = ({"max_accuracy_loss": 0.005}, {"max_mean_layers": 6})
KINDS = {"free": "the free model", "exits": "with trained exits"}
NUM_DRAWS = 20


def rules_of(folder: str, held_out, test, batch_size: int = 250) -> tuple[dict, LayerAnswers]:
    """Layers run and accuracy lost on the test split by (criterion, limit), and the answers to the test split."""
    model, processor = load_classifier(folder), load_image_processor(folder)
    how = {"processing_class": processor, "batch_size": batch_size}
    (answers,) = answers_after_layers(model, test, **how)
    whole, found = answers.is_right[:, -1].mean(), {}
    for criterion in (*CRITERIA, PATIENCE, *([HALTING] if HALTING in answers.confidences else [])):
        for limit in LIMITS:
            chosen = calibrate_exit(model, held_out, criterion=criterion, **limit, **how)
            rule = ExitRule(chosen.exit_threshold, chosen.exit_criterion, chosen.exit_patience)
            lost = whole - answers.is_right_by(rule).mean()
            found[(criterion, *limit)] = (answers.num_layers_run(rule).mean(), lost)
    return found | {"accuracy": whole}, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="Folder or Hub id of Fashion-MNIST.")
    parser.add_argument("--folders", type=Path, default=Path("outputs/adaptive"), help="Where models are.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    held_out = load_image_datasets(args.dataset_name, eval_split="train", eval_fraction=0.1)["test"]
    test = load_image_datasets(args.dataset_name)["test"]
    print("| weights | all layers | rule | lost ≤ 0.005: layers | lost | layers ≤ 6: layers | lost |")
    print("|---|---|---|---|---|---|---|")
    drawn = []
    for kind, name in KINDS.items():
        pattern = DATASETS["fashion-mnist"][kind]
        found = [rules_of(str(args.folders / pattern.format(seed=seed)), held_out, test) for seed in args.seeds]
        tables = [table for table, _ in found]
        for criterion in dict.fromkeys(key[0] for key in tables[0] if key != "accuracy"):
            cells = [mean_std([table["accuracy"] for table in tables]), criterion]
            for limit in LIMITS:
                layers, lost = zip(*(table[(criterion, *limit)] for table in tables))
                cells += [f"{np.mean(layers):.2f}", mean_std(list(lost))]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        drawn = [answers for _, answers in found if HALTING in answers.confidences]
    for answers in drawn:
        draws = answers.drawn_exits(NUM_DRAWS)
        accuracies = [answers.is_right_at(draw).mean() for draw in draws]
        rule = ExitRule(0.5, "halting")
        print(
            f"Q-exit: {answers.is_right_by(rule).mean():.4f} after {answers.num_layers_run(rule).mean():.2f} layers; "
            f"by a coin, {NUM_DRAWS} draws: {np.mean(accuracies):.4f} ± {np.std(accuracies, ddof=1):.4f} after "
            f"{draws.mean():.2f} layers"
        )


if __name__ == "__main__":
    main()
