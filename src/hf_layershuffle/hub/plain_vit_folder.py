# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""A plain ViT made of a model, as a folder and on the Hub."""

import json
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import AutoConfig

from ..checkpoints.image_processors import load_image_processor
from ..checkpoints.loading import load_classifier
from ..common.files import write_text
from ..common.paths import public_name
from ..deployment.plain_vit import check_exportable, fixed_execution_order, to_plain_vit
from .card_examples import copy_examples
from .folder_records import EXAMPLES_FOLDER, EXPORT_FILE, read_license
from .published_files import check_folder, matches
from .publishing import publish, publish_folder


PLAIN_REVISION = "plain-vit"


def save_plain_vit(folder, plain_folder, *, source: str, execution_order=None) -> None:
    """Saves the model of `folder` as a plain ViT with its image processor, example images and `export.json`, which
    records its origin and the licence that the folder's card states.

    Args:
        source: What the plain ViT's card names as its origin: the Hub id of the model.

    Raises:
        `ValueError`: as in [`to_plain_vit`].
    """
    model = load_classifier(str(folder)).eval()
    order = fixed_execution_order(model.config, execution_order)
    to_plain_vit(model, order).save_pretrained(plain_folder)
    processor = load_image_processor(folder)
    processor.save_pretrained(plain_folder)
    export = {"source": public_name(source), "execution_order": order, "license": read_license(folder)}
    write_text(Path(plain_folder) / EXPORT_FILE, json.dumps(export, indent=1) + "\n")
    copy_examples(folder, plain_folder, processor)


def publish_with_plain_vit(
    folder,
    repo_id: str,
    *,
    plain_repo_id: str | None = None,
    execution_order=None,
    revision: str | None = None,
    commit_message: str | None = None,
    **kwargs,
) -> tuple[CommitInfo, CommitInfo]:
    """Pushes a LayerShuffle model's folder and, beside it, the model as a plain ViT (see [`to_plain_vit`]).

    Args:
        plain_repo_id: A repository of its own for the plain ViT. Defaults to the branch `plain-vit` of
            `repo_id`.
        execution_order: The plain ViT's fixed order. Defaults to the configuration's.
        revision, commit_message: Of the LayerShuffle model.
        kwargs: As for [`publish`], for both.

    Raises:
        `ValueError`: as in [`publish`] and, before anything is pushed, in [`to_plain_vit`].
        `OSError`: as in [`publish`].
    """
    folder = Path(folder)
    target = plain_repo_id or repo_id
    check_folder(folder)
    with tempfile.TemporaryDirectory() as temporary:
        plain_folder = Path(temporary) / target.split("/")[-1]
        save_plain_vit(folder, plain_folder, source=repo_id, execution_order=execution_order)
        commit = publish(folder, repo_id, revision=revision, commit_message=commit_message, **kwargs)
        go_on = f"'{folder}' is complete and the LayerShuffle model is on the Hub: publish again when that is mended"
        plain_revision = None if plain_repo_id else PLAIN_REVISION
        kwargs |= {"commit_message": "Upload plain ViT", "revision": plain_revision}
        return commit, publish_folder(plain_folder, target, go_on, **kwargs)


def check_plain_vit(folder: Path, execution_order=None) -> list[int]:
    """Whether the folder's model can be published as a plain ViT: the layer indices in its order.

    Raises:
        `ValueError`: as in [`to_plain_vit`].
    """
    return check_exportable(AutoConfig.from_pretrained(folder, trust_remote_code=False), execution_order)


def planned_plain_files(files) -> list[str]:
    """Of the planned files of a model, those that its plain ViT has too, and the record of its origin."""
    shared = ("README.md", "config.json", "*processor_config.json", f"{EXAMPLES_FOLDER}/*")
    return sorted([*(name for name in files if matches(name, shared)), EXPORT_FILE, "model.safetensors"])
