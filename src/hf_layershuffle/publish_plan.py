# Copyright 2026 The hf-layershuffle authors. Licensed under the Apache License, Version 2.0.
"""What publishing would do, and whether it can, without doing it."""

from pathlib import Path

from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from .export import check_exportable
from .folder_records import EXAMPLES_FILE, EXAMPLES_FOLDER, EXPORT_FILE, PICTURES
from .publishing import matches, published_files
from .report import REPORT_FILE


def check_targets(*repo_ids: str | None) -> None:
    """Refuses what cannot be the name of a repository; None is not given.

    Raises:
        `ValueError`: if one cannot.
    """
    for repo_id in repo_ids:
        if repo_id is not None:
            validate_repo_id(repo_id)


def check_plain_vit(folder: Path, execution_order=None) -> list[int]:
    """Whether the folder's model can be published as a plain ViT: the layer indices in its order.

    Raises:
        `ValueError`: as in [`to_plain_vit`].
    """
    return check_exportable(AutoConfig.from_pretrained(folder), execution_order)


def planned_files(folder, *, evaluates: bool = False) -> dict[str, int | None]:
    """The files that [`publish`] would push and their sizes in bytes; None for what is made, or made anew, before.

    Args:
        evaluates (`bool`): Whether a report, its pictures and example images are made too.
    """
    folder, made = Path(folder), {"README.md"}
    if evaluates:
        made |= {REPORT_FILE, *PICTURES, f"{EXAMPLES_FOLDER}/*.png", f"{EXAMPLES_FOLDER}/{EXAMPLES_FILE}"}
    there = [name for name in published_files(folder) if not matches(name, made)]
    sizes = {name: (folder / name).stat().st_size for name in there} | dict.fromkeys(made)
    return dict(sorted(sizes.items()))


def planned_plain_files(files) -> list[str]:
    """Of the planned files of a model, those that its plain ViT has too, and the record of its origin."""
    shared = ("README.md", "config.json", "*processor_config.json", f"{EXAMPLES_FOLDER}/*")
    return sorted([*(name for name in files if matches(name, shared)), EXPORT_FILE, "model.safetensors"])
