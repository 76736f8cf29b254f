# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""Runs in output folders: whether one can go on, and that one process writes it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..common.claims import CLAIM_FILES, claimed_folder
from ..common.files import DISK_FULL, write_text
from ..hub.folder_records import read_json
from .checkpointing import (
    IncompleteCheckpoint,
    check_checkpoint,
    check_weights,
    holds_whole_weights,
    newest_whole_checkpoint,
)
from .model_flags import LAYERSHUFFLE_FLAGS
from .script_arguments import ScriptTrainingArguments


logger = logging.get_logger(__name__)
# Hidden, and so not published
RUN_FILE = ".train_run.json"
_DIGESTS = {
    "training_data": "other examples to train on",
    "model_weights": "another model to start from",
    "teacher_weights": "another teacher",
}
COMPARED_SIZES = (
    "image_size",
    "patch_size",
    "num_channels",
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "mlp_ratio",
    "num_attention_heads",
    "hidden_dropout_prob",
    "initializer_range",
    "residual_init_scale",
    # of timm's models
    "architecture",
    "model_args",
)


def find_checkpoint(args: ScriptTrainingArguments, config: PreTrainedConfig, arguments: dict) -> str | None:
    """The checkpoint to go on from: the one given, or the newest whole one of the same run in the output folder.

    Args:
        args: The arguments of the run.
        config: Configuration of the model to train.
        arguments: What is recorded of the run, as from [`recorded_arguments`].

    Raises:
        `ValueError`: if the folder holds something else, so that no other model or file is lost or mixed in. If the
            earlier run had other `arguments`, so that what is recorded of it stays true. If training would not go on
            as it was.
    """
    folder = args.folder
    requested = args.resume_from_checkpoint
    starts_anew = is_untouched(folder) or args.overwrite_output_dir
    if requested not in (None, True, "True", "true"):
        given = _requested_checkpoint(Path(str(requested)), config, arguments)
        if not starts_anew and not _is_of(folder, given):
            raise ValueError(
                f"The output folder '{folder}' is not empty, and --resume_from_checkpoint '{given}' is not of it; "
                "leave that out to go on with the run of this folder, choose another --output_dir, or add "
                "--overwrite_output_dir to replace what it holds."
            )
        return given
    if starts_anew:
        if requested:
            raise ValueError(f"There is no checkpoint in '{folder}' to resume from.")
        return None
    recorded = read_json(folder / RUN_FILE)
    checkpoint, skipped = newest_whole_checkpoint(folder, args.world_size)
    if recorded is not None and is_finished_run(folder, str(folder)):
        checkpoint = (
            folder  # whose checkpoints may be none, or only the best one, from which it would be trained again
        )
    found = checkpoint or next(iter(skipped), None)
    # A run that was stopped before its first checkpoint, or in its only save, starts anew
    if found is None and (requested or recorded is None or holds_whole_weights(folder)):
        raise ValueError(
            f"The output folder '{folder}' is not empty and holds no checkpoint of an earlier run; choose another "
            "--output_dir, or add --overwrite_output_dir to write into it all the same."
        )
    if checkpoint is not None:
        _refuse_another_model(folder, checkpoint, config)
    refuse_another_run(folder, recorded or {}, arguments)
    if checkpoint is None and skipped:
        _refuse_to_lose_work(folder, skipped, requested)
    for path, reason in skipped.items():
        logger.warning("Skipped %s: %s.", path, reason)
    return None if checkpoint is None else str(checkpoint)


def _requested_checkpoint(checkpoint: Path, config: PreTrainedConfig, arguments: dict) -> str:
    if not checkpoint.is_dir():
        raise ValueError(f"There is no checkpoint folder '{checkpoint}' to resume from.")
    refuse_another_run(checkpoint.parent, read_json(checkpoint.parent / RUN_FILE) or {}, arguments)
    try:
        state = check_weights(checkpoint)
        if state.global_step < state.max_steps:
            check_checkpoint(checkpoint, arguments["num_processes"])
    except IncompleteCheckpoint as error:
        raise ValueError(f"'{checkpoint}' cannot be resumed from: {error}; choose another checkpoint.") from None
    _refuse_another_model(checkpoint.parent, checkpoint, config)
    return str(checkpoint)


def _refuse_to_lose_work(folder: Path, skipped: dict[Path, str], requested: object) -> None:
    """Refuses to start anew where a checkpoint has weights, which may hold hours of work.

    From torn checkpoints alone, a run starts anew.
    """
    for path, reason in skipped.items():
        try:
            check_weights(path)
        except IncompleteCheckpoint:
            continue
        raise ValueError(
            f"Training cannot go on exactly from '{path}': {reason}. Add --overwrite_output_dir to start anew, or "
            f"train from its weights into another folder by --model_name_or_path {path} --output_dir ..."
        )
    if requested:
        path, reason = next(iter(skipped.items()))
        raise ValueError(f"There is no whole checkpoint in '{folder}' to resume from: {path.name}: {reason}.")


def _refuse_another_model(folder: Path, checkpoint: Path, config: PreTrainedConfig) -> None:
    names = (*LAYERSHUFFLE_FLAGS, "halting_head", "model_type", "id2label", *COMPARED_SIZES)
    stored = _sizes_on_top(read_json(checkpoint / "config.json") or {})
    ours = _sizes_on_top(json.loads(config.to_json_string()))
    known = [name for name in names if name in stored]
    refuse_another_run(folder, {name: stored[name] for name in known}, {name: ours.get(name) for name in known})


def _sizes_on_top(config: dict) -> dict:
    """A configuration's values, with those of its image tower, if it has one."""
    return {**(config.get("vision_config") or {}), **config}


def refuse_another_run(folder: Path, stored: dict, ours: dict) -> None:
    """Raises a `ValueError` for the first value of an earlier run that this one has not.

    What an earlier version recorded and this one does not, is passed over.
    """
    start = f" (--model_name_or_path '{folder}' starts from its model)" if (folder / "config.json").exists() else ""
    for name, value in stored.items():
        if name in ours and value != ours[name]:
            what = f" {_DIGESTS[name]}:" if name in _DIGESTS else ""
            raise ValueError(
                f"The output folder '{folder}' holds a run with{what} `{name}` {value!r}, and this one has "
                f"{ours[name]!r}; choose another --output_dir{start}, or add --overwrite_output_dir to start anew."
            )


def is_untouched(folder: Path) -> bool:
    """Whether the folder holds nothing yet, or only what claims it for a run."""
    return not folder.is_dir() or all(
        path.name in CLAIM_FILES or (path.is_dir() and path.name == "baseline" and is_untouched(path))
        for path in folder.iterdir()
    )


def _is_of(folder: Path, checkpoint: str) -> bool:
    """Whether a checkpoint lies in an output folder, or is the folder itself."""
    return folder.resolve() in (Path(checkpoint).resolve(), Path(checkpoint).parent.resolve())


def is_finished_run(folder: Path, checkpoint: str | None) -> bool:
    """Whether the run of `folder` trained to its end, which `checkpoint` is, and saved the model and its metrics."""
    if checkpoint is None or not _is_of(folder, checkpoint):
        return False
    try:
        check_weights(folder)
        state = check_weights(Path(checkpoint))
        results = dict(json.loads((folder / "all_results.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    return state.global_step >= state.max_steps and "train_samples" in results


def prepare_folder(folder: Path, checkpoint: str | None, overwrites: bool, arguments: dict) -> None:
    """Records a run's arguments, and removes what would stand in its way: torn files, and what is overwritten."""
    _, skipped = newest_whole_checkpoint(folder, arguments["num_processes"])
    starts_anew = overwrites and (checkpoint is None or not _is_of(folder, checkpoint))
    earlier = list(folder.glob("checkpoint-*")) if starts_anew else list(skipped)
    for path in earlier:
        shutil.rmtree(path)
    if starts_anew:
        (folder / "all_results.json").unlink(missing_ok=True)  # which marks a finished run
    for name in ("all_results.json", "train_results.json", "eval_results.json"):
        try:
            read_json(folder / name)
        except ValueError:
            (folder / name).unlink()
    write_text(folder / RUN_FILE, json.dumps(arguments, indent=1) + "\n")


@contextmanager
def claimed_run_folder(folder: Path) -> Iterator[Path]:
    """[`~hf_layershuffle.common.claims.claimed_folder`], in which a run that was refused leaves nothing."""
    was_untouched = is_untouched(folder)
    with claimed_folder(folder):
        try:
            yield folder
        except Exception:  # refused before anything was saved: not a run that could go on
            if was_untouched and all(path.name in {*CLAIM_FILES, RUN_FILE} for path in folder.iterdir()):
                (folder / RUN_FILE).unlink(missing_ok=True)
            raise


def check_space(folder: Path, num_parameters: int, args: ScriptTrainingArguments) -> None:
    """Raises an `OSError` if the disk cannot hold the model and one checkpoint."""
    num_values = 1  # of each weight: in the model at the end, in a checkpoint, two of AdamW, and before averaging
    if args.save_strategy != "no":
        num_values += 1 if args.save_only_model else 3
        is_averaged = args.ema_decay > 0 or args.optim.startswith("schedule_free")
        num_values += int(is_averaged and not args.save_only_model)
    needed = 4 * num_parameters * num_values + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"The disk of the output folder '{folder}' has {free / 2**20:,.0f} MiB left, and the run needs at least "
            f"{needed / 2**20:,.0f}; make room, or choose another --output_dir."
        )


@contextmanager
def explained_write_errors(folder: Path) -> Iterator[None]:
    """Turns what safetensors, torch and the system raise where a file cannot be written into an `OSError`.

    It says what to do.
    """
    try:
        yield
    except (SafetensorError, RuntimeError, OSError) as error:
        of_torch = ("PytorchStreamWriter", "inline_container")
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in of_torch):
            raise
        if isinstance(error, OSError) and error.errno not in DISK_FULL:
            raise
        raise OSError(
            f"'{folder}' could not be written into ({error}); make room, and run the same command again to go on from "
            "the last whole checkpoint."
        ) from error
