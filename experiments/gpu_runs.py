"""Trains many runs of the grid on one GPU in a given time, and packs what is to be kept into a few files.

    python experiments/gpu_runs.py --seconds 540 --jobs 6 --output_dir outputs/gpu \
        --datasets cifar10=path/to/cifar10 fashion-mnist=path/to/fashion-mnist \
        --runs cifar10:plain-init,plain,order-free-finetuned-distilled:0,1,2 fashion-mnist-strong:plain-init:0 \
        --export cifar10:order-free-finetuned-distilled:0

Several runs share the GPU, since one of such small models leaves most of it idle. Runs start in the order given, as
soon as the model they start from is there; those named first count most. A run that would not end in time is not
started, and what still runs at the end is stopped. Writes, into `--output_dir`, at most six files of at most 14 MiB:
records.jsonl, results.tar.gz (logs, and what became of each run), and models-*.tar with the exported models in
float16. Prints a line a run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from gpu_run import RECORD
from grid import GridArguments, check, run_folder
from methods import PRESETS, needed_method
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser


STOP_SECONDS = 8  # that a run has to end by itself once it is told to
ONE_RUN = Path(__file__).with_name("gpu_run.py")
MAX_BYTES = 14 * 2**20
MAX_ARCHIVES = 4
RECORDS = "records.jsonl"
POLL_SECONDS = 0.2


@dataclass
class Arguments:
    seconds: float = field(metadata={"help": "Time for all, from the start of this program to its end, above 0."})
    datasets: list[str] = field(
        metadata={"help": "Where datasets lie, as name=folder. A preset takes the longest name that it begins with."}
    )
    runs: list[str] = field(
        metadata={
            "help": "What to train, as preset:methods:seeds or preset:methods:seeds:further arguments of train.py, "
            "with methods and seeds parted by commas; what matters most first."
        }
    )
    export: list[str] = field(default_factory=list, metadata={"help": "Models to keep, as for --runs."})
    jobs: int = field(default=6, metadata={"help": "Runs at a time, at least 1."})
    output_dir: str = field(default="outputs/gpu", metadata={"help": "Folder for what is kept."})
    work_dir: str = field(default="outputs/reproduce", metadata={"help": "Folder for models and logs."})
    reserve: float = field(default=20, metadata={"help": "Seconds kept at the end to stop runs and to pack."})
    torch_compile: bool = field(
        default=True,
        metadata={"help": "Compile the layers. Once a compiled run fails, it and all later ones run without."},
    )
    num_orders: int = field(default=32, metadata={"help": "Arbitrary orders of the evaluation."})
    num_subsets: int = field(default=4, metadata={"help": "Random subsets a number of layers of the evaluation."})


@dataclass
class GpuRun:
    """One run of the schedule."""

    args: GridArguments
    method: str
    seed: int
    status: str = "not started"
    seconds: float = 0.0
    process: subprocess.Popen | None = None
    log: Path | None = None
    started: float = 0.0
    is_compiled: bool = False

    @property
    def folder(self) -> Path:
        return run_folder(self.args, self.method, self.seed)

    @property
    def key(self) -> tuple:
        return self.args.preset, self.method, self.seed, self.args.train_arguments

    @property
    def needs(self) -> tuple | None:
        """Key of the run whose model this one starts from or learns from."""
        needed = needed_method(self.method)
        return None if needed is None else (self.args.preset, needed, self.seed, self.args.train_arguments)

    def start(self, is_compiled: bool) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = Path(f"{self.folder}.log")
        self.is_compiled = is_compiled
        command = [sys.executable, str(ONE_RUN), json.dumps(vars(self.args)), self.method, str(self.seed)]
        command += ["--torch_compile"] if is_compiled else []
        with open(self.log, "a", encoding="utf-8") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
            # A session of its own, so that its workers can be ended with it
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.started = time.monotonic()
        self.status = "running"

    def is_over(self) -> bool:
        if self.process is None or self.process.poll() is None:
            return False
        self.seconds = time.monotonic() - self.started
        self.status = "done" if self.process.returncode == 0 else f"failed ({self.process.returncode})"
        return True

    def stop(self, signal_number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal_number)


def parse_runs(specifications: list[str], args: Arguments) -> list[GpuRun]:
    """The runs that are named.

    Raises:
        `ValueError`: for what is no run, or has no dataset.
    """
    places = dict(each.split("=", 1) for each in args.datasets if "=" in each)
    if len(places) < len(args.datasets):
        raise ValueError(f"`datasets` is {args.datasets}; write each as name=folder, such as cifar10=data/cifar10.")
    found: list[GpuRun] = []
    for specification in specifications:
        preset, methods, seeds, train_arguments = [*specification.split(":", 3), "", "", ""][:4]
        names = [name for name in places if preset.startswith(name)]
        if preset not in PRESETS or not all(seed.isdigit() for seed in seeds.split(",")) or not names:
            raise ValueError(
                f"`runs` holds '{specification}'; write preset:methods:seeds, with a preset of {', '.join(PRESETS)}, "
                f"whose dataset is named by --datasets (these are {', '.join(places)})."
            )
        grid_args = GridArguments(
            dataset_name=places[max(names, key=len)],
            preset=preset,
            methods=methods.split(","),
            seeds=[int(seed) for seed in seeds.split(",")],
            train_arguments=train_arguments,
            num_orders=args.num_orders,
            num_subsets=args.num_subsets,
            jobs=args.jobs,
            work_dir=args.work_dir,
            records=str(Path(args.output_dir, RECORDS)),
        )
        check(grid_args)
        found += [GpuRun(grid_args, method, seed) for seed in grid_args.seeds for method in grid_args.methods]
    return found


def with_needed(runs: list[GpuRun]) -> list[GpuRun]:
    """The runs, each once, and before each those whose models it needs."""
    found: dict[tuple, GpuRun] = {}
    for run in runs:
        chain = [run]
        while chain[0].needs is not None:
            chain.insert(0, GpuRun(run.args, chain[0].needs[1], run.seed))
        for each in chain:
            found.setdefault(each.key, each)
    return list(found.values())


class Schedule:
    """Starts runs as places, models and time allow, and records those that end."""

    def __init__(self, runs: list[GpuRun], jobs: int, deadline: float, torch_compile: bool = False):
        self.runs = runs
        self.torch_compile = torch_compile
        self.jobs = jobs
        self.deadline = deadline
        self.by_key = {run.key: run for run in runs}

    def run(self) -> None:
        """Returns when nothing more can be started and nothing runs, or at the deadline."""
        while time.monotonic() < self.deadline:
            for run in self._running():
                if run.is_over():
                    report(run)
                    if run.is_compiled and run.status != "done":
                        self.torch_compile = False
                        run.status = "not started"
            startable = next((run for run in self.runs if run.status == "not started" and self._can_start(run)), None)
            running = self._running()
            if startable is not None and len(running) < self.jobs:
                startable.start(self.torch_compile)
            elif not running:
                return
            else:
                time.sleep(POLL_SECONDS)

    def _running(self) -> list[GpuRun]:
        return [run for run in self.runs if run.status == "running"]

    def _can_start(self, run: GpuRun) -> bool:
        if run.needs is not None and self.by_key[run.needs].status != "done":
            return False
        return time.monotonic() + self._expected_seconds(run) < self.deadline

    def _expected_seconds(self, run: GpuRun) -> float:
        """As long as the longest of its kind so far, of its preset where there is none; 0 where nothing is known."""
        over = [each for each in self.runs if each.status == "done" and each.args.preset == run.args.preset]
        alike = [each for each in over if each.method == run.method]
        return max((each.seconds for each in alike or over), default=0.0)

    def stop(self) -> None:
        """Ends what runs, first by a request that runs answer by ending by themselves."""
        running = self._running()
        for run in running:
            run.stop(signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        while time.monotonic() < until and any(not run.is_over() for run in running):
            time.sleep(POLL_SECONDS)
        for run in running:
            run.stop(signal.SIGKILL)
            if run.status != "done":
                run.status = "stopped: the time was up"
            report(run)


def report(run: GpuRun) -> None:
    """Records a run that is done, and prints how any run ended."""
    name = f"{run.args.preset}, {run.method}, seed {run.seed}"
    if run.status != "done":
        last = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if run.log else []
        print(f"{name}: {run.status} after {run.seconds:.0f} s: {''.join(last)[-300:]}", flush=True)
        return
    record = json.loads((run.folder / RECORD).read_text(encoding="utf-8"))
    with open(run.args.records, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    arbitrary = record["report"]["arbitrary"]["accuracy"]
    print(
        f"{name}: sequential {record['report']['sequential']['accuracy']:.4f}, arbitrary {arbitrary['mean']:.4f}, "
        f"worst {arbitrary['min']:.4f} ({run.seconds:.0f} s, of which training {record['train_seconds']:.0f}, "
        f"{record['images_per_second']} images/s)",
        flush=True,
    )


def export(folder: Path, exported: Path) -> None:
    """Copies a trained model with its weights as float16, without what only training needs."""
    shutil.copytree(
        folder, exported, ignore=shutil.ignore_patterns("checkpoint-*", "*.bin", "*.safetensors", RECORD, ".*")
    )
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: each.half() if each.is_floating_point() else each for name, each in weights.items()},
        exported / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (exported / "config.json").write_text(json.dumps(config | {"dtype": "float16"}, indent=2), encoding="utf-8")


def pack(runs: list[GpuRun], exported: list[tuple], output: Path) -> None:
    """Writes the logs into one archive, and the models that are to be kept into a few."""
    states = [{"run": list(run.key), "status": run.status, "seconds": round(run.seconds, 1)} for run in runs]
    (output / "schedule.json").write_text(json.dumps(states, indent=1), encoding="utf-8")
    with tarfile.open(output / "results.tar.gz", "w:gz") as archive:
        archive.add(output / "schedule.json", "schedule.json")
        for run in runs:
            for path in (run.log, run.folder / "trainer_state.json"):
                if path is not None and path.is_file():
                    archive.add(path, f"{run.folder.name}/{path.name}")
    (output / "schedule.json").unlink()
    by_key = {run.key: run for run in runs}
    archives: list[int] = []  # bytes of each
    for run in (by_key[key] for key in exported if by_key[key].status == "done"):
        folder = Path(f"{run.folder}-float16")
        shutil.rmtree(folder, ignore_errors=True)
        export(run.folder, folder)
        size = sum(path.stat().st_size + 1024 for path in folder.rglob("*")) + 20_480
        index = next((index for index, held in enumerate(archives) if held + size <= MAX_BYTES), len(archives))
        if index == MAX_ARCHIVES or size > MAX_BYTES:
            print(f"Left out for want of room: {folder.name} ({size / 2**20:.1f} MiB)", flush=True)
            continue
        archives[index : index + 1] = [size + (archives[index] if index < len(archives) else 0)]
        with tarfile.open(output / f"models-{index}.tar", "a") as archive:
            archive.add(folder, folder.name)
    print(f"Wrote {', '.join(sorted(path.name for path in output.iterdir()))} into {output}", flush=True)


def main() -> None:
    started = time.monotonic()
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    try:
        if args.jobs < 1 or not args.reserve < args.seconds < float("inf"):
            raise ValueError(
                f"`jobs` must be at least 1 and `seconds` above `reserve`; they are {args.jobs}, {args.seconds:g} and "
                f"{args.reserve:g}."
            )
        runs = with_needed(parse_runs(args.runs, args))
        exported = [run.key for run in parse_runs(args.export, args)]
        unknown = [key for key in exported if key not in {run.key for run in runs}]
        if unknown:
            raise ValueError(f"`export` names {unknown[0]}, which is not among --runs.")
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"gpu_runs.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    schedule = Schedule(runs, args.jobs, started + args.seconds - args.reserve, args.torch_compile)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        schedule.run()
    except KeyboardInterrupt:
        print("gpu_runs.py: stopped; what is done is kept.", flush=True)
    finally:
        schedule.stop()
        pack(runs, exported, output)


if __name__ == "__main__":
    main()
