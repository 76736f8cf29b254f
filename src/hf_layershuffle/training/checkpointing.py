# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Which checkpoints of a run are whole: a stop, or a full disk, can end a process while it writes one."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from ..checkpoints.locations import checkpoints_of


logger = logging.get_logger(__name__)
# Files and folders that the model's weights, and the optimizer's state, are written to: as they are, of adapters,
# sharded by FSDP and by DeepSpeed
WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model*", "global_step*")
# What the readers of such files raise where a file is torn
TORN = (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile)
OPTIMIZERS = (OPTIMIZER_NAME, "optimizer*", "global_step*")


class IncompleteCheckpoint(ValueError):
    """Says why a run cannot go on from a checkpoint."""


def read_state(checkpoint: Path) -> TrainerState:
    """The state of the Trainer, which it writes last.

    Raises:
        [`IncompleteCheckpoint`]: if it is not there, or not whole.
    """
    try:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < 1 or state.max_steps < 1:  # would pass for the end of a training of no steps
            raise ValueError("it names no step")
        return state
    except FileNotFoundError:
        raise IncompleteCheckpoint(f"it holds no {TRAINER_STATE_NAME}") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise IncompleteCheckpoint(f"its {TRAINER_STATE_NAME} cannot be read ({error})") from None


def check_weights(checkpoint: Path) -> TrainerState:
    """Reads the state of a checkpoint whose model is whole.

    Raises:
        [`IncompleteCheckpoint`]: if a file is missing or was not written to its end.
    """
    state = read_state(checkpoint)
    if not any(any(checkpoint.glob(pattern)) for pattern in WEIGHTS):
        raise IncompleteCheckpoint("it holds no weights")
    for path in sorted(checkpoint.iterdir()):
        try:
            _check_file(path)
        except TORN as error:
            raise IncompleteCheckpoint(f"its {path.name} is not whole ({error})") from None
    return state


def holds_whole_weights(folder: Path) -> bool:
    """Whether a folder holds a model's weights, written to their end."""
    files = [path for pattern in WEIGHTS for path in folder.glob(pattern)]
    try:
        for path in files:
            _check_file(path)
    except TORN:
        return False
    return bool(files)


def _check_file(path: Path) -> None:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass  # compares the file's length with what its header says
    elif path.suffix in (".pt", ".pth", ".bin") and path.is_file():
        with zipfile.ZipFile(path):
            pass  # the list of contents stands at the end
    elif path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "config.json" and not isinstance(content, dict):
            raise ValueError("it holds no names and values")
        if path.name.endswith(".index.json"):
            for name in set(content["weight_map"].values()):
                path.with_name(name).stat()


def check_checkpoint(checkpoint: Path, num_processes: int) -> TrainerState:
    """Reads the state of a checkpoint from which a run of so many processes goes on exactly.

    Raises:
        [`IncompleteCheckpoint`]: if the checkpoint is not whole, or does not hold all that goes on.
    """
    state = check_weights(checkpoint)
    if not any(any(checkpoint.glob(pattern)) for pattern in OPTIMIZERS):
        raise IncompleteCheckpoint(
            f"it holds no {OPTIMIZER_NAME} (as with --save_only_model), and training would go on with a fresh "
            "optimizer"
        )
    if not (checkpoint / SCHEDULER_NAME).is_file() and not any(checkpoint.glob("global_step*")):
        raise IncompleteCheckpoint(f"it holds no {SCHEDULER_NAME}, and the learning rate would start anew")
    other = "rng_state_0.pth" if num_processes == 1 else "rng_state.pth"
    if (checkpoint / other).exists() or (checkpoint / f"rng_state_{num_processes}.pth").exists():
        raise ValueError(
            f"'{checkpoint}' is of a run with another number of processes than {num_processes}; start as many as "
            "then, or choose another --output_dir."
        )
    names = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{index}.pth" for index in range(num_processes)]
    for name in names:
        if not (checkpoint / name).exists():
            raise IncompleteCheckpoint(f"it holds no {name}, and the random numbers would be others")
    return state


def newest_whole_checkpoint(folder: Path, num_processes: int) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint from which a run goes on exactly, and why each newer one does not serve.

    A checkpoint at the end of training need only hold the model.
    """
    skipped: dict[Path, str] = {}
    for checkpoint in checkpoints_of(folder):
        try:
            state = check_weights(checkpoint)
            if state.global_step < state.max_steps:
                check_checkpoint(checkpoint, num_processes)
            return checkpoint, skipped
        except IncompleteCheckpoint as error:
            skipped[checkpoint] = str(error)
    return None, skipped


def trained_weights(checkpoint: Path, state: TrainerState, args: TrainingArguments) -> Path:
    """Where the weights lie that the run ends with.

    They lie in the best checkpoint, if that is to be loaded, or in the last one.
    """
    best = best_checkpoint(checkpoint, state) if args.load_best_model_at_end else None
    return best or checkpoint


def best_checkpoint(checkpoint: Path, state: TrainerState) -> Path | None:
    """The best checkpoint of the run that a checkpoint is of; None, with a warning, where it is no longer there.

    It is looked for beside the checkpoint first. The path in the state is one from the working directory of then.
    """
    if state.best_model_checkpoint is None:
        return None
    recorded = Path(state.best_model_checkpoint)
    for path in (checkpoint.parent / recorded.name, recorded):
        if path.is_dir():
            return path
    logger.warning(
        "The best checkpoint of the run, '%s', is not there any more. Unless a better one follows, the run ends with "
        "its last weights.",
        recorded,
    )
    return None
