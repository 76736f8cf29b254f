"""The paper's experiments: trains a grid of datasets, methods and seeds, records the runs and renders tables of them.

    python experiments/grid.py --preset digits --methods plain layerdrop layershuffle --seeds 42 0 1 2 3
    python experiments/grid.py --dataset_name path/to/fashion-mnist --preset fashion-mnist --seeds 0
    python experiments/grid.py ... --methods plain layershuffle --seeds 0 1 2 --jobs 2
    python experiments/grid.py ... --merges --methods plain order-free --seeds 0 1 2    # of the models of these runs
    python experiments/grid.py --render              # docs/results.md, its pictures and the tables of other pages

A run trains by examples/train.py, evaluates by `evaluate_robustness` and appends one line to
experiments/records/runs.jsonl. What is recorded there is skipped, and a run that was stopped goes on from its
checkpoint. Prints a line a run.
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

import torch
from intervals import mean_std
from methods import METHODS, ON_GPU, ONE_THREAD, PRESETS, needed_method, value_of
from page import merge_command, render_pages
from runs import counted, read_records
from transformers import HfArgumentParser

from hf_layershuffle.training.recipes import SCRATCH_DEFAULTS, initializer_range_of


REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS = REPOSITORY / "experiments" / "records" / "runs.jsonl"
SIZES = ("hidden_size", "num_hidden_layers")
PAGES = (REPOSITORY / "docs" / "results.md", REPOSITORY / "README.md", RECORDS.with_name("README.md"))


@dataclass
class GridArguments:
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset as for train.py: a folder or a Hub id. Defaults to digits for the preset digits."},
    )
    preset: str = field(default="fashion-mnist", metadata={"help": f"Model and schedule: {', '.join(PRESETS)}."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods of the grid."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the grid, each at least 0."})
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
    work_dir: str = field(default="outputs/reproduce", metadata={"help": "Folder for checkpoints and models."})
    records: str = field(default=str(RECORDS), metadata={"help": "The file with one JSON line a run."})
    pages: list[str] = field(
        default_factory=lambda: [str(page) for page in PAGES],
        metadata={
            "help": "Pages whose blocks are rendered; pictures, and a section for each dataset, go with the first."
        },
    )
    render: bool = field(default=False, metadata={"help": "Only render tables and pictures from the records."})


def check(args: GridArguments) -> None:
    """Refuses what cannot run, and names the dataset where the preset does."""
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        raise ValueError(f"`methods` holds '{unknown[0]}'; choose from {', '.join(METHODS)}.")
    if args.preset not in PRESETS:
        raise ValueError(f"`preset` is '{args.preset}'; choose from {', '.join(PRESETS)}.")
    if min(args.seeds) < 0 or args.jobs < 1:
        raise ValueError(f"Seeds must be at least 0 and `jobs` at least 1; they are {args.seeds} and {args.jobs}.")
    if args.dataset_name is None:
        if args.preset != "digits":
            raise ValueError("Give --dataset_name, as for train.py, or --render.")
        args.dataset_name = "digits"


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
    device = ON_GPU if torch.accelerator.is_available() else ["--use_cpu"]
    width, depth = (int(value_of(args.preset, name, str(SCRATCH_DEFAULTS[name]))) for name in SIZES)
    values = {name: str(run_folder(args, name, seed)) for name in METHODS}
    values |= {"initializer_range": str(initializer_range_of(width)), "three_quarters": str(depth * 3 // 4)}
    method_arguments = [argument.format_map(values) for argument in METHODS[method]]
    command = [sys.executable, str(REPOSITORY / "examples" / "train.py"), "--dataset_name", args.dataset_name]
    command += [*PRESETS[args.preset], *method_arguments, *device, *args.train_arguments.split(), *held_out]
    command += ["--seed", str(seed), "--output_dir", str(folder)]
    return command + "--eval_strategy no --save_total_limit 1 --final_eval_orders 8 --report_to none".split()


def run_one(args: GridArguments, method: str, seed: int) -> dict:
    """Trains, evaluates and returns the record."""
    key = run_key(args, method, seed)
    folder = run_folder(args, method, seed)
    needed = needed_method(method)
    if needed is not None and not run_folder(args, needed, seed).is_dir():
        raise ValueError(
            f"Method {method} starts from the model of method {needed} with seed {seed}, which is not in "
            f"'{args.work_dir}'; run --methods {needed} --seeds {seed} first."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = train_command(args, method, seed, folder)
    one_thread = args.jobs > 1 or args.preset in ONE_THREAD
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if one_thread else {})
    started = time.monotonic()
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    seconds = time.monotonic() - started
    report = evaluate(args, folder, environment)
    return key | record_of(args, folder, command, environment, seconds) | {"report": report}


def record_of(args: GridArguments, folder: Path, command: list[str], environment: dict, seconds: float) -> dict:
    """What is recorded of a run beside its key and its report."""
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    has_gpu = torch.accelerator.is_available() and torch.cuda.is_available()
    device = f", {torch.cuda.get_device_name()}" if has_gpu else ""
    return {
        "command": public_command(args, command, environment),
        "images_seen": round(results["epoch"] * results["train_samples"]),
        "seconds": round(seconds),  # of this call: less than all where the run was stopped and went on
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores{device}, {args.jobs} runs at a time",
        "date": now(),
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def public_name(args: GridArguments) -> str:
    """The dataset's name without where it lies on this machine."""
    return Path(args.dataset_name).name if Path(args.dataset_name).is_dir() else args.dataset_name


def public_command(args: GridArguments, command: list[str], environment: dict) -> str:
    """The command without where things lie on this machine, but with the number of threads.

    The last digits depend on that number.
    """
    places = {args.dataset_name: public_name(args)}
    places |= {
        word: f"outputs/reproduce/{Path(word).name}" for word in command if Path(word).parent == Path(args.work_dir)
    }
    threads = [f"OMP_NUM_THREADS={environment['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in environment else []
    return " ".join([*threads, "python", "examples/train.py", *(places.get(word, word) for word in command[2:])])


def evaluate(args: GridArguments, folder: Path, environment: dict) -> dict:
    """Evaluates by this file in a process of its own, so that several evaluations run at a time."""
    command = [sys.executable, __file__, "evaluate-folder", json.dumps(vars(args)), str(folder)]
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return json.loads((folder / "robustness.json").read_text(encoding="utf-8"))


def evaluate_folder(args: GridArguments, folder: str) -> None:
    import hf_layershuffle as ls
    from hf_layershuffle.checkpoints.image_processors import load_image_processor
    from hf_layershuffle.checkpoints.loading import load_classifier
    from hf_layershuffle.data.datasets import load_image_datasets

    split = {"eval_split": "train", "eval_fraction": 0.1} if args.held_out else {}
    accelerator = torch.accelerator.current_accelerator()
    device = "cpu" if accelerator is None or not torch.accelerator.is_available() else accelerator.type
    torch.set_float32_matmul_precision("medium" if device == "cpu" else "high")  # bfloat16, or TF32
    model = load_classifier(folder, attn_implementation="eager" if device == "cpu" else "sdpa")
    report = ls.evaluate_robustness(
        model.to(device),
        load_image_datasets(args.dataset_name, **split)["test"],
        image_processor=load_image_processor(folder),
        num_orders=args.num_orders,
        num_subsets=args.num_subsets,
        batch_size=250 if device == "cpu" else 2000,
        model_name=Path(folder).name,
        dataset_name=args.preset,
        progress_file=Path(folder, ".evaluation.npz"),
    )
    report.save(folder)


def run_grid(args: GridArguments) -> None:
    """All runs that are not recorded, seed by seed, each recorded as soon as it is done."""
    check(args)
    recorded = counted(read_records(args.records), "held_out" if args.held_out else "test")
    todo = [
        (method, seed)
        for seed in args.seeds
        for method in args.methods
        if not any(run_key(args, method, seed).items() <= record.items() for record in recorded)
    ]
    lock = threading.Lock()
    path = Path(args.records)
    path.parent.mkdir(parents=True, exist_ok=True)

    def run_and_record(method: str, seed: int) -> None:
        record = run_one(args, method, seed)
        with lock, open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        report = record["report"]
        arbitrary = report["arbitrary"]["accuracy"]
        print(
            f"{method}, seed {seed}: sequential {report['sequential']['accuracy']:.4f}, "
            f"arbitrary {arbitrary['mean']:.4f}, worst {arbitrary['min']:.4f} ({record['seconds']} s)",
            flush=True,
        )

    print(f"{len(todo)} runs to do", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(run_and_record, *each) for each in todo]:
            future.result()


def run_merges(args: GridArguments) -> None:
    """Evaluates random merges of the models that the seeds of each method gave, and records them."""
    import hf_layershuffle as ls
    from hf_layershuffle.checkpoints.image_processors import load_image_processor
    from hf_layershuffle.checkpoints.loading import load_classifier
    from hf_layershuffle.data.datasets import load_image_datasets

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
        record = key | {"merges": accuracies, "date": now()}
        record["command"] = merge_command(record, public_name(args))
        with open(args.records, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{method}, merges: " + ", ".join(f"{kind} {mean_std(each)}" for kind, each in accuracies.items()))


def main() -> None:
    try:
        if sys.argv[1:2] == ["evaluate-folder"]:
            evaluate_folder(GridArguments(**json.loads(sys.argv[2])), sys.argv[3])
            return
        (args,) = HfArgumentParser(GridArguments).parse_args_into_dataclasses()
        if args.render:
            render_pages(args.records, args.pages)
        else:
            (run_merges if args.merges else run_grid)(args)
    except KeyboardInterrupt:
        print("\ngrid.py: stopped; run the same command again to go on.", file=sys.stderr)
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        command = " ".join(error.cmd[:2])
        print(f"grid.py: error: {command} failed; see the .log files in the --work_dir.", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"grid.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
