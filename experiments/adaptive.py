"""Accuracy against cost for all ways to run fewer layers, beside plain models of fewer layers, over seeds.

    python experiments/adaptive.py digits --seeds 0 1 2                # trains what it needs into outputs/adaptive
    python experiments/adaptive.py fashion-mnist --dataset_name path/to/fashion-mnist --seeds 0 1 2
    python experiments/adaptive.py --render                            # page and picture from the records alone

For each seed there are up to four kinds of models: a free one; the same with exits that were trained; the same with a
layer controller; and plain ones of fewer layers. Those of Fashion-MNIST are trained before, by `experiments/grid.py`
and `examples/train.py`; `--free`, `--exits`, `--controller` and `--plain` say where they are, with {seed} and {layers}
in the place of numbers. A kind that is not there is left out, and named. All were trained without the images on which
thresholds and programs are chosen: of Fashion-MNIST a tenth of the training split (`--eval_split train --eval_fraction
0.1`), of the digits one half of the images held out (`--eval_fraction 0.4`), the other half of which is reported on. A
seed takes a quarter of an hour of one core; a stopped run goes on where it stopped. Each seed is a line of
experiments/records/adaptive.jsonl.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from hf_layershuffle.adaptive.budget_evaluation import POLICIES, evaluate_budget
from hf_layershuffle.adaptive.budget_report import MULTIPLY_ADDS, BudgetPoint, BudgetReport, time_cost, with_fronts
from hf_layershuffle.adaptive.measured_cost import some_of
from hf_layershuffle.adaptive.policies import AsConfigured, CalibratedPolicy, Calibration
from hf_layershuffle.checkpoints.loading import load_classifier
from hf_layershuffle.checkpoints.processing_classes import load_processing_class
from hf_layershuffle.common.files import write_text
from hf_layershuffle.data.datasets import load_image_datasets
from hf_layershuffle.layerwise import as_layerwise, batches_for
from hf_layershuffle.models.configuration_layershuffle import num_layers_of
from hf_layershuffle.plotting.budget import accuracy_limits, draw_budget_panel
from hf_layershuffle.plotting.style import PAGE_WIDTH, accuracy_label, legend_below, save_figure, styled


REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS = REPOSITORY / "experiments" / "records" / "adaptive.jsonl"
PAGE = REPOSITORY / "docs" / "adaptive-results.md"
PICTURE = "adaptive-budget"
MARKERS = [f"<!-- {word} adaptive: rendered by experiments/adaptive.py -->" for word in ("begin", "end")]
SEARCH_SAMPLES = 256
NUMBERED = ("threshold", "cost weight")  # how labels begin that are numbers
# Kinds of further weights, with the policies of the free model that are measured with these too
OTHER_WEIGHTS = {"exits": ("exit-probability",), "controller": ()}
# Of each dataset: where its models are, and what trains those that are not there
DATASETS: dict[str, dict[str, Any]] = {
    "fashion-mnist": {
        "free": "fashion-mnist-order-free-finetuned-distilled-{seed}-held_out",
        "exits": "fashion-mnist-exits-{seed}-held_out",
        "controller": "fashion-mnist-controller-{seed}-held_out",
        "plain": "fashion-mnist-plain-init-{seed}-num_hidden_layers{layers}-held_out",
        "layers": (3, 4, 6, 9),
        "train": {},
    },
    "digits": {
        "free": "digits-free-{seed}",
        "exits": "digits-exits-{seed}",
        "controller": "digits-controller-{seed}",
        "plain": "digits-plain-{seed}-{layers}",
        "layers": (2, 3, 4),
        "train": {
            "free": [],
            "exits": "--early_exit pondernet --model_name_or_path {free} --num_train_epochs 20".split(),
            "controller": (
                "--layer_controller True --model_name_or_path {free} --num_train_epochs 10 --learning_rate 1e-3"
            ).split(),
            "plain": "--shuffle_mode none --num_hidden_layers {layers}".split(),
        },
    },
}
DIGITS_HELD_OUT = 0.4
TRAIN = "--use_cpu --eval_strategy no --save_total_limit 1 --final_eval_orders 8 --report_to none".split()


def folders_of(args: argparse.Namespace, seed: int) -> dict[str, Path]:
    """Folders by kind of model; "plain 3" is the plain model of three layers."""

    def folder(pattern: str, **numbers: int) -> Path:
        path = Path(pattern.format(seed=seed, **numbers))
        return path if path.is_absolute() else args.folders / path

    known = DATASETS[args.dataset]
    found = {kind: folder(getattr(args, kind) or known[kind]) for kind in ("free", "exits", "controller")}
    plain = args.plain or known["plain"]
    return found | {f"plain {number}": folder(plain, layers=number) for number in args.layers or known["layers"]}


def train_missing(args: argparse.Namespace, seed: int, folders: dict[str, Path]) -> None:
    """Trains the models that are not there, where the dataset is one for which that is quick."""
    recipes = DATASETS[args.dataset]["train"]
    for kind, folder in folders.items():
        name, _, layers = kind.partition(" ")
        if name not in recipes or (folder / "all_results.json").is_file():
            continue
        arguments = [part.format(free=folders["free"], layers=layers) for part in recipes[name]]
        train(args, seed, folder, ["--eval_fraction", str(DIGITS_HELD_OUT), *arguments])


def train(args: argparse.Namespace, seed: int, folder: Path, arguments: list[str]) -> None:
    """Trains a model, or goes on with its training; a log is beside its folder."""
    print(f"Training {folder.name}", file=sys.stderr, flush=True)
    command = [sys.executable, str(REPOSITORY / "examples" / "train.py"), "--dataset_name", args.dataset_name, *TRAIN]
    command += [*arguments, "--seed", str(seed), "--output_dir", str(folder), *args.train_arguments.split()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


def datasets_of(args: argparse.Namespace, config: Any) -> tuple[Any, Any]:
    """What to report on, and what to choose on."""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    if args.dataset == "digits":
        held_out = load_image_datasets(args.dataset_name, eval_fraction=DIGITS_HELD_OUT)["test"]
        halves = held_out.train_test_split(0.5, seed=0, stratify_by_column="label")
        return halves["test"], halves["train"]
    split = load_image_datasets(args.dataset_name, class_names=names, eval_split="train", eval_fraction=0.1)
    return load_image_datasets(args.dataset_name, class_names=names)["test"], split["test"]


def policies_with(kind: str, model: Any, free: Any, calibration: Calibration) -> list[CalibratedPolicy]:
    """The policies of other weights than the free model's: those that it has not, and a few that it has."""
    made = replace(calibration, model=model)
    found: list[CalibratedPolicy] = []
    for policy in POLICIES:
        is_its_own = policy.applies_to(model) and not policy.applies_to(free) and policy is not AsConfigured
        if is_its_own:
            found.append(policy(made))
        elif policy.name in OTHER_WEIGHTS[kind]:
            renamed: Any = type(policy.__name__, (policy,), {"name": f"{policy.name}, weights of trained exits"})
            found.append(renamed(made))
    return found


def measured(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The record of a seed."""
    folders = folders_of(args, seed)
    train_missing(args, seed, folders)
    there = {kind: folder for kind, folder in folders.items() if (folder / "config.json").is_file()}
    if "free" not in there:
        raise ValueError(f"There is no free model in '{folders['free']}'; say where it is by --free.")
    for kind in folders.keys() - there.keys():
        print(f"Without {kind}: there is no '{folders[kind]}'.", file=sys.stderr)
    models: dict[str, Any] = {kind: load_classifier(str(folder)).eval() for kind, folder in there.items()}
    free = models["free"]
    processor = load_processing_class(str(there["free"]), free.config)
    data, held_out = datasets_of(args, free.config)
    depth = num_layers_of(free.config)
    counts = sorted({count for count in args.layers or DATASETS[args.dataset]["layers"] if count <= depth})
    loader = batches_for(
        as_layerwise(free), held_out, processor, max_samples=args.max_calibration_samples, batch_size=args.batch_size,
        seed=seed,
    )  # fmt: skip
    calibration = Calibration(free, loader, some_of(loader, SEARCH_SAMPLES), counts, seed)
    extra: list[CalibratedPolicy] = []
    for kind in OTHER_WEIGHTS:
        extra += policies_with(kind, models[kind], free, calibration) if kind in models else []
    own = [policy.name for policy in POLICIES if policy.applies_to(free) and policy is not AsConfigured]
    rivals = {f"plain, {kind.split()[1]} layers": model for kind, model in models.items() if kind.startswith("plain")}
    if "exits" in models:
        rivals["trained exits, all layers"] = models["exits"]
    report = evaluate_budget(
        free,
        data,
        held_out,
        policies=[*own, *extra],
        rivals=rivals,
        num_layers_run=counts,
        processing_class=processor,
        batch_size=args.batch_size,
        max_samples=args.max_eval_samples,
        max_calibration_samples=args.max_calibration_samples,
        num_search_samples=SEARCH_SAMPLES,
        seed=seed,
        model_name=there["free"].name,
        dataset_name=args.dataset,
        progress_file=args.folders / f".adaptive-{args.dataset}-{seed}.json",
    )
    named = {kind: folder.name for kind, folder in there.items()}
    return {"dataset": args.dataset, "seed": seed, "models": named, "report": report.to_dict()}


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def add_record(path: Path, record: dict) -> None:
    """Writes a record in the place of the earlier one of the same dataset and seed."""
    key = (record["dataset"], record["seed"])
    others = [each for each in read_records(path) if (each["dataset"], each["seed"]) != key]
    records = sorted([*others, record], key=lambda each: (each["dataset"], each["seed"]))
    write_text(path, "".join(json.dumps(each) + "\n" for each in records))


def is_of_one_seed(point: BudgetPoint) -> bool:
    """Whether a setting's label is a number that is chosen anew for each seed."""
    return point.label.startswith(NUMBERED) and "Q-exit" not in point.label


def is_both(point: BudgetPoint) -> bool:
    """Whether a fixed threshold is also the one that a number of layers gave."""
    return point.label.startswith(NUMBERED) and not is_of_one_seed(point) and "max_mean_layers" in point.chosen


def aligned(seeds: list[list[BudgetPoint]]) -> list[list[tuple[str, BudgetPoint]]]:
    """The settings of one policy with names under which the seeds have the same ones.

    A name is the label. Where that is a number of one seed, it is the rank among the numbers of layers for which such
    numbers were chosen. A seed in which two numbers of layers gave the same setting has it under both. Without these
    numbers of layers (reports of earlier versions) it is the rank among the seed's own.
    """
    chosen = [[point for point in points if is_of_one_seed(point) or is_both(point)] for points in seeds]
    limits = [[point.chosen.get("max_mean_layers") for point in points] for points in chosen]
    ranked = sorted({limit for each in limits for limit in each if limit is not None})
    named = []
    for points, of_seed, limits_of_seed in zip(seeds, chosen, limits):
        found = [(point.label, point) for point in points if not is_of_one_seed(point)]
        kind = next((kind for kind in NUMBERED if of_seed and of_seed[0].label.startswith(kind)), "")
        if None in limits_of_seed:
            by_cost = sorted(of_seed, key=lambda point: point.multiply_adds)
            found += [(f"{kind} {rank} of {len(by_cost)}", point) for rank, point in enumerate(by_cost, 1)]
        else:
            for rank, limit in enumerate(ranked, 1):
                within = [pair for pair in zip(limits_of_seed, of_seed) if pair[0] <= limit]
                if within:
                    found.append((f"{kind} {rank} of {len(ranked)}", max(within, key=itemgetter(0))[1]))
        named.append(sorted(found, key=lambda pair: pair[1].multiply_adds))
    return named


def means_of(reports: list[BudgetReport]) -> tuple[BudgetReport, dict[tuple[str, str], list[BudgetPoint]]]:
    """A report of the means over seeds, and the points of each mean. Settings that a seed lacks are left out."""
    groups: dict[tuple[str, str], list[BudgetPoint]] = {}
    policies = [{report.whole.policy: [report.whole]} | report.by_policy() for report in reports]
    for policy in dict.fromkeys(name for each in policies for name in each):
        for named in aligned([each[policy] for each in policies if policy in each]):
            for name, point in named:
                groups.setdefault((policy, name), []).append(point)
    groups = {key: points for key, points in groups.items() if len(points) == len(reports)}
    found = [_mean_point(label, points) for (_, label), points in groups.items()]
    first = reports[0]
    whole, *points = with_fronts(found, first.costs)
    return replace(first, model=f"mean of {len(reports)} seeds", whole=whole, points=points), groups


def _mean_point(label: str, points: list[BudgetPoint]) -> BudgetPoint:
    layers = [point.mean_num_layers for point in points]
    ratios = [point.time_ratio for point in points]
    return replace(
        points[0],
        label=label,
        accuracy=float(np.mean([point.accuracy for point in points])),
        mean_num_layers=None if None in layers else float(np.mean([each or 0.0 for each in layers])),
        multiply_adds=float(np.mean([point.multiply_adds for point in points])),
        time_ratio={size: float(np.mean([each[size] for each in ratios])) for size in ratios[0]},
    )


def table(reports: list[BudgetReport]) -> str:
    """The means over seeds, in Markdown."""
    mean, groups = means_of(reports)
    sizes = list(mean.whole.time_ratio)
    times = [f"time, batch {size}" for size in sizes]
    header = ["way", "setting", "accuracy", "std", "layers", "million multiply-adds", *times]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for point in (mean.whole, *mean.points):
        accuracies = [each.accuracy for each in groups[(point.policy, point.label)]]
        layers = "" if point.mean_num_layers is None else f"{point.mean_num_layers:.2f}"
        marks = {cost: " *" if cost in point.on_front else "" for cost in mean.costs}
        cells = [point.policy, point.label, f"{point.accuracy:.4f}", f"{_spread(accuracies)}", layers]
        cells += [f"{point.multiply_adds / 1e6:.1f}{marks[MULTIPLY_ADDS]}"]
        cells += [f"{point.time_ratio[size]:.2f}{marks[time_cost(size)]}" for size in sizes]
        lines.append("| " + " | ".join(cells) + " |")
    first = reports[0]
    return "\n".join(
        [
            *lines,
            "",
            f"Mean and sample standard deviation over {len(reports)} seed{'s' * (len(reports) > 1)}, "
            f"{first.num_images:,} test images; thresholds and programs chosen on {first.num_chosen_on:,} others that "
            "no model was trained on. Time is a fraction of that of all layers, measured in turns with them. A star "
            "marks the Pareto front of a column.",
        ]
    )


def _spread(accuracies: list[float]) -> str:
    """The sample standard deviation; a dash for one seed."""
    return f"{np.std(accuracies, ddof=1):.4f}" if len(accuracies) > 1 else "–"


@styled
def picture(by_dataset: dict[str, list[BudgetReport]]) -> Figure:
    """Accuracy against multiply-adds and time, a row for each dataset; means over seeds."""
    means = {dataset: means_of(reports)[0] for dataset, reports in by_dataset.items()}
    names = list(dict.fromkeys(name for mean in means.values() for name in mean.by_policy()))
    figure = Figure(figsize=(PAGE_WIDTH, 1.2 + 2.7 * len(means)), layout="constrained")
    rows = figure.subplots(len(means), 2, squeeze=False, sharey="row")
    for row, (dataset, mean) in zip(rows, means.items()):
        for axes, cost in zip(row, (MULTIPLY_ADDS, mean.costs[-1])):
            draw_budget_panel(axes, mean, cost, names)
        row[0].set_ylim(*accuracy_limits(mean))
        row[0].set_ylabel(accuracy_label([mean]))
        row[0].set_title(f"{dataset}: multiply-adds")
    figure.suptitle("Accuracy against cost, means over seeds", x=0.01, horizontalalignment="left")
    most = max(range(len(means)), key=lambda index: len(list(means.values())[index].by_policy()))
    legend_below(figure, rows[most][0], max_columns=4)
    return figure


def render(records: list[dict], page: Path) -> None:
    """Writes the picture beside the page, and the tables into it."""
    by_dataset: dict[str, list[BudgetReport]] = {}
    for record in records:
        by_dataset.setdefault(record["dataset"], []).append(BudgetReport.from_dict(record["report"]))
    save_figure(picture(by_dataset), page.parent / PICTURE)
    begin, end = MARKERS
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"'{page}' lacks the lines '{begin}' and '{end}', between which the tables go.")
    sections = [f"## {dataset}\n\n{table(reports)}" for dataset, reports in sorted(by_dataset.items())]
    shown = f"![Accuracy against multiply-adds and time]({PICTURE}.png)"
    write_text(page, f"{before}{begin}\n\n" + "\n\n".join([shown, *sections]) + f"\n\n{end}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", choices=[*DATASETS])
    parser.add_argument("--dataset_name", help="Folder or Hub id of the dataset. Defaults to its name.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folders", type=Path, default=REPOSITORY / "outputs" / "adaptive", help="Where models are.")
    for kind in ("free", "exits", "controller", "plain"):
        parser.add_argument(f"--{kind}", help="Folder in --folders, or a path, with {seed} (and {layers}).")
    parser.add_argument("--layers", type=int, nargs="+", help="Numbers of layers of settings and plain models.")
    parser.add_argument("--batch_size", type=int, default=200)
    parser.add_argument("--max_eval_samples", type=int, default=5000, help="Test images, drawn by seed.")
    parser.add_argument("--max_calibration_samples", type=int, default=2000)
    parser.add_argument("--train_arguments", default="", help="Further arguments for train.py, in one string.")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--render", action="store_true", help="Only write page and picture from the records.")
    args = parser.parse_args()
    if args.dataset is None and not args.render:
        parser.error("name a dataset, or pass --render.")
    torch.set_num_threads(1)
    try:
        for seed in () if args.render else args.seeds:
            args.dataset_name = args.dataset_name or args.dataset
            add_record(args.records, measured(args, seed))
        render(read_records(args.records), args.page)
    except subprocess.CalledProcessError as error:
        parser.error(f"{' '.join(map(str, error.cmd[1:]))} failed; see the .log file beside its folder.")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"Results: {args.records}; page: {args.page}")


if __name__ == "__main__":
    main()
