"""One run of gpu_runs.py, in a process of its own: trains, evaluates, and leaves the record in the run's folder.

    python experiments/gpu_run.py '{"preset": "cifar10", "dataset_name": "path/to/cifar10"}' plain-init 0

Takes what is not the default of grid.py's arguments, the method, the seed, and further arguments of train.py. Prints
the images a second as it goes.
"""

import json
import os
import statistics
import sys
import time
from typing import Any

from grid import GridArguments, evaluate_folder, record_of, run_folder, run_key, train_command
from transformers import TrainerCallback


RECORD = "record.json"  # in the folder of a run that is done


class Speed(TrainerCallback):
    """Prints the images a second since the last log, which the Trainer says at the end only."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self._last: tuple[int, float] | None = None  # step and time

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if self._last is not None and state.global_step > self._last[0]:
            steps = state.global_step - self._last[0]
            images = args.train_batch_size * args.gradient_accumulation_steps
            self.found.append(steps * images / (now - self._last[1]))
            print(f"step {state.global_step} of {state.max_steps}: {self.found[-1]:.0f} images/s", flush=True)
        self._last = (state.global_step, now)


def run_one(args: GridArguments, method: str, seed: int, *further: str) -> None:
    """Trains and evaluates in this process, and leaves the record in the run's folder.

    Args:
        further: Arguments of train.py that change how fast it goes, not what it does.
    """
    from hf_layershuffle.training import session

    folder = run_folder(args, method, seed)
    command = [*train_command(args, method, seed, folder), *further]
    started = time.monotonic()
    speed = Speed()
    with session.one_line_errors("gpu_runs.py"):
        session.run(command[2:], callbacks=[speed])
        print(f"trained after {time.monotonic() - started:.1f} s", flush=True)
        evaluate_folder(args, str(folder))
    seconds = time.monotonic() - started
    print(f"evaluated after {seconds:.1f} s", flush=True)
    results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    record = run_key(args, method, seed) | record_of(args, folder, command, dict(os.environ), seconds)
    record |= {
        "train_seconds": results["train_runtime"],
        "images_per_second": round(statistics.median(speed.found)) if speed.found else None,
        "report": json.loads((folder / "robustness.json").read_text(encoding="utf-8")),
    }
    # Complete or not there: a run that is stopped in its last moment counts as not done
    partial = folder / f".{RECORD}"
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(folder / RECORD)


if __name__ == "__main__":
    run_one(GridArguments(**json.loads(sys.argv[1])), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
