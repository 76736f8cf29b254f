# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A plain model of its family, such as a ViT or a BERT, made of a model: as a folder and on the Hub."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import AutoConfig

from ..checkpoints.loading import load_classifier
from ..checkpoints.locations import TOKENIZER_FILES
from ..checkpoints.processing_classes import load_processing_class
from ..checkpoints.tokenizers import takes_texts
from ..common.files import write_text
from ..common.paths import public_name
from ..deployment.plain_vit import check_exportable, fixed_execution_order, to_plain_vit
from .card_examples import copy_examples
from .card_files import read_license
from .folder_records import EXAMPLES_FOLDER, EXPORT_FILE
from .published_files import check_folder, matches
from .publishing import publish, publish_folder


def plain_revision(folder: str | os.PathLike) -> str:
    """The branch of a repository that holds its model as a plain one: `plain-vit`, or `plain` of a model of texts."""
    of_texts = takes_texts(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    return "plain" if of_texts else "plain-vit"


def save_plain_vit(
    folder: str | os.PathLike,
    plain_folder: str | os.PathLike,
    *,
    source: str,
    execution_order: str | list[int] | None = None,
) -> None:
    """Saves the model of `folder` as a plain ViT, or a plain model of its family, with what makes its inputs.

    Its examples go with it.

    `export.json` records its origin, and the licence that the folder's card states.

    Args:
        folder: The model's folder.
        plain_folder: Folder for the plain ViT.
        source: What the plain ViT's card names as its origin: the Hub id of the model.
        execution_order: The plain ViT's fixed order. Defaults to the configuration's.

    Raises:
        `ValueError`: as in [`to_plain_vit`].
    """
    model = load_classifier(str(folder)).eval()
    order = fixed_execution_order(model.config, execution_order)
    to_plain_vit(model, order).save_pretrained(plain_folder)
    processor = load_processing_class(folder, model.config)
    processor.save_pretrained(plain_folder)
    export = {"source": public_name(source), "execution_order": order, "license": read_license(folder)}
    write_text(Path(plain_folder) / EXPORT_FILE, json.dumps(export, indent=1) + "\n")
    copy_examples(folder, plain_folder, processor)


def publish_with_plain_vit(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    plain_repo_id: str | None = None,
    execution_order: str | list[int] | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **kwargs: Any,
) -> tuple[CommitInfo, CommitInfo]:
    """Pushes a LayerShuffle model's folder and, beside it, the model as a plain ViT (see [`to_plain_vit`]).

    Args:
        folder: The model's folder.
        repo_id: Repository of the LayerShuffle model.
        plain_repo_id: A repository of its own for the plain ViT. Defaults to the branch `plain-vit` of `repo_id`,
            which is called `plain` of a model of texts.
        execution_order: The plain ViT's fixed order. Defaults to the configuration's.
        revision, commit_message: Branch and message of the LayerShuffle model.
        kwargs: As for [`publish`]. They hold for both.

    Raises:
        `ValueError`: as in [`publish`] and, before anything is pushed, in [`to_plain_vit`].
        `OSError`: as in [`publish`].
    """
    target = plain_repo_id or repo_id
    check_folder(Path(folder))
    check_plain_target(folder, repo_id, revision, plain_repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        plain_folder = Path(temporary) / target.split("/")[-1]
        save_plain_vit(folder, plain_folder, source=repo_id, execution_order=execution_order)
        commit = publish(folder, repo_id, revision=revision, commit_message=commit_message, **kwargs)
        go_on = f"'{folder}' is complete and the LayerShuffle model is on the Hub: publish again when that is mended"
        branch = plain_revision(folder)
        kwargs["commit_message"] = f"Upload plain {'model' if branch == 'plain' else 'ViT'}"
        kwargs["revision"] = None if plain_repo_id else branch
        return commit, publish_folder(plain_folder, target, go_on, **kwargs)


def check_plain_target(
    folder: str | os.PathLike, repo_id: str | None, revision: str | None, plain_repo_id: str | None
) -> None:
    """Refuses to push the plain ViT to the place of the LayerShuffle model, where one would replace the other.

    Args:
        folder: The model's folder.
        repo_id, revision, plain_repo_id: As in [`publish_with_plain_vit`].

    Raises:
        `ValueError`: if both would go to the same branch of the same repository.
    """
    branch = "main" if plain_repo_id else plain_revision(folder)
    is_same_repository = not plain_repo_id or plain_repo_id.lower() == (repo_id or "").lower()
    if is_same_repository and branch == (revision or "main"):
        raise ValueError(
            f"The model and its plain one would both go to the branch '{branch}' of '{repo_id or plain_repo_id}', and "
            "one would replace the other. Choose another `revision`, or another repository for the plain one "
            "(--plain_vit_repo_id)."
        )


def check_plain_vit(folder: Path, execution_order: str | list[int] | None = None) -> list[int]:
    """Checks that the folder's model can be published as a plain ViT, and returns its layer indices in order.

    Raises:
        `ValueError`: as in [`to_plain_vit`].
    """
    return check_exportable(AutoConfig.from_pretrained(folder, trust_remote_code=False), execution_order)


def planned_plain_files(files: Iterable[str]) -> list[str]:
    """The planned files of a model that its plain ViT has too, and the record of its origin."""
    shared = ("README.md", "config.json", "*processor_config.json", *TOKENIZER_FILES, f"{EXAMPLES_FOLDER}/*")
    return sorted([*(name for name in files if matches(name, shared)), EXPORT_FILE, "model.safetensors"])
