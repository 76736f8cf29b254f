"""The paper's experiments: trains a grid of datasets, methods and seeds, records each run, and renders tables and pictures.

    python examples/reproduce.py --dataset_name /usr/share/datasets/fashion-mnist --preset fashion-mnist --seeds 0
    python examples/reproduce.py ... --methods plain layershuffle --seeds 0 1 2 --jobs 2
    python examples/reproduce.py ... --merges --methods plain order-free --seeds 0 1 2    # of the models of these runs
    python examples/reproduce.py --render                 # docs/results.md and its pictures, from the records alone

A run trains by examples/train.py, evaluates by `evaluate_robustness` and appends one line to `results/runs.jsonl`; what
is recorded there is skipped, and a run that was stopped goes on from its checkpoint. Prints a line a run.
"""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from transformers import HfArgumentParser


REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS = REPOSITORY / "results" / "runs.jsonl"
RESULTS_PAGE = REPOSITORY / "docs" / "results.md"
# With the initial weights of the preset, which suit the plain model too: the harder baseline
PLAIN_INIT = ["--shuffle_mode", "none", "--initializer_range", "0.0561", "--residual_init_scale", "0"]
ORDER_FREE = ["--preset", "order-free"]
# From the model that method plain-init trained with the same seed; and learning from its answers
FINE_TUNED = ["--model_name_or_path", "{plain-init}"]
DISTILLED = ["--teacher_model_name_or_path", "{plain-init}"]
METHODS = {
    "plain": ["--shuffle_mode", "none"],
    "layerdrop": ["--shuffle_mode", "none", "--layerdrop", "0.2"],
    "layershuffle": [],
    "depth": ["--depth_embedding"],
    "predict": ["--position_predictor"],
    "layershuffle-layerdrop": ["--layerdrop", "0.2"],
    # Retrained with as many layers as the pruned models have: the fair baseline for pruning
    "plain-3": ["--shuffle_mode", "none", "--num_hidden_layers", "3"],
    "plain-6": ["--shuffle_mode", "none", "--num_hidden_layers", "6"],
    "plain-9": ["--shuffle_mode", "none", "--num_hidden_layers", "9"],
    "plain-width": ["--shuffle_mode", "none", "--initializer_range", "0.0561"],
    "plain-init": PLAIN_INIT,
    "order-free": ORDER_FREE,
    "order-free-finetuned": [*ORDER_FREE, *FINE_TUNED],
    "order-free-distilled": [*ORDER_FREE, *DISTILLED],
    "order-free-finetuned-distilled": [*ORDER_FREE, *FINE_TUNED, *DISTILLED],
    # For models that will run with layers missing
    "order-free-finetuned-distilled-layerdrop": [*ORDER_FREE, "--layerdrop", "0.2", *FINE_TUNED, *DISTILLED],
    # What a teacher does for a plain model
    "plain-init-distilled": [*PLAIN_INIT, *DISTILLED],
}
LABELS = {
    "plain": "plain ViT",
    "layerdrop": "LayerDrop 0.2",
    "layershuffle": "LayerShuffle",
    "depth": "LayerShuffle-position (depth embedding)",
    "predict": "LayerShuffle-predict (position predictor)",
    "layershuffle-layerdrop": "LayerShuffle + LayerDrop 0.2",
    "plain-3": "plain ViT of 3 layers",
    "plain-6": "plain ViT of 6 layers",
    "plain-9": "plain ViT of 9 layers",
    "plain-width": "plain ViT, initial weights scaled to the width",
    "plain-init": "plain ViT, initial weights of the preset",
    "order-free": "preset order-free, from scratch",
    "order-free-finetuned": "preset order-free, fine-tuned",
    "order-free-distilled": "preset order-free, distilled",
    "order-free-finetuned-distilled": "preset order-free, fine-tuned and distilled",
    "order-free-finetuned-distilled-layerdrop": "preset order-free, fine-tuned and distilled, LayerDrop 0.2",
    "plain-init-distilled": "plain ViT, initial weights of the preset, distilled",
}
PICTURED = ("plain", "layerdrop", "layershuffle", "order-free", "order-free-finetuned-distilled")
PRESETS = {
    # 480,000 images seen
    "fashion-mnist": [
        *("--hidden_size", "96", "--num_hidden_layers", "12", "--patch_size", "7", "--num_channels", "1"),
        *("--num_train_epochs", "8", "--per_device_train_batch_size", "128", "--learning_rate", "1e-3"),
        *("--crop_padding", "0"),
    ],
    # 3,000,000 images seen: for a GPU
    "cifar10": [
        *("--hidden_size", "192", "--num_hidden_layers", "12", "--patch_size", "4"),
        *("--num_train_epochs", "60", "--per_device_train_batch_size", "128", "--learning_rate", "1e-3"),
    ],
    # 500,000 images seen: what a CPU can do
    "cifar10-small": [
        *("--hidden_size", "96", "--num_hidden_layers", "12", "--patch_size", "8"),
        *("--num_train_epochs", "10", "--per_device_train_batch_size", "128", "--learning_rate", "1e-3"),
        *("--crop_padding", "0"),
    ],
}
# Attention of such short sequences is slow in PyTorch's fused kernel for the CPU, in bfloat16 many times so
PRECISION = ["--bf16", "--attn_implementation", "eager"]


@dataclass
class GridArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "As for train.py: a folder or a Hub id."})
    preset: str = field(default="fashion-mnist", metadata={"help": f"Model and schedule: {', '.join(PRESETS)}."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Of the grid."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of the grid, each at least 0."})
    train_arguments: str = field(
        default="", metadata={"help": "Further arguments for train.py in one string; recorded with the run."}
    )
    held_out: bool = field(
        default=False,
        metadata={"help": "Evaluate on a tenth held out of the training split: to choose by, without the test split."},
    )
    merges: bool = field(
        default=False, metadata={"help": "Evaluate random merges of the seeds' models instead of training them."}
    )
    num_merges: int = field(default=20, metadata={"help": "Random merges of a method's models."})
    num_orders: int = field(default=32, metadata={"help": "Arbitrary orders of the evaluation."})
    num_subsets: int = field(default=4, metadata={"help": "Random subsets a number of layers of the evaluation."})
    jobs: int = field(default=1, metadata={"help": "Runs at a time, each with one thread if there are several."})
    work_dir: str = field(default="outputs/reproduce", metadata={"help": "For checkpoints and models."})
    records: str = field(default=str(RECORDS), metadata={"help": "The file with one JSON line a run."})
    page: str = field(default=str(RESULTS_PAGE), metadata={"help": "The page to render; its pictures lie beside it."})
    render: bool = field(default=False, metadata={"help": "Only render tables and pictures from the records."})


def check(args: GridArguments) -> None:
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        raise ValueError(f"`methods` holds '{unknown[0]}'; choose from {', '.join(METHODS)}.")
    if args.preset not in PRESETS:
        raise ValueError(f"`preset` is '{args.preset}'; choose from {', '.join(PRESETS)}.")
    if min(args.seeds) < 0 or args.jobs < 1:
        raise ValueError(f"Seeds must be at least 0 and `jobs` at least 1; they are {args.seeds} and {args.jobs}.")
    if args.dataset_name is None:
        raise ValueError("Give --dataset_name, as for train.py, or --render.")


def read_records(path: str) -> list[dict]:
    path = Path(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run_key(args: GridArguments, method: str, seed: int) -> dict:
    """What makes a run the same as a recorded one."""
    split = "held_out" if args.held_out else "test"
    return {
        "dataset": args.preset,
        "split": split,
        "method": method,
        "seed": seed,
        "train_arguments": args.train_arguments,
        "num_orders": args.num_orders,
    }


def run_folder(args: GridArguments, method: str, seed: int) -> Path:
    extra = "".join(args.train_arguments.split()).replace("--", "-").replace("/", "_")
    return Path(args.work_dir, f"{args.preset}-{method}-{seed}{extra}" + ("-held_out" if args.held_out else ""))


def train_command(args: GridArguments, method: str, seed: int, folder: Path) -> list[str]:
    held_out = ["--eval_split", "train", "--eval_fraction", "0.1"] if args.held_out else []
    if not torch.accelerator.is_available():
        held_out.append("--use_cpu")
    trained = {"plain-init": str(run_folder(args, "plain-init", seed))}
    method_arguments = [argument.format_map(trained) for argument in METHODS[method]]
    return [
        *(sys.executable, str(REPOSITORY / "examples" / "train.py"), "--dataset_name", args.dataset_name),
        *(*PRESETS[args.preset], *PRECISION, *method_arguments, *args.train_arguments.split(), *held_out),
        *("--seed", str(seed), "--output_dir", str(folder)),
        *("--eval_strategy", "no", "--save_total_limit", "1", "--final_eval_orders", "8", "--report_to", "none"),
    ]


def run_one(args: GridArguments, method: str, seed: int) -> dict:
    """Trains, evaluates and returns the record."""
    key = run_key(args, method, seed)
    folder = run_folder(args, method, seed)
    if "{plain-init}" in METHODS[method] and not run_folder(args, "plain-init", seed).is_dir():
        raise ValueError(
            f"Method {method} starts from the model of method plain-init with seed {seed}, which is not in "
            f"'{args.work_dir}'; run --methods plain-init --seeds {seed} first."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = train_command(args, method, seed, folder)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {})
    started = time.monotonic()
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    seconds = time.monotonic() - started
    report = evaluate(args, folder, environment)
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    return key | {
        "command": public_command(args, command),
        "images_seen": round(results["epoch"] * results["train_samples"]),
        "seconds": round(seconds),  # of this call: less than all where the run was stopped and went on
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {args.jobs} runs at a time",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "report": report,
    }


def public_command(args: GridArguments, command: list[str]) -> str:
    """Without where things lie on this machine."""
    places = {
        args.dataset_name: Path(args.dataset_name).name if Path(args.dataset_name).is_dir() else args.dataset_name
    }
    places |= {
        word: f"outputs/reproduce/{Path(word).name}" for word in command if Path(word).parent == Path(args.work_dir)
    }
    return " ".join(["python", "examples/train.py", *(places.get(word, word) for word in command[2:])])


def evaluate(args: GridArguments, folder: Path, environment: dict) -> dict:
    """By this file in a process of its own, so that several evaluations run at a time."""
    command = [sys.executable, __file__, "evaluate-folder", json.dumps(vars(args)), str(folder)]
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return json.loads((folder / "robustness.json").read_text(encoding="utf-8"))


def evaluate_folder(args: GridArguments, folder: str) -> None:
    import hf_layershuffle as ls
    from hf_layershuffle.data import load_image_datasets, load_image_processor
    from hf_layershuffle.layerwise import load_classifier

    split = {"eval_split": "train", "eval_fraction": 0.1} if args.held_out else {}
    torch.set_float32_matmul_precision("medium")
    report = ls.evaluate_robustness(
        load_classifier(folder, attn_implementation="eager"),
        load_image_datasets(args.dataset_name, **split)["test"],
        image_processor=load_image_processor(folder),
        num_orders=args.num_orders,
        num_subsets=args.num_subsets,
        batch_size=250,
        model_name=Path(folder).name,
        dataset_name=args.preset,
        progress_file=Path(folder, ".evaluation.npz"),
    )
    report.save(folder)


def run_grid(args: GridArguments) -> None:
    """All runs that are not recorded, seed by seed, each recorded as soon as it is done."""
    check(args)
    recorded = read_records(args.records)
    todo = [
        (method, seed)
        for seed in args.seeds
        for method in args.methods
        if not any(run_key(args, method, seed).items() <= record.items() for record in recorded)
    ]
    lock, path = threading.Lock(), Path(args.records)
    path.parent.mkdir(parents=True, exist_ok=True)

    def run_and_record(method: str, seed: int) -> None:
        record = run_one(args, method, seed)
        with lock, open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        report = record["report"]
        arbitrary = report["arbitrary"]["accuracy"]
        print(
            f"{method}, seed {seed}: sequential {report['sequential']['accuracy']:.4f}, arbitrary {arbitrary['mean']:.4f}, "
            f"worst {arbitrary['min']:.4f} ({record['seconds']} s)",
            flush=True,
        )

    print(f"{len(todo)} runs to do", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(run_and_record, *each) for each in todo]:
            future.result()


def run_merges(args: GridArguments) -> None:
    """Evaluates random merges of the models that the seeds of each method gave, and records them."""
    import hf_layershuffle as ls
    from hf_layershuffle.data import load_image_datasets, load_image_processor
    from hf_layershuffle.layerwise import load_classifier

    check(args)
    if len(args.seeds) < 2:
        raise ValueError(f"Merges need models of two seeds or more; `seeds` is {args.seeds}.")
    test_images = load_image_datasets(args.dataset_name)["test"]
    torch.set_float32_matmul_precision("medium")
    for method in args.methods:
        key = run_key(args, method, args.seeds[0]) | {"seed": None, "split": "test", "merged_seeds": args.seeds}
        if any(key.items() <= record.items() for record in read_records(args.records)):
            continue
        folders = {f"seed {seed}": run_folder(args, method, seed) for seed in args.seeds}
        reports = {
            kind: ls.evaluate_random_merges(
                {name: load_classifier(folder, attn_implementation="eager") for name, folder in folders.items()},
                test_images,
                image_processor=load_image_processor(next(iter(folders.values()))),
                num_merges=args.num_merges,
                any_layer=kind == "any_layer",
                batch_size=250,
                name=method,
                dataset_name=args.preset,
            )
            for kind in ("in_place", "any_layer")
        }
        accuracies = {kind: [merge.accuracy for merge in report.merges] for kind, report in reports.items()}
        with open(args.records, "a", encoding="utf-8") as file:
            file.write(json.dumps(key | {"merges": accuracies}) + "\n")
        print(f"{method}, merges: " + ", ".join(f"{kind} {mean_std(each)}" for kind, each in accuracies.items()))


# --- Tables and pictures ---


def render(args: GridArguments) -> None:
    """Writes each dataset's tables and pictures into the page, between the dataset's markers; the text around them stays."""
    from hf_layershuffle import RobustnessReport
    from hf_layershuffle.plotting import plot_accuracy_distribution, plot_pruning_curves, save_figure

    records = [record for record in read_records(args.records) if record["split"] == "test"]
    if not any("report" in record for record in records):
        raise ValueError(f"'{args.records}' holds no run on a test split; run some first.")
    path = Path(args.page)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    for dataset in dict.fromkeys(record["dataset"] for record in records):
        groups = group_records([record for record in records if record["dataset"] == dataset])
        for group in groups.values():
            group.reports = [RobustnessReport.from_dict(each["report"]) for each in group.runs]
        main = next(iter(groups.values())).train_arguments
        pictured = [group for group in groups.values() if group.method in PICTURED and group.train_arguments == main]
        by_order = {group.label: group.arbitrary() for group in pictured}
        curves = {group.label: group.reports[0] for group in pictured}
        save_figure(plot_accuracy_distribution(by_order), path.parent / f"{dataset}-orders")
        save_figure(plot_pruning_curves(curves), path.parent / f"{dataset}-pruning")
        section = render_section(dataset, list(groups.values()))
        begin, end = (f"<!-- {word} {dataset}: rendered by examples/reproduce.py -->" for word in ("begin", "end"))
        if begin not in page:
            page += f"\n## {dataset}\n\n{begin}\n{end}\n"
        head, tail = page.split(begin)[0], page.split(end)[1]
        page = f"{head}{begin}\n{section}\n{end}{tail}"
    path.write_text(page, encoding="utf-8")
    print(f"Rendered {path}")


@dataclass
class Group:
    """The runs of one method with the same further training arguments, one a seed."""

    method: str
    train_arguments: str
    runs: list[dict] = field(default_factory=list)
    merges: dict[str, list[float]] = field(default_factory=dict)
    reports: list = field(default_factory=list)  # a RobustnessReport a run

    @property
    def label(self) -> str:
        return LABELS[self.method] + (f" ({self.train_arguments})" if self.train_arguments else "")

    @property
    def images_seen(self) -> int:
        return self.runs[0]["images_seen"]

    def sequential(self) -> list[float]:
        return [report.sequential.accuracy for report in self.reports]

    def arbitrary_by_run(self) -> list[list[float]]:
        return [[score.accuracy for score in report.arbitrary.scores] for report in self.reports]

    def arbitrary(self) -> list[float]:
        return [accuracy for accuracies in self.arbitrary_by_run() for accuracy in accuracies]

    def pruned(self, kind: str, num_kept: int) -> list[float]:
        reports = [report for report in self.reports if num_kept < report.num_layers]
        return [score.accuracy for report in reports for score in report.pruning[kind][num_kept - 1].scores]


def group_records(records: list[dict]) -> dict[tuple, Group]:
    groups = {}
    for method in METHODS:
        for record in records:
            if record["method"] != method:
                continue
            key = (method, record["train_arguments"])
            group = groups.setdefault(key, Group(*key))
            if "merges" in record:
                group.merges = record["merges"]
            else:
                group.runs.append(record)
    return {key: group for key, group in groups.items() if group.runs}


def render_section(dataset: str, groups: list[Group]) -> str:
    depth = max(group.reports[0].num_layers for group in groups)
    points = [depth * quarter // 4 for quarter in (3, 2, 1)]
    columns = ["method", "seeds", "sequential", "arbitrary", "worst order"]
    columns += [f"{k} of {depth}, arbitrary" for k in points] + [f"{k} of {depth}, evenly spaced" for k in points]
    columns += ["merged", "position known"]
    rows = [[group.label, str(len(group.runs)), *table_cells(group, points)] for group in groups]
    first = groups[0].runs[0]
    seen = sorted({group.images_seen for group in groups})
    parts = [
        f"Fraction of {groups[0].reports[0].num_images:,} test images classified correctly, mean ± standard deviation over seeds "
        f"(sequential, evenly spaced) or over seeds and {first['num_orders']} orders each (arbitrary); "
        f"{' or '.join(f'{count:,}' for count in seen)} training images seen. Fine-tuned and distilled: from the plain ViT with the "
        "preset's initial weights and the same seed. Merged: random merges of the seeds' models, each layer at "
        "its own position. The first run:",
        f"`{first['command']}`",
        "",
        *markdown_table(columns, rows),
        "",
        *target_table(groups, depth, points[0]),
        f"![Accuracy over orders]({dataset}-orders.png)",
        "",
        "With fewer layers, the first seed of each method:",
        "",
        f"![Accuracy with fewer layers]({dataset}-pruning.png)",
    ]
    return "\n".join(parts)


def table_cells(group: Group, points: list[int]) -> list[str]:
    cells = [mean_std(group.sequential()), mean_std(group.arbitrary()), f"{min(group.arbitrary()):.4f}"]
    for kind in ("arbitrary", "evenly_spaced"):
        cells += [mean_std(group.pruned(kind, k)) for k in points]
    known = [report.position_prediction.accuracy for report in group.reports if report.position_prediction]
    return [*cells, mean_std(group.merges.get("in_place", [])), mean_std(known)]


def target_table(groups: list[Group], depth: int, num_kept: int) -> list[str]:
    """What freedom of order costs, beside the plain models of as many images: those of the same further arguments."""
    by_key = {(group.method, group.train_arguments): group for group in groups}
    rows = []
    for group in groups:
        if group.method.startswith("plain") or group.method == "layerdrop":
            continue
        arbitrary = np.mean(group.arbitrary())
        ratios = []
        for plain in ("plain", "plain-init"):
            peer = by_key.get((plain, group.train_arguments))
            ratios.append(f"{arbitrary / np.mean(peer.sequential()):.4f}" if peer else "")
        below = np.mean([np.mean(values) - min(values) for values in group.arbitrary_by_run()])
        kept = [np.mean(group.pruned("arbitrary", num_kept)) / arbitrary]
        kept += [np.mean(group.pruned("evenly_spaced", num_kept)) / np.mean(group.sequential())]
        cells = [
            group.label,
            f"{group.images_seen:,}",
            *ratios,
            f"{100 * below:.2f}",
            *(f"{each:.4f}" for each in kept),
        ]
        rows.append(cells)
    if not rows:
        return []
    columns = [
        "method",
        "images seen",
        "arbitrary / plain sequential",
        "the same, plain with the preset's initial weights",
    ]
    columns += ["worst order below mean, points", f"{num_kept} of {depth} / all, arbitrary"]
    columns += [f"{num_kept} of {depth} / all, evenly spaced"]
    return ["What freedom of order costs:", "", *markdown_table(columns, rows), ""]


def markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def mean_std(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def main() -> None:
    try:
        if sys.argv[1:2] == ["evaluate-folder"]:
            evaluate_folder(GridArguments(**json.loads(sys.argv[2])), sys.argv[3])
            return
        (args,) = HfArgumentParser(GridArguments).parse_args_into_dataclasses()
        action = render if args.render else run_merges if args.merges else run_grid
        action(args)
    except KeyboardInterrupt:
        print("\nreproduce.py: stopped; run the same command again to go on.", file=sys.stderr)
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        command = " ".join(error.cmd[:2])
        print(f"reproduce.py: error: {command} failed; see the .log files in the --work_dir.", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"reproduce.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
