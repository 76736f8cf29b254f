# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What a Trainer writes a card of and pushes: a finished model, adapters, and models while they train."""

import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..checkpoints.hub_errors import explained_errors
from ..checkpoints.locations import TOKENIZER_FILES
from ..checkpoints.tokenizers import takes_texts
from ..data.augmentation_settings import Augmentation
from ..hub.folder_records import record_training
from ..hub.model_card import write_model_card
from ..hub.published_files import matches, published_files
from ..hub.publishing import publish
from .trainer_part import TrainerPart


# Pickled arguments hold the token of the Hub
NOT_OF_CHECKPOINTS = ("training_args.bin",)
_BESIDE_ADAPTERS = ("README.md", "*processor_config.json", *TOKENIZER_FILES)


def adapter_files(folder: str | os.PathLike, adapter_names: Iterable[str]) -> list[str]:
    """The files of adapters and their card, relative to the folder.

    The adapter `default` lies in the folder itself. Others lie in subfolders of their names.
    """
    folders = ["" if name == "default" else f"{name}/" for name in adapter_names]
    patterns = [
        *_BESIDE_ADAPTERS,
        *(f"{each}adapter_{rest}" for each in folders for rest in ("config.json", "model*")),
    ]
    names = [path.relative_to(folder).as_posix() for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return [name for name in names if matches(name, patterns)]


def publish_adapter(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    adapter_names: Iterable[str] = ("default",),
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload adapter",
) -> CommitInfo:
    """Pushes the adapters of a folder and their card to the Hub in one commit.

    Args:
        folder: The adapters' folder, as `PeftModel.save_pretrained` wrote it.
        repo_id, private, revision, token, commit_message: As for [`publish`].
        adapter_names: Names of the adapters in `model.peft_config`.

    Raises:
        `ValueError`: if the folder holds no adapter.
        `OSError`: if the Hub cannot be reached or refuses. The folder is complete; the message says how to go on.
    """
    names = adapter_files(folder, adapter_names)
    if not any(name.endswith("adapter_config.json") for name in names):
        raise ValueError(
            f"'{folder}' holds no adapter: 'adapter_config.json' is missing. Save it with `save_pretrained`."
        )
    with explained_errors(repo_id, f"'{folder}' is complete: push it again when that is mended"):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message=commit_message,
            revision=revision,
            allow_patterns=names,
        )


@cache
def _background_api() -> HfApi:
    """One for all pushes: it runs one after the other, so that older weights never come after newer ones."""
    return HfApi()


def push_checkpoint(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    adapter_names: Iterable[str] | None = None,
    path_in_repo: str | None = None,
    **options: Any,
) -> list[Future]:
    """Starts to push a checkpoint as the repository's model.

    With `path_in_repo` it also pushes all that a resumed run needs.

    Args:
        folder: A checkpoint of the Trainer.
        repo_id: Repository to push to.
        adapter_names: Names of a peft model's adapters.
        path_in_repo: Folder on the Hub for the whole checkpoint.
        options: `token`, `revision` and `commit_message`, as for `HfApi.upload_folder`.
    """
    names = published_files(folder) if adapter_names is None else adapter_files(folder, adapter_names)
    copy = Path(tempfile.mkdtemp())  # the checkpoint itself may be deleted before it is read
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder, name), copy / name)
    api = _background_api()
    job = api.upload_folder(repo_id=repo_id, folder_path=str(copy), run_as_future=True, **options)
    job.add_done_callback(lambda _: shutil.rmtree(copy, ignore_errors=True))
    if path_in_repo is None:
        return [job]
    options["commit_message"] += ", checkpoint"
    options |= {"path_in_repo": path_in_repo, "ignore_patterns": list(NOT_OF_CHECKPOINTS), "run_as_future": True}
    return [job, api.upload_folder(repo_id=repo_id, folder_path=str(folder), **options)]


class HubMixin(TrainerPart):
    """The card of [`LayerShuffleTrainer`], and what it pushes."""

    def create_model_card(  # type: ignore[override]  # transformers' other arguments go by name
        self, dataset: str | None = None, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Writes `README.md` into the output folder, or brings the one that is there up to date.

        Also writes `training.json`, which records what the card says of the training. `push_to_hub` calls this;
        training alone does not. Adapters of peft get peft's card.

        Args:
            dataset: Name of the dataset.
            metrics: Evaluation metrics. Defaults to those of the last evaluation. With `load_best_model_at_end`, they
                are those of the best checkpoint, unless the model was evaluated since training ended.
            kwargs: `finetuned_from`, the Hub id, or folder, of the model that was fine-tuned; `tags`, further tags of
                the card; `license`, its licence; `dataset_arguments`, how the dataset was loaded, see
                [`record_training`].
        """
        if self._adapter_names() is not None:
            super().create_model_card(dataset=dataset, **kwargs)
            return
        if not self.is_world_process_zero():
            return
        num_orders = self._argument("eval_orders")
        if metrics is None:
            metrics = self._metrics_of_the_weights()
            metrics = metrics | {"num_orders": num_orders} if num_orders else metrics
        noun = "texts" if takes_texts(self.accelerator.unwrap_model(self.model).config) else "images"
        teacher = self.teacher_model
        augmentation: Augmentation | None = getattr(self.train_dataset, "augmentation", None)
        folder = str(self.args.output_dir)
        record_training(
            folder,
            arguments=self._asked_for() | ({} if augmentation is None else {"augmentation": augmentation.describe()}),
            dataset=dataset,
            dataset_arguments=kwargs.get("dataset_arguments"),
            **{f"num_train_{noun}": _length(self.train_dataset)},
            metrics=metrics,
            base_model=kwargs.get("finetuned_from"),
            teacher=None if teacher is None else teacher.config._name_or_path or type(teacher).__name__,
            tags=kwargs.get("tags") or (),
        )
        write_model_card(
            folder,
            repo_id=self.args.hub_model_id,
            license=kwargs.get("license"),
            config=self.accelerator.unwrap_model(self.model).config,
        )

    def _asked_for(self) -> dict[str, Any]:
        """The arguments as they were given: `orders_per_step` makes parts of a batch."""
        arguments = self.args.to_dict()
        orders = arguments.get("orders_per_step", 1)
        arguments["per_device_train_batch_size"] *= orders
        arguments["gradient_accumulation_steps"] //= orders
        return arguments

    def _metrics_of_the_weights(self) -> dict[str, float]:
        """Those of the last evaluation of the weights that the model has now."""
        loads_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        is_best = False
        for entry in reversed(self.state.log_history):
            is_best = is_best or (loads_best and "train_runtime" in entry)  # before this, the weights were others
            if "eval_accuracy" in entry and (not is_best or entry["step"] == self.state.best_global_step):
                return entry
        return {}

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Pushes as transformers does, but in one commit, and without the pickled arguments and the logs.

        For a peft model, the adapters and their card are pushed.

        Checkpoints are pushed by `hub_strategy` alone: `"checkpoint"` and `"all_checkpoints"` put them, with the
        optimizer and without the pickled arguments, into folders of the repository, where they stay.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            if private is not None:
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)  # on all processes, as sharded models need
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        options: dict[str, Any] = {"commit_message": commit_message, "token": token, "private": private}
        options["revision"] = revision or self.args.hub_revision
        adapter_names = self._adapter_names()
        push = publish if adapter_names is None else partial(publish_adapter, adapter_names=adapter_names)
        folder = str(self.args.output_dir)
        if blocking:
            return push(folder, self.hub_model_id, **options)
        return _background_api().run_as_future(push, folder, self.hub_model_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Like transformers' own, but with the code files and without the pickled arguments, which hold a token."""
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if is_busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folders = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }
        jobs = push_checkpoint(
            checkpoint_folder,
            self.hub_model_id,
            adapter_names=self._adapter_names(),
            path_in_repo=folders.get(HubStrategy(strategy)),
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
        )
        if is_busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(cast(Any, jobs))  # annotated as one job

    def _adapter_names(self) -> list[str] | None:
        """The names of a peft model's adapters; None for other models."""
        adapters = getattr(self.accelerator.unwrap_model(self.model), "peft_config", None)
        return list(adapters) if adapters else None


def _length(dataset: Any) -> int | None:
    """The number of images; None for a stream, and where there is no dataset."""
    try:
        return len(dataset)
    except TypeError:  # a stream
        return None
